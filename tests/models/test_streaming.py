"""From a file into an empty model: the same model as open_clip loads, refused before anything is read where it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from megakd.models import clip, streaming
from megakd.models.weights import SafetensorsFiles
from megakd.runtime.launch import World
from megakd.runtime.precision import Precision
from support.teachers import ARCHITECTURES, build, describe, described, inputs

HERE = World(0, 1, torch.device("cpu"))
NAMES = sorted(ARCHITECTURES)


def _save(state: dict[str, Tensor], path: Path) -> str:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    return {name: _save(build(name).state_dict(), folder / f"{name}.safetensors") for name in NAMES}


def _embeddings(clip: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    pixels, tokens = inputs(3)
    with torch.no_grad():
        return clip.encode_image(pixels.to(dtype)), clip.encode_text(tokens)


def _assert_same(a: nn.Module, b: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    a, b = (model.eval().requires_grad_(False) for model in (a, b))
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    for mine, other in zip(_embeddings(a, dtype), _embeddings(b, dtype), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masks_that_a_constructor_computes_on_its_parameters_device_are_there(precision: Precision, tmp_path: Path) -> None:
    """timm's Swin: no file has them, and the parameters were empty when they were made."""
    file = _save(build("Swin").state_dict(), tmp_path / "swin.safetensors")
    teacher = describe("Swin", file)
    streamed, loaded = streaming.load(teacher, HERE, precision), clip.build(teacher, HERE.device, precision)
    _assert_same(streamed.clip, loaded.clip, torch.float32 if precision == "fp32" else torch.bfloat16)


