"""A student that begins with a part of a larger model: which part, exactly, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import resize_pos_embed
from timm.layers import resample_patch_embed
from torch import Tensor

from megakd.models import weights
from megakd.models.clip import ClipModel
from megakd.models.start.inherit import chosen, chosen_layers
from megakd.planning.memory_tracker import MemoryTracker
from support import small_towers  # noqa: F401  registers timm's models
from support.starts import ALONE, LARGE, SMALL, TEXT, VISION, begun, built, described, drawn, saved

Architecture = dict[str, Any]


@pytest.fixture(scope="module")
def large(tokenizer: Path) -> ClipModel:
    return built(LARGE, tokenizer)


@pytest.fixture(scope="module")
def file(large: ClipModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(large.clip, tmp_path_factory.mktemp("large") / "large.safetensors")


def _student(architecture: Architecture, tokenizer: Path, pretrained: str, of: Architecture = LARGE, **more: Any) -> dict[str, Any]:
    inherit = {"architecture": of, "pretrained": pretrained, **more}
    return {"architecture": architecture, "tokenizer": str(tokenizer), "inherit": inherit}


@pytest.mark.parametrize(
    ("have", "want", "even"),
    [(12, 4, [0, 4, 7, 11]), (5, 3, [0, 2, 4]), (24, 12, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]), (7, 7, list(range(7))), (9, 1, [0])],
)
def test_layers_are_spread_from_the_first_to_the_last(have: int, want: int, even: list[int]) -> None:
    assert chosen_layers(have, want, "even") == even
    assert chosen_layers(have, want, "first") == list(range(want))


def test_the_largest_magnitudes_are_taken_in_their_order_and_the_first_of_equal_ones() -> None:
    assert chosen(5, 3, torch.tensor([1.0, 5.0, 0.0, 7.0, 1.0])).tolist() == [0, 1, 3]
    assert chosen(5, 3, None).tolist() == [0, 1, 2]


def _expected(source: dict[str, Tensor], image: list[int], text: list[int], width: list[int], heads: list[int], channels: list[int],
              embedding: list[int]) -> dict[str, Tensor]:  # fmt: skip
    """SMALL's state as slices of LARGE's: both towers are given the same indices."""
    w, m, e = torch.tensor(width), torch.tensor(channels), torch.tensor(embedding)
    h = torch.cat([torch.arange(16 * head, 16 * head + 16) for head in heads])
    qkv = torch.cat([h, 48 + h, 96 + h])
    found = {
        "visual.class_embedding": source["visual.class_embedding"][w],
        "visual.positional_embedding": source["visual.positional_embedding"][:, w],
        "visual.conv1.weight": source["visual.conv1.weight"][w],
        "visual.proj": source["visual.proj"][w][:, e],
        "token_embedding.weight": source["token_embedding.weight"][:, w],
        "positional_embedding": source["positional_embedding"][:, w],
        "text_projection": source["text_projection"][w][:, e],
        "logit_scale": source["logit_scale"],
    }
    for norm in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        found |= {f"{norm}.{leaf}": source[f"{norm}.{leaf}"][w] for leaf in ("weight", "bias")}
    for tower, layers in (("visual.transformer.resblocks", image), ("transformer.resblocks", text)):
        for number, layer in enumerate(layers):
            block, theirs = f"{tower}.{number}", f"{tower}.{layer}"
            for norm in ("ln_1", "ln_2"):
                found |= {f"{block}.{norm}.{leaf}": source[f"{theirs}.{norm}.{leaf}"][w] for leaf in ("weight", "bias")}
            c = m if tower.startswith("visual") else m[m < 192]
            found |= {
                f"{block}.attn.in_proj_weight": source[f"{theirs}.attn.in_proj_weight"][qkv][:, w],
                f"{block}.attn.in_proj_bias": source[f"{theirs}.attn.in_proj_bias"][qkv],
                f"{block}.attn.out_proj.weight": source[f"{theirs}.attn.out_proj.weight"][w][:, h],
                f"{block}.attn.out_proj.bias": source[f"{theirs}.attn.out_proj.bias"][w],
                f"{block}.mlp.c_fc.weight": source[f"{theirs}.mlp.c_fc.weight"][c][:, w],
                f"{block}.mlp.c_fc.bias": source[f"{theirs}.mlp.c_fc.bias"][c],
                f"{block}.mlp.c_proj.weight": source[f"{theirs}.mlp.c_proj.weight"][w][:, c],
                f"{block}.mlp.c_proj.bias": source[f"{theirs}.mlp.c_proj.bias"][w],
            }
    return found


def _same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


ONE_RATIO = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "mlp_ratio": 4.0}}


def test_the_first_widths_of_evenly_spread_layers_are_the_sources_slices(large: ClipModel, file: str, tokenizer: Path) -> None:
    student, start = begun(_student(ONE_RATIO, tokenizer, file))
    first = {"width": list(range(32)), "heads": [0, 1], "channels": list(range(128)), "embedding": list(range(16))}
    _same(student.state_dict(), _expected(large.clip.state_dict(), [0, 2, 4], [0, 3], **first))
    line, notes = start.describe()
    assert line == (
        f"student begins with: image tower: 44 tensors from an architecture {file} (student.inherit); "
        f"text tower: 29 tensors from an architecture {file} (student.inherit); "
        f"the rest: 1 tensor from an architecture {file} (student.inherit)"
    )
    assert "image tower: layers 0, 2, 4 of 5; text tower: layers 0, 3 of 4;" in notes
    assert "image width 32 of 48, embedding 16 of 24, image heads 2 of 3" in notes
    assert start.record()["image tower"] == {"tensors": {f"an architecture {file} (student.inherit)": 44}, "new": []}


def test_the_first_layers_are_taken_when_asked_for(large: ClipModel, file: str, tokenizer: Path) -> None:
    student, _ = begun(_student(ONE_RATIO, tokenizer, file, layers="first"))
    first = {"width": list(range(32)), "heads": [0, 1], "channels": list(range(128)), "embedding": list(range(16))}
    _same(student.state_dict(), _expected(large.clip.state_dict(), [0, 1, 2], [0, 1], **first))


def test_magnitude_takes_what_has_the_largest_weights_everywhere_alike(tokenizer: Path, tmp_path: Path) -> None:
    """Planted: some indices of every axis are three times as large, in other places of each tensor."""
    source = built(LARGE, tokenizer, seed=5).clip
    width, heads, channels, embedding = list(range(7, 39)), [0, 2], list(range(60, 188)), [1, 2, 3, *range(8, 20), 23]
    state = source.state_dict()
    h = torch.cat([torch.arange(16 * head, 16 * head + 16) for head in heads])
    for name, value in state.items():
        if name.endswith((".proj", "text_projection")):
            value[width] *= 3
            value[:, embedding] *= 3
        elif name.endswith("in_proj_weight"):
            value.view(3, 48, 48)[:, h] *= 3
            value[:, width] *= 3
        elif name.endswith("in_proj_bias"):
            value.view(3, 48)[:, h] *= 3
        elif name.endswith("out_proj.weight"):
            value[width] *= 3
            value[:, h] *= 3
        elif name.endswith("c_fc.weight"):
            value[channels] *= 3
            value[:, width] *= 3
        elif name.endswith("c_fc.bias"):
            value[channels] *= 3
        elif name.endswith("c_proj.weight"):
            value[width] *= 3
            value[:, channels] *= 3
        elif name.endswith(("embedding", "token_embedding.weight")) and value.ndim == 2:
            value[:, width] *= 3
        elif value.ndim:
            value[width] *= 3
    student, start = begun(_student(ONE_RATIO, tokenizer, saved(source, tmp_path / "planted.safetensors"), widths="magnitude"))
    _same(student.state_dict(), _expected(state, [0, 2, 4], [0, 3], width, heads, channels, embedding))
    assert "those of the largest magnitude" in start.describe()[1]


def test_all_of_a_model_is_the_same_model_bit_for_bit(large: ClipModel, file: str, tokenizer: Path) -> None:
    student, _ = begun(_student(LARGE, tokenizer, file, widths="magnitude"))
    _same(student.state_dict(), large.clip.state_dict())
    pixels = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()
    tokens = large.description.tokenize(["a red square", "two blue circles"])
    with torch.no_grad():
        assert torch.equal(student.encode_image(pixels), large.clip.encode_image(pixels))
        assert torch.equal(student.encode_text(tokens), large.clip.encode_text(tokens))


def test_one_tower_inherits_and_the_rest_is_drawn_as_without(large: ClipModel, file: str, tokenizer: Path) -> None:
    student, start = begun(_student(ONE_RATIO, tokenizer, file, towers="text"), seed=11)
    state, random = student.state_dict(), drawn({"architecture": ONE_RATIO, "tokenizer": str(tokenizer)}, seed=11)
    assert torch.equal(state["ln_final.weight"], large.clip.ln_final.weight[:32])  # type: ignore[union-attr, index]
    others = [name for name in state if name.startswith("visual.") or name == "logit_scale"]
    assert all(torch.equal(state[name], random[name]) for name in others)
    assert "image tower: all 44 new; text tower: 29 tensors" in start.describe()[0]


def test_another_patch_and_resolution_is_resampled_by_the_libraries_functions(large: ClipModel, file: str, tokenizer: Path) -> None:
    vision = {**VISION, "patch_size": 12, "image_size": 36, "width": 32, "layers": 1}
    student, start = begun(_student({**LARGE, "vision_cfg": vision}, tokenizer, file))
    source = large.clip.state_dict()
    assert torch.equal(student.visual.conv1.weight, resample_patch_embed(source["visual.conv1.weight"][:32], [12, 12]))
    positions = {"visual.positional_embedding": source["visual.positional_embedding"][:, :32]}
    resize_pos_embed(positions, student)
    assert student.visual.positional_embedding.shape == (10, 32)
    assert torch.equal(student.visual.positional_embedding, positions["visual.positional_embedding"])
    notes = start.describe()[1]
    assert "visual.conv1.weight interpolated" in notes
    assert "visual.positional_embedding interpolated" in notes


SIGLIP_TEXT = {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}


def _timm(name: str, pool: str, proj: str, embed_dim: int, **more: Any) -> Architecture:
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": 32}
    return {"embed_dim": embed_dim, "vision_cfg": vision, "custom_text": True, "text_cfg": TEXT, **more}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (_timm("megakd_wide_vit", "token", "linear", 24), _timm("megakd_small_vit", "token", "linear", 16)),
        (
            _timm("megakd_wide_siglip", "map", "none", 48, text_cfg=SIGLIP_TEXT, init_logit_bias=-10),
            _timm("megakd_small_siglip", "map", "none", 32, text_cfg=SIGLIP_TEXT, init_logit_bias=-5),
        ),
    ],
    ids=["a class token", "SigLIP"],
)
def test_timms_transformers_inherit_too(theirs: Architecture, ours: Architecture, tokenizer: Path, tmp_path: Path) -> None:
    source = built(theirs, tokenizer)
    student, _ = begun(_student(ours, tokenizer, saved(source.clip, tmp_path / "wide.safetensors"), of=theirs))
    mine, state = student.state_dict(), source.clip.state_dict()
    h = torch.cat([torch.arange(32) + 48 * part for part in range(3)])
    assert torch.equal(mine["visual.trunk.blocks.1.attn.qkv.weight"], state["visual.trunk.blocks.2.attn.qkv.weight"][h][:, :32])
    assert torch.equal(mine["visual.trunk.blocks.1.mlp.fc2.weight"], state["visual.trunk.blocks.2.mlp.fc2.weight"][:32, :128])
    assert torch.equal(mine["visual.trunk.pos_embed"], state["visual.trunk.pos_embed"][..., :32])
    if "map" in theirs["vision_cfg"].values():
        kv = torch.cat([torch.arange(32) + 48 * part for part in range(2)])
        assert torch.equal(mine["visual.trunk.attn_pool.kv.weight"], state["visual.trunk.attn_pool.kv.weight"][kv][:, :32])
        assert torch.equal(mine["text.text_projection.weight"], state["text.text_projection.weight"][:32])
        assert mine["logit_bias"] == state["logit_bias"]
    else:
        assert torch.equal(mine["visual.head.proj.weight"], state["visual.head.proj.weight"][:16, :32])


def test_no_more_than_a_few_tensors_of_the_source_are_ever_in_memory(file: str, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read once where the first widths are taken, once more for magnitudes."""
    opened: list[weights.SafetensorsFiles] = []

    class Watched(weights.SafetensorsFiles):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            opened.append(self)

    monkeypatch.setattr(weights, "SafetensorsFiles", Watched)
    for widths, times in (("first", 1), ("magnitude", 2)):
        student, _ = begun(_student(ONE_RATIO, tokenizer, file, widths=widths))
        opened.clear()
        _, start = described(_student(ONE_RATIO, tokenizer, file, widths=widths))
        again, watch = copy.deepcopy(student), MemoryTracker("cpu")
        watch.ignore(again.state_dict().values())
        with watch:
            start.load(again, (), ALONE)
        size, largest = Path(file).stat().st_size, 192 * 48 * 4
        assert (times - 1) * size / 3 < sum(one.bytes_read for one in opened) < times * size
        assert watch.peak < 8 * largest < size / 3
        _same(again.state_dict(), student.state_dict())


