"""A model's towers as ONNX: image.onnx and text.onnx, which onnxruntime runs where there is neither torch nor megakd.

    image.onnx         pixels (batch, 3, H, W) float32, prepared as preprocess.json says -> image_embeds (batch, D)
    text.onnx          tokens (batch, L) int64 -> text_embeds (batch, D); absent for a model that sees images alone
    image.fp16.onnx    and so on: the same in fewer bits, where asked for
    tokenizer.json     for `tokenizers`: `Tokenizer.from_file(FILE).encode(CAPTION).ids` are a row of tokens

Embeddings are what open_clip's `encode_image` and `encode_text` give: not of length 1. Legend: N rows, D width of an embedding.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megakd.export import onnx_precision, onnx_run, tokenizer_file, trial_inputs
from megakd.export.trial_inputs import CLOSE
from megakd.models.clip import ClipModel, parameters_in
from megakd.models.preprocessing import KEYS
from megakd.runtime.console import LongWork
from megakd.runtime.extras import library

OPSET = 18  # read by every onnxruntime since 1.14, of February 2023
PREPROCESS = "preprocess.json"
PRECISIONS_OF: dict[str, Callable[..., None]] = {"fp16": onnx_precision.half, "int8": onnx_precision.whole_numbers}
_LARGEST = 1_900_000_000  # bytes of weights within one file, which may have 2 GiB


class _Images(nn.Module):
    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixels: Tensor) -> Tensor:
        return self.clip.encode_image(pixels)  # type: ignore[no-any-return]


class _Texts(nn.Module):
    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_text(tokens)  # type: ignore[no-any-return]


def chosen(precision: Sequence[str]) -> list[str]:
    """The precisions of the option, repeated or with commas, beside float32. Raises ValueError for others."""
    names = [name.strip() for given in precision for name in given.split(",")]
    if unknown := [name for name in names if name not in PRECISIONS_OF]:
        raise ValueError(f"--precision {unknown[0]}: one of {', '.join(PRECISIONS_OF)}; float32 is always written")
    return list(dict.fromkeys(names))


def write(built: ClipModel, folder: Path, precisions: Sequence[str] = (), *, texts: bool = True) -> list[str]:
    """Write the model's towers to an empty folder and run them in onnxruntime. Gives a line a file.

    built: in float32 on the CPU, in evaluation mode. precisions: of PRECISIONS_OF, written beside float32. texts: the text tower as
    well, where there is one. Raises ValueError for a library that is missing, a tower that torch cannot export, and where onnxruntime
    gives other embeddings.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        library(module, "an ONNX export needs", "onnx")
    lines, description = [], built.description
    towers: list[tuple[str, nn.Module, str, Tensor]] = [("image", _Images(built.clip), "pixels", trial_inputs.pixels(built))]
    if texts and description.has_text:
        towers.append(("text", _Texts(built.clip), "tokens", trial_inputs.tokens(description)))
    with LongWork("exporting", len(towers) * (1 + len(precisions)), "files", coarse=True) as work:
        for name, tower, given, rows in towers:
            path = folder / f"{name}.onnx"
            external = 4 * parameters_in(tower) > _LARGEST
            how = export(tower.eval(), given, f"{name}_embeds", rows[:2], path, external=external)
            with torch.no_grad():
                expected = tower(rows)
            found = _run(path, rows)
            if not (gap := trial_inputs.difference(found, expected)) <= CLOSE:
                raise ValueError(
                    f"{path.name}: onnxruntime's embeddings differ by {gap:.2g} from the model's, and {CLOSE:.0e} is allowed: this tower "
                    f"cannot be exported to ONNX by this torch and onnxruntime"
                )
            same = f"{len(rows)} {name}s in onnxruntime differ by {gap:.1e} at most"
            lines.append(f"{path.name}: {_size(path)}, opset {OPSET}, {how}, batches of any size; {same}")
            work.advance()
            for precision in precisions:
                smaller = folder / f"{name}.{precision}.onnx"
                PRECISIONS_OF[precision](path, smaller, external=external)
                cosines = trial_inputs.cosines(_run(smaller, rows), found)
                kept = f"cosine to float32 {cosines.mean():.6f} in the mean, {cosines.min():.6f} at least"
                lines.append(f"{smaller.name}: {_size(smaller)}; {kept}")
                work.advance()
    return [*lines, *write_description(built, folder, texts=texts)]


def write_description(built: ClipModel, folder: Path, *, texts: bool = True) -> list[str]:
    """Write how images and texts are prepared, without a tower. Gives lines for people."""
    prepared = {key: getattr(built.preprocess, key) for key in (*KEYS, "fill_color", "size")}
    about: dict[str, Any] = {"image": prepared, "embeddings": "not of length 1: divide each by its own before they are compared"}
    lines, description = [], built.description
    if texts and description.has_text:
        about["text"] = {"context_length": description.context_length, "cleaned": tokenizer_file.cleaning(description)}
        lines.append(tokenizer_file.write(description, folder))
    (folder / PREPROCESS).write_text(json.dumps(about, indent=1), encoding="utf-8")
    return lines


def use(folder: Path, name: str) -> str:
    """Python that runs a folder that was written here."""
    text = """
text = onnxruntime.InferenceSession("NAME/text.onnx")
text_embeds = text.run(None, {"tokens": tokens})[0]  # int64 (n, L)
""".lstrip()
    return f"""
import onnxruntime
image = onnxruntime.InferenceSession("{name}/image.onnx")
image_embeds = image.run(None, {{"pixels": pixels}})[0]  # float32 (n, 3, H, W), prepared as preprocess.json says
{text.replace("NAME", name) if (folder / "text.onnx").is_file() else ""}"""


def export(tower: nn.Module, given: str, taken: str, rows: Tensor, path: Path, *, external: bool) -> str:
    """Write one tower with inputs `given` and outputs `taken`, whose first axis may have any length. Gives by which exporter.

    By torch's older one, which follows a single run, where the newer one has no ONNX for a tower that `torch.export` takes whole: then no
    branch of it depends on the pixels. external: its weights in a file beside. Raises ValueError where torch cannot export it.
    """
    attention, disabled = torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable
    torch.backends.mha.set_fastpath_enabled(False)  # of a fused kernel nothing could be exported
    logging.disable(logging.WARNING)
    batch = {given: {0: torch.export.Dim("batch")}}
    names: dict[str, Any] = {"input_names": [given], "output_names": [taken], "opset_version": OPSET, "verbose": False}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                program: Any = torch.onnx.export(tower, (rows,), dynamo=True, dynamic_shapes=batch, **names)
            except Exception as refused:
                torch.export.export(tower, (rows,), dynamic_shapes=batch)
                if external:
                    raise
                torch.onnx.export(tower, (rows,), path, dynamo=False, dynamic_axes={given: {0: "batch"}, taken: {0: "batch"}}, **names)
                return f"by torch's TorchScript exporter, as the newer one says {_reason(refused)!r}"
    except Exception as error:  # torch.export raises whatever a model's code does with symbols in the place of numbers
        raise ValueError(f"{path.name}: torch cannot export this tower to ONNX: {_reason(error)}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(attention)
        logging.disable(disabled)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # lines of source with this machine's paths
    program.save(path, external_data=external)
    return "by torch.export"


def _reason(error: BaseException) -> str:
    """The innermost error, of which torch's own is a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


def _run(path: Path, rows: Tensor) -> Tensor:
    return torch.from_numpy(onnx_run.embeddings(path, rows.numpy()))


def _size(path: Path) -> str:
    beside = path.with_name(f"{path.name}.data")
    total = path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)
    return f"{total / 1e6:.1f} MB"
