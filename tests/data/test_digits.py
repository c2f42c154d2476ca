"""The world of handwritten digits: what captions and questions say is what the labels are, and unseen writing is unseen."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from open_clip.tokenizer import HFTokenizer
from PIL import Image

from megakd.data.digits import CELLS, TOKENS, UNSEEN_EVERY, WORDS, DigitsWorld, write_digits
from megakd.recipe.load import load_recipe
from megakd.study import launcher

SIZES = {"train": 60, "test": 40}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> DigitsWorld:
    return write_digits(tmp_path_factory.mktemp("digits") / "world", **SIZES)


def samples(tar: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as file:
        for member in file:
            key, _, extension = member.name.partition(".")
            content = file.extractfile(member)
            assert content is not None
            found.setdefault(key, {})[extension] = content.read()
    return found


def scene_of(sample: dict[str, bytes]) -> list[dict[str, Any]]:
    return json.loads(sample["json"])["scene"]  # type: ignore[no-any-return]


def questions(world: DigitsWorld, split: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    asked, answered = (
        json.loads((world.folder / "questions" / f"{split}_{name}.json").read_text())[name] for name in ("questions", "annotations")
    )
    assert [one["question_id"] for one in asked] == [one["question_id"] for one in answered]
    return list(zip(asked, answered, strict=True))


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_and_negatives_say_what_the_labels_are(world: DigitsWorld, split: str) -> None:
    for sample in samples(world.folder / split / "00000.tar").values():
        told = {f"a {WORDS[one['digit']]} at the {CELLS[one['cell']]}" for one in scene_of(sample)}
        caption = sample["txt"].decode()
        assert set(caption.split(", ")) == told
        false = json.loads(sample["json"])["negatives"]
        assert all(set(text.split(", ")) != told for text in false.values())


def test_writing_of_the_test_pictures_is_in_no_training_picture(world: DigitsWorld) -> None:
    seen, unseen = (
        {one["writing"] for sample in samples(world.folder / split / "00000.tar").values() for one in scene_of(sample)}
        for split in ("train", "test")
    )
    assert not seen & unseen
    assert all(writing % UNSEEN_EVERY == 0 for writing in unseen)


def test_a_picture_is_dark_but_for_the_cells_of_its_digits(world: DigitsWorld, tmp_path: Path) -> None:
    for key, sample in list(samples(world.folder / "test" / "00000.tar").items())[:10]:
        path = tmp_path / f"{key}.jpg"
        path.write_bytes(sample["jpg"])
        picture = Image.open(path).convert("L")
        cells = {one["cell"] for one in scene_of(sample)}
        bright = {
            cell
            for cell in range(9)
            if max(picture.crop((cell % 3 * 12, cell // 3 * 12, cell % 3 * 12 + 12, cell // 3 * 12 + 12)).getdata()) > 128
        }
        assert bright == cells


def test_answers_are_true_and_every_family_is_asked(world: DigitsWorld) -> None:
    scenes = {int(key): scene_of(sample) for key, sample in samples(world.folder / "train" / "00000.tar").items()}
    families: Counter[str] = Counter()
    for question, annotation in questions(world, "train"):
        scene, text, answer = scenes[question["image_id"]], question["question"], annotation["multiple_choice_answer"]
        families[annotation["question_type"]] += 1
        at = {CELLS[one["cell"]]: WORDS[one["digit"]] for one in scene}
        asked = text.removeprefix("which digit is at the ").removeprefix("is there a ").removeprefix("where is the ").rstrip("?")
        truth = {
            "digit": at.get(asked),
            "count": str(len(scene)),
            "existence": "yes" if asked in at.values() else "no",
            "largest": WORDS[max(one["digit"] for one in scene)],
            "position": next((cell for cell, word in at.items() if word == asked), None),
        }
        assert answer == truth[annotation["question_type"]]
        assert {one["answer"] for one in annotation["answers"]} == {answer}
    assert len(families) == 5
    assert sum(families.values()) == 3 * SIZES["train"]


def test_half_of_the_noisy_captions_belong_to_other_pictures(world: DigitsWorld) -> None:
    wrong = 0
    for sample in samples(world.folder / "train_noisy" / "00000.tar").values():
        told = {f"a {WORDS[one['digit']]} at the {CELLS[one['cell']]}" for one in scene_of(sample)}
        wrong += set(sample["txt"].decode().split(", ")) != told
    assert 0.4 * SIZES["train"] < wrong <= 0.5 * SIZES["train"]


def test_the_tokenizer_knows_every_word_and_the_longest_caption_fits(world: DigitsWorld) -> None:
    tokenizer = HFTokenizer(str(world.folder / "tokenizer"), context_length=TOKENS)
    unknown = tokenizer.tokenizer.unk_token_id
    texts = [sample["txt"].decode() for sample in samples(world.folder / "train" / "00000.tar").values()]
    texts += [question["question"] for question, _ in questions(world, "test")]
    for text in texts:
        ids = tokenizer.tokenizer(text)["input_ids"]
        assert unknown not in ids, text
        assert len(ids) <= TOKENS


def test_equal_settings_are_equal_bytes_and_a_world_that_is_there_is_kept(world: DigitsWorld, tmp_path: Path) -> None:
    write_digits(tmp_path / "again", **SIZES)
    sums = [
        {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        for folder in (world.folder, tmp_path / "again")
    ]
    assert sums[0] == sums[1]
    assert not write_digits(world.folder, **SIZES).written
    with pytest.raises(ValueError, match="holds another world"):
        write_digits(world.folder, train=61, test=40)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "file").touch()
    with pytest.raises(ValueError, match="is there already and no world"):
        write_digits(tmp_path / "strange", **SIZES)
    with pytest.raises(ValueError, match="train = 1: give a whole number"):
        write_digits(tmp_path / "none", train=1, test=40)


@pytest.mark.parametrize("recipe", ["smoke", "smoke_teacher", "vqa_lora"])
def test_the_shipped_recipes_read_it_in_the_place_of_the_shapes(world: DigitsWorld, recipe: str) -> None:
    moved = load_recipe(recipe, launcher.moved(recipe, world.folder))
    assert moved.student is not None
    assert Path(moved.student.tokenizer or "").is_dir()
    assert {Path(folder).is_dir() for folder in moved.evaluation.zero_shot.values()} <= {True}