def test_a_pickled_source_is_read_through_its_conversion(large: ClipModel, file: str, tokenizer: Path, tmp_path: Path) -> None:
    torch.save(large.clip.state_dict(), tmp_path / "large.pt")
    pickled, _ = begun(_student(SMALL, tokenizer, str(tmp_path / "large.pt")))
    plain, _ = begun(_student(SMALL, tokenizer, file))
    _same(pickled.state_dict(), plain.state_dict())


def _vision(**more: Any) -> Architecture:
    return {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], **more}}


def _text(**more: Any) -> Architecture:
    return {**SMALL, "text_cfg": {**SMALL["text_cfg"], **more}}


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (_vision(layers=6), "no image tower .*: it has 5 layers, the student 6: give the student 5 at most"),
        (_vision(width=64), "image width 48 there, 64 in the student: give the student 48 at most"),
        (_vision(mlp_ratio=8.0), "image channels 192 there, 256 in the student: give the student 192 at most"),
        (_vision(head_width=8), "its heads have 16 channels, the student's 8, and heads are taken whole: set vision_cfg.head_width"),
        (_vision(pool_type="avg"), "vision_cfg.pool_type = 'tok' there, 'avg' in the student"),
        (_vision(no_ln_pre=True), "it has ln_pre.bias, ln_pre.weight, which the student lacks"),
        (_vision(ls_init_value=0.1), r"it lacks transformer.resblocks.\*.ls_1.gamma"),
        ({**SMALL, "quick_gelu": True}, r"transformer.resblocks.\*.mlp.gelu is a GELU there, a QuickGELU in the student"),
        (_vision(norm_kwargs={"eps": 1e-6}), "vision_cfg.norm_kwargs = None there"),
        ({**SMALL, "embed_dim": 32}, "embedding 24 there, 32 in the student"),
        (_vision(layers=[1, 1, 1, 1], width=8, image_size=64), "no layout of open_clip's ViT, timm's VisionTransformer"),
        (_timm("megakd_small_vit", "avg", "linear", 16), "it lacks head.proj.weight, trunk"),
        (_text(vocab_size=130), "token_embedding.weight has 128 rows there, 130 in the student"),
        (_text(heads=4), "text tower .*its heads have 16 channels, the student's 8, and heads are taken whole: set text_cfg.heads"),
        (_text(no_causal_mask=True), "text_cfg.no_causal_mask = False there, True in the student"),
    ],
)  # fmt: skip
def test_a_model_of_another_family_is_refused_with_the_difference(
    architecture: Architecture, message: str, file: str, tokenizer: Path
) -> None:
    with pytest.raises(ValueError, match=f"student.inherit: an architecture .*{message}"):
        begun(_student(architecture, tokenizer, file))


def test_a_file_that_is_not_the_sources_is_refused(file: str, tokenizer: Path) -> None:
    other = {**LARGE, "vision_cfg": {**VISION, "layers": 4}}
    with pytest.raises(ValueError, match=r"student.inherit: .*not the weights of this architecture. not of this model: visual.transformer"):
        begun(_student(SMALL, tokenizer, file, of=other))
