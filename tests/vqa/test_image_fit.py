"""`decoder.image_fit`: what of a 4:3 photograph a tower is shown, in training, evaluation, bundles and LLaVA's processor alike."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from open_clip.transform import PreprocessCfg
from PIL import Image
from transformers import PreTrainedTokenizerBase

from megakd.data.image_fit import fitted_pixels, padded
from megakd.data.transforms import as_rgb, evaluation_pixels
from megakd.export import llava_folder
from megakd.export.bundle import Bundle, resolve_bundle
from megakd.recipe import Data, Decoder, Recipe
from megakd.recipe.resume import change
from megakd.recipe.vqa import ImageFit
from megakd.vqa import loader
from megakd.vqa.loader import ImageProcessor
from megakd.vqa.prompts import PromptEncoder
from megakd.vqa.sets import question_order
from support.decoders import CPU, make_decoder, make_towers
from support.questions import mixture, source, talk, write

SQUARE = PreprocessCfg(size=(48, 48), mean=(0.48, 0.46, 0.41), resize_mode="shortest")
MEAN = (122, 117, 104)  # of 0 to 255, rounded down
FITS: tuple[ImageFit, ...] = ("tower", "pad", "squash")


def photograph(width: int = 160, height: int = 120) -> Image.Image:
    """Grey, red at its left edge and blue at its right one, a fourteenth of its width each."""
    picture = Image.new("RGB", (width, height), (90, 120, 90))
    picture.paste((250, 0, 0), (0, 0, width // 14, height))
    picture.paste((0, 0, 250), (width - width // 14, 0, width, height))
    return picture


def sees(pixels: Any, channel: int) -> bool:
    """Whether there is a pixel of this colour."""
    others = np.delete(pixels.astype(int), channel, axis=0).max(axis=0)
    return bool(((pixels[channel] > 200) & (others < 80)).any())


def test_pad_is_a_square_of_the_mean_colour_around_the_whole_picture_then_resized() -> None:
    for width, height in ((160, 120), (120, 160), (101, 50)):
        picture, side = photograph(width, height), max(width, height)
        square = Image.new("RGB", (side, side), MEAN)
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        expected = np.asarray(square.resize((48, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert np.array_equal(fitted_pixels(picture, SQUARE, "pad"), expected)
    assert (fitted_pixels(photograph(), SQUARE, "pad")[:, :4] == np.array(MEAN)[:, None, None]).all()


def test_the_edges_of_a_photograph_are_seen_padded_and_squashed_and_cut_off_by_the_towers_crop() -> None:
    seen = {fit: fitted_pixels(photograph(), SQUARE, fit) for fit in FITS}
    assert np.array_equal(seen["tower"], evaluation_pixels(photograph(), SQUARE))
    assert {fit: (sees(pixels, 0), sees(pixels, 2)) for fit, pixels in seen.items()} == {
        "tower": (False, False),
        "pad": (True, True),
        "squash": (True, True),
    }
    assert np.array_equal(seen["squash"], np.asarray(photograph().resize((48, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1))


def test_a_tower_that_is_no_square_is_padded_to_its_own_proportions_and_a_thin_picture_within_memory() -> None:
    assert padded(photograph(), (24, 48), MEAN).size == (240, 120)
    assert padded(photograph(160, 80), (24, 48), MEAN).size == (160, 80)
    thin = padded(Image.new("RGB", (60_000, 400), "red"), (48, 48), MEAN)
    assert thin.width == thin.height
    assert thin.width**2 <= 2**26


@pytest.fixture(scope="module")
def stored() -> bytes:
    buffer = io.BytesIO()
    photograph().save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("fit", FITS)
def test_training_evaluation_and_a_bundle_show_the_same_pixels(
    fit: ImageFit, stored: bytes, shapes: PreTrainedTokenizerBase, world: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.png").write_bytes(stored)
    entries = write(tmp_path / "l.json", [{"id": "1", "image": "one.png", "conversations": talk("what is it?", "red")}])
    questions = mixture(mine=source("llava", questions=entries, images=tmp_path / "images"))
    towers = make_towers(world / "tokenizer")
    encoder = PromptEncoder(shapes, Decoder(model="any", template="{question} ", instruction="", image_fit=fit), 4, 32)
    eyes = ImageProcessor(towers.preprocess, Data(), fit)
    at = {"rank": 0, "world": 1, "workers": 0, "start_position": 0, "pin_memory": False}
    with loader.question_batches(questions, question_order(questions, 1, seed=0), encoder, eyes, **at) as batches:  # type: ignore[arg-type]
        trained = next(iter(batches)).pixels
    assert trained is not None
    (asked,) = loader.evaluation_questions(questions, [0], encoder, eyes, batch=1, workers=0, pin_memory=False)
    assert asked.pixels is not None
    assert torch.equal(trained, asked.pixels)
    made = Bundle(make_decoder(world / "tokenizer", towers.clip.visual, image_fit=fit).eval(), towers, 64)
    made.save(tmp_path / "bundle", tower_inside=True)
    read = Bundle.load(tmp_path / "bundle", CPU)
    assert resolve_bundle(tmp_path / "bundle").decoder.settings.image_fit == fit
    assert np.array_equal(read.pixels(photograph()), trained[0].numpy())
    assert read.pixels(photograph()).tobytes() == fitted_pixels(as_rgb(photograph(), Data()), towers.preprocess, fit).tobytes()


@pytest.mark.parametrize(("fit", "kind"), [("pad", "LlavaImageProcessor"), ("squash", "SiglipImageProcessor")])
def test_the_processor_of_a_llava_folder_fits_pictures_as_the_bundle_does(fit: ImageFit, kind: str, world: Path, tmp_path: Path) -> None:
    towers = make_towers(world / "tokenizer")
    decoder = make_decoder(world / "tokenizer", towers.clip.visual, image_fit=fit, image_tokens=0, template="USER: {question} ASSISTANT:")
    Bundle(decoder.eval(), towers, 64).save(tmp_path / "bundle", tower_inside=True)
    (tmp_path / "out").mkdir()
    llava_folder.write(tmp_path / "bundle", tmp_path / "out")
    processor: Any = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(processor.image_processor).__name__.startswith(kind)
    theirs = processor.image_processor(images=[photograph()], return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (towers.preprocess.mean, towers.preprocess.std))
    levels = ((theirs * std + mean) * 255 - torch.from_numpy(Bundle.load(tmp_path / "bundle", CPU).pixels(photograph()).copy())).abs()
    assert float(levels.mean()) < 1
    cropped = ((theirs * std + mean) * 255 - torch.from_numpy(evaluation_pixels(photograph(), towers.preprocess).copy())).abs()
    assert float(cropped.mean()) > 5


def test_it_is_refused_where_no_picture_is_seen_and_in_a_resumed_run() -> None:
    blind = {
        "name": "blind",
        "decoder": {"model": "any", "image_fit": "pad"},
        "answers": {"train": {"a": {"format": "llava", "questions": "q.json"}}},
        "objectives": {"contrastive": 0.0},
        "optim": {"steps": 1, "batch": 1, "lr": 1e-3},
    }
    with pytest.raises(ValueError, match=r"decoder\.image_fit = 'pad': without \[student\] the decoder sees no picture; take it out"):
        Recipe.model_validate(blind)
    with pytest.raises(ValueError, match="image_fit"):
        Decoder(model="any", image_fit="crop")  # type: ignore[arg-type]
    assert change("decoder.image_fit") == "refused"