@pytest.mark.parametrize("trunk", ["vit_tiny_r_s16_p8_224", "swinv2_tiny_window8_256"])
def test_a_constructor_that_needs_its_weights_is_refused_with_the_mode_that_loads_it(trunk: str) -> None:
    size = int(trunk.rsplit("_", 1)[1])
    vision = {"timm_model_name": trunk, "timm_pool": "avg", "timm_proj": None, "image_size": size}
    architecture = {**ARCHITECTURES["ViT-bigG"], "vision_cfg": vision}
    with pytest.raises(ValueError, match=r"computes with its own weights.*set teacher\.mode to replicated"):
        streaming.load(described(architecture, "random"), HERE, "fp32")
    assert clip.build(described(architecture, "random"), HERE.device).dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_streamed_model_is_the_one_that_open_clip_loads(name: str, precision: Precision, files: dict[str, str]) -> None:
    teacher = describe(name, files[name])
    streamed = streaming.load(teacher, HERE, precision)
    loaded = clip.build(teacher, HERE.device, precision)
    _assert_same(streamed.clip, loaded.clip, torch.float32 if precision == "fp32" else torch.bfloat16)
    assert streamed.preprocess == loaded.preprocess
    assert not any(parameter.requires_grad for parameter in streamed.clip.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_random_weights_are_those_of_a_replicated_teacher_of_the_same_seed(name: str) -> None:
    teacher = describe(name, "random")
    torch.manual_seed(11)
    loaded = clip.build(teacher, HERE.device)
    torch.manual_seed(11)
    _assert_same(streaming.load(teacher, HERE, "fp32").clip, loaded.clip)


def test_an_empty_model_has_real_tables_and_no_parameters_in_memory() -> None:
    found = 0
    for name in NAMES:
        real = build(name)
        with streaming.empty_parameters():
            empty = clip.build(describe(name, "random"), torch.device("cpu"), load_weights=False).clip
        assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
        tables = dict(real.named_buffers())
        found += len(tables)
        assert all(torch.equal(buffer, tables[key]) for key, buffer in empty.named_buffers())
    assert found > len(NAMES), "rotary tables and causal masks"


def test_modules_made_after_a_failed_construction_are_real_again() -> None:
    with pytest.raises(RuntimeError, match="stop"), streaming.empty_parameters():
        raise RuntimeError("stop")
    linear = nn.Linear(2, 2).to(torch.float64)
    assert linear.weight.device.type == "cpu"
    assert linear.weight.dtype == torch.float64


LONGER = {"visual.transformer.resblocks.9.ln_1.weight": torch.ones(48), "ema_decay": torch.ones(1)}
RESHAPED = {"visual.proj": torch.ones(48, 33), "positional_embedding": torch.ones(24, 47)}
GONE = ("visual.proj", "transformer.resblocks.1.mlp.c_fc.bias")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: {name: value for name, value in state.items() if name not in GONE}, [f"missing: {GONE[1]}, {GONE[0]}"]),
        (lambda state: {**state, **LONGER}, ["not of this model: ema_decay, visual.transformer.resblocks.9.ln_1.weight"]),
        (
            lambda state: {**state, **RESHAPED},
            ["of another shape: positional_embedding (24, 47) instead of (24, 48), visual.proj (48, 33) instead"],
        ),
        (lambda state: {**state, **LONGER, **RESHAPED}, ["not of this model: ema_decay", "of another shape: positional_embedding"]),
    ],
    ids=["shorter", "longer", "reshaped", "longer and reshaped"],
)
def test_weights_that_do_not_fit_are_refused_with_their_names_before_the_first_is_read(
    change: Any, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _save(change(build("ViT-bigG").state_dict()), tmp_path / "other.safetensors")
    read: list[str] = []
    monkeypatch.setattr(SafetensorsFiles, "read", lambda self, name: read.append(name))
    with pytest.raises(ValueError, match=r"^teacher: ") as raised:
        streaming.load(describe("ViT-bigG", path), HERE, "fp32")
    for part in (path, *told):
        assert part in str(raised.value)
    assert read == []


def test_a_long_list_of_names_is_cut_with_its_length(tmp_path: Path) -> None:
    path = _save({"logit_scale": torch.tensor(1.0)}, tmp_path / "nearly_nothing.safetensors")
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more"):
        streaming.load(describe("ViT-bigG", path), HERE, "fp32")


@pytest.mark.parametrize("start", ["image_encoder.model.", "vision_model.", "text_model."])
def test_another_librarys_names_are_refused_with_its_name(start: str, tmp_path: Path) -> None:
    path = _save({f"{start}embeddings.weight": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"MobileCLIP|transformers"):
        streaming.load(describe("ViT-bigG", path), HERE, "fp32")


BIGG = ARCHITECTURES["ViT-bigG"]
LARGER = {"vision_cfg": {**BIGG["vision_cfg"], "image_size": 80}, "text_cfg": {**BIGG["text_cfg"], "context_length": 31}}


def _of_another_size(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a tower of another resolution and context: its positions are taken in between."""
    other = clip.build(described({**BIGG, **LARGER}, "random"), HERE.device).clip.state_dict()
    assert other["visual.positional_embedding"].shape == (26, 48)
    return other


# The model's name, and what another program made of its weights.
CHANGED: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "a wrapped model's names": ("ViT-bigG", lambda state: {f"module.{name}": tensor for name, tensor in state.items()}),
    "an old CLIP's text tower": ("EVA02-E", lambda state: {name.removeprefix("text."): tensor for name, tensor in state.items()}),
    "scales of one dimension": ("SigLIP", lambda state: {**state, **{name: state[name].reshape(1) for name in streaming.SCALARS}}),
    "no logit bias, which starts at zero": (
        "SigLIP",
        lambda state: {name: tensor for name, tensor in state.items() if name != "logit_bias"},
    ),
    "positions of another size": ("ViT-bigG", _of_another_size),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_changed_file_gives_the_model_that_open_clip_makes_of_it(what: str, tmp_path: Path) -> None:
    name, change = CHANGED[what]
    changed = describe(name, _save(change(build(name).state_dict()), tmp_path / "changed.safetensors"))
    _assert_same(streaming.load(changed, HERE, "fp32").clip, clip.build(changed, HERE.device).clip)


def test_a_text_tower_that_is_dropped_stays_empty_and_unread(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        read: list[str] = []
        original = SafetensorsFiles.read

        def noted(self: SafetensorsFiles, key: str, read: list[str] = read, original: Any = original) -> Tensor:
            read.append(key)
            return original(self, key)

        monkeypatch.setattr(SafetensorsFiles, "read", noted)
        clip = streaming.load(describe(name, files[name]), HERE, "fp32", without_text=True).clip
        monkeypatch.undo()
        assert {key for key in read if not key.startswith("visual.")} <= set(streaming.SCALARS)
        for key, parameter in clip.named_parameters():
            assert parameter.is_meta == (not key.startswith("visual.") and key not in streaming.SCALARS), key
        pixels, _ = inputs(3)
        assert torch.equal(clip.encode_image(pixels), _embeddings(build(name))[0])


def test_only_a_few_tensors_are_in_memory_at_a_time(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BATCH_BYTES", 20_000)
    sizes: list[int] = []

    def place(parameters: list[nn.Parameter]) -> None:
        sizes.append(sum(parameter.nbytes for parameter in parameters))
        for parameter in parameters:
            parameter.data = torch.empty(0)

    clip = streaming.load(describe("ViT-bigG", files["ViT-bigG"]), HERE, "fp32", place=place).clip
    largest = max(tensor.nbytes for tensor in build("ViT-bigG").parameters())
    assert max(sizes) <= 20_000 + largest
    assert len(sizes) > 10
    left = {name for name, parameter in clip.named_parameters() if parameter.numel()}
    assert left == {"logit_scale"}
