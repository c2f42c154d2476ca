"""What `megakd export` is asked for, beside what is exported and where to: one field an option, with its default and help text."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Options:
    """Of the writers. A field's metadata are those of `typer.Option`, as `megakd.cli.options.from_fields` reads them."""

    precision: tuple[str, ...] = field(default=(), metadata={"help": "of onnx: fp16 and int8 files beside float32's; may be given twice"})
    part: str = field(default="both", metadata={"help": "both towers, or image: the image tower alone"})
    keep_projection: bool = field(
        default=False, metadata={"flag": "--keep_projection", "help": "of a run: its heads that project into the teachers' spaces as well"}
    )
    license: str | None = field(default=None, metadata={"help": "for the model card, as the hub names it: apache-2.0, mit; default: none"})
    push: str | None = field(default=None, metadata={"metavar": "ORG/NAME", "help": "send the folder to this repository of the hub"})
    dry_run: bool = field(default=False, metadata={"flag": "--dry_run", "help": "with --push: list what would be sent, and send nothing"})
