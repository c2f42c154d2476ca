"""What `megakd export` is asked for, beside what is exported and where to: one field an option, with its default and help text."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Options:
    """Of the writers. A field's metadata are those of `typer.Option`, as `megakd.cli.options.from_fields` reads them."""

    precision: tuple[str, ...] = field(default=(), metadata={"help": "of onnx: fp16 and int8 files beside float32's; may be given twice"})
