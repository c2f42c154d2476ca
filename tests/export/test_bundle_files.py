"""bundle.json is believed as far as it was checked: everything is listed, nothing was changed, and what was written is what is read."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megakd import recipe
from megakd.cli import vqa
from megakd.export.bundle import Bundle
from megakd.export.manifest import MANIFEST
from megakd.runtime.files import json_sha256
from support.decoders import CPU, make_decoder, make_towers

TEMPLATE = "USER: {question} ASSISTANT:\n"


@pytest.fixture(scope="module")
def made(world: Path) -> Bundle:
    built = make_towers(world / "tokenizer")
    lora = recipe.Lora(rank=4, alpha=8.0, dropout=0.0)
    module = make_decoder(world / "tokenizer", built.clip.visual, lora=lora, template=TEMPLATE)  # type: ignore[arg-type]
    return Bundle(module, built, 64)


@pytest.fixture(scope="module")
def whole(made: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "bundle"
    made.save(folder, tower_inside=True)
    return folder


@pytest.fixture
def changed(whole: Path, tmp_path: Path) -> Callable[..., Path]:
    def change(edit: Callable[[dict[str, Any]], object], *, sign: bool = True) -> Path:
        folder = Path(shutil.copytree(whole, tmp_path / "bundle"))
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        edit(content)
        if sign:
            content["sha256"] = json_sha256({key: value for key, value in content.items() if key != "sha256"})
        (folder / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
        return folder

    return change


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content["files"].clear(), r"files does not list adapter/adapter_config\.json"),
        (lambda content: content["files"].pop("projector.safetensors"), r"files does not list projector\.safetensors"),
        (lambda content: content["files"].update({"../x": content["files"].pop("tower/open_clip_config.json")}), r"names '\.\./x'"),
        (lambda content: content.update(images=["black"]), r"images = \['black'\]"),
        (lambda content: content.update(images={"cache": "elsewhere"}), "images = {'cache'"),
        (lambda content: content.update(images={"orientation": "up"}), "images.orientation: Input should be 'exif' or 'ignore'"),
        (lambda content: content.update(tower=None), r"files lists (projector|tower)"),
        (lambda content: content.update(max_length=True), "max_length = True"),
        (lambda content: content.update(language={"model": "x"}), "language is neither null nor a model"),
        (lambda content: content.pop("decoder"), "decoder: missing, or not known"),
        (lambda content: content["decoder"].update(image_tokens=3), r"decoder: Value error, image_tokens = 3"),
        (lambda content: content["decoder"].update(colour=3), r"decoder\.colour: Extra inputs are not permitted"),
    ],
)
def test_a_manifest_that_does_not_describe_a_whole_bundle_is_refused(
    edit: Callable[[dict[str, Any]], object], message: str, changed: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match=rf"bundle\.json: .*{message}"):
        Bundle.load(changed(edit), CPU)


def test_a_changed_prompt_is_noticed(changed: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"bundle\.json: damaged \(it was changed after it was written"):
        Bundle.load(changed(lambda content: content["decoder"].update(template="{question}"), sign=False), CPU)


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '{"format": 1e999}', '{"format": ' + "9" * 5000 + "}", '"\\ud800"', '{"format": 1, "format": 1}']
)
def test_json_that_python_would_take_or_fail_on_is_refused(text: str, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "bundle"))
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"bundle\.json: damaged"):
        Bundle.load(folder, CPU)


def test_bundles_of_the_first_format_are_asked_as_they_were_trained(changed: Callable[..., Path], whole: Path) -> None:
    """Their prompts end before the template's white space."""

    def first(content: dict[str, Any]) -> None:
        content.update(format=1)
        del content["prompt"], content["sha256"]

    old, new = Bundle.load(changed(first, sign=False), CPU), Bundle.load(whole, CPU)
    assert (old.rules, new.rules) == (1, 2)
    answers = [one.answer([None], ["how many squares are there ?"], 3) for one in (old, new)]
    assert answers[0] == answers[1], "of whole words, white space is no token"


def test_what_cannot_be_read_back_does_not_take_the_place_of_an_earlier_bundle(made: Bundle, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "bundle"))
    assert made.decoder.projector is not None
    weight = made.decoder.projector.first.weight
    kept = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    try:
        with pytest.raises(ValueError, match=r"projector\.safetensors: first\.weight holds NaN"):
            made.save(folder, tower_inside=True)
    finally:
        with torch.no_grad():
            weight[0, 0] = kept
    Bundle.load(folder, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_another_decoder_than_was_written_is_noticed(made: Bundle, whole: Path, tmp_path: Path) -> None:
    """As if a library lost a weight on the way, or its tokenizer read a word differently."""
    other = Bundle.load(whole, CPU)
    assert other._other_answers(made) == []
    with torch.no_grad():
        next(value for name, value in other.decoder.named_parameters() if "lora_B" in name).add_(1.0)
    assert other._other_answers(made) == ["its logits differ"]
    with pytest.raises(ValueError, match=r"read back as another decoder .*lora_B.* differs"):
        other._check_written(whole, tmp_path / "bundle", ())


def test_a_frozen_tower_that_training_held_in_bf16_is_the_one_that_is_read_back(world: Path, tmp_path: Path) -> None:
    """Loaded, it is float32, so that what it sees differs by rounding: that is no other decoder."""
    built = make_towers(world / "tokenizer")
    module = make_decoder(world / "tokenizer", built.clip.visual, adapt="none")  # type: ignore[arg-type]
    built.clip.bfloat16()
    Bundle(module, built, 24).save(tmp_path / "bundle", tower_inside=True)
    few = Bundle(module, built, module.image_tokens + 2)
    few.save(tmp_path / "short", tower_inside=True)
    assert not any(few._fits(text) for text in ("what colour is it?", "how many?"))


def test_a_bundle_sees_images_as_its_run_did(made: Bundle, whole: Path, tmp_path: Path) -> None:
    """One that was trained by the defaults is written as before there were others."""
    assert "images" not in json.loads((whole / MANIFEST).read_text(encoding="utf-8"))
    otherwise = recipe.Data(orientation="ignore", transparency="black", max_pixels=10_000)
    dataclasses.replace(made, data=otherwise).save(tmp_path / "bundle", tower_inside=True)
    read = Bundle.load(tmp_path / "bundle", CPU)
    assert read.data == recipe.Data(orientation="ignore", transparency="black")
    exif = Image.Exif()
    exif[0x0112] = 3
    clear, file = Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(4, 4, 4), "RGBA"), io.BytesIO()
    clear.save(file, "PNG", exif=exif)
    stored = Image.open(file)
    on_black = Image.alpha_composite(Image.new("RGBA", clear.size, "black"), clear).convert("RGB")
    seen, expected = read.look([stored]), read.look([on_black])
    assert seen is not None
    assert expected is not None
    assert torch.equal(seen, expected)
    assert not torch.equal(seen, Bundle.load(whole, CPU).look([stored]))  # type: ignore[arg-type]


def test_a_question_may_be_longer_than_a_files_name() -> None:
    assert not vqa.is_file("how many red squares are there? " * 200)
    assert vqa.is_file(__file__)
