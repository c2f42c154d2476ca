"""The shapes world's text to read from, its questions about held-out pairs, and what becomes of a world of an older format."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_shapes_truth import answer, true

from megakd.data.shapes import write_world
from megakd.data.shapes.questions import FAMILIES
from megakd.data.shapes.reading import CAPTION_EVERY, SPLIT, conversations
from megakd.data.shapes.scene import HELD_OUT_PAIRS, scene_graph, scene_of
from megakd.data.shapes.vocabulary import UNKNOWN, build_tokenizer
from support import edit_json

SETTINGS: dict[str, Any] = {"train": 300, "test": 80, "seed": 7, "shard_size": 200, "zeroshot_per_class": 2}
# Captions and scenes (not pictures, whose bytes are also Pillow's) that SETTINGS gave in format 1, at commit 8aefbf2.
OLD_WORDS = "5cee3f0873afbf9207edbe18037a940e994b4b7efe5fd64a575cb4c028d058e8"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("shapes") / "world", **SETTINGS).out


@pytest.fixture(scope="module")
def text(world: Path) -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = json.loads((world / "questions/train_text.json").read_text())
    return read


def words(world: Path) -> str:
    digest = hashlib.sha256()
    for name in ("train/00000.tar", "train/00001.tar", "test/00000.tar"):
        with tarfile.open(world / name) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None and not member.name.endswith(".jpg"):
                    digest.update(content.read())
    return digest.hexdigest()


def turns(entry: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(family, human, gpt) of each turn."""
    said = entry["conversations"]
    assert [turn["from"] for turn in said] == ["human", "gpt"] * len(entry["families"])
    return [(family, said[2 * n]["value"], said[2 * n + 1]["value"]) for n, family in enumerate(entry["families"])]


def test_every_answer_follows_from_the_caption_before_its_question(text: list[dict[str, Any]]) -> None:
    """The oracle answers from the scene's graph, and the caption tells all of it."""
    spoken = [turns(entry)[0] for entry in text if entry["families"] == ["caption"]]
    asked = [turns(entry) for entry in text if entry["families"] != ["caption"]]
    assert len(asked) == SETTINGS["train"]
    for scene, conversation in enumerate(asked):
        graph: Any = scene_graph(scene_of(7, SPLIT, scene))
        caption = conversation[0][1].partition(" . ")[0]
        assert true(caption, graph)
        assert caption.count(" at the ") == len(graph["things"])
        for number, (_, human, gpt) in enumerate(conversation):
            assert answer(human.removeprefix(f"{caption} . ") if number == 0 else human, graph) == gpt
        if scene % CAPTION_EVERY == 0:
            assert spoken[scene // CAPTION_EVERY] == ("caption", "", caption)
    assert len(spoken) == SETTINGS["train"] / CAPTION_EVERY


def test_text_has_every_family_and_relations_most(text: list[dict[str, Any]]) -> None:
    asked = [turn for entry in text for turn in turns(entry)]
    families = Counter(family for family, *_ in asked)
    assert set(families) == {*FAMILIES, "caption"}
    assert families.most_common(1)[0][0] == "relation"
    assert sum(families.values()) > 3.5 * SETTINGS["train"]
    yes = Counter(gpt for family, _, gpt in asked if family == "relation")
    assert 0.4 < yes["yes"] / yes.total() < 0.6


def test_text_is_in_the_vocabulary_names_no_held_out_pair_and_shares_no_scene_stream(text: list[dict[str, Any]]) -> None:
    tokenizer = build_tokenizer()
    for entry in text:
        for turn in entry["conversations"]:
            assert UNKNOWN not in tokenizer.encode(turn["value"]).tokens
            assert not any(f"{colour} {shape}" in turn["value"] for shape, colour in HELD_OUT_PAIRS)
    assert [scene_of(7, SPLIT, index) for index in range(20)] != [scene_of(7, "train", index) for index in range(20)]


def test_a_longer_text_begins_with_the_shorter_one() -> None:
    assert list(conversations(3, 8))[:7] == list(conversations(3, 5))


def test_held_out_questions_are_about_scenes_of_held_out_pairs_alone(world: Path) -> None:
    held_out = {f"{colour} {shape}" for shape, colour in HELD_OUT_PAIRS}
    annotations = json.loads((world / "questions/held_out_annotations.json").read_text())["annotations"]
    questions = json.loads((world / "questions/held_out_questions.json").read_text())["questions"]
    assert {pair for entry in annotations for pair in entry["held_out_pairs"]} == held_out
    assert all(entry["held_out_pairs"] for entry in annotations)
    for asked, answered in zip(questions, annotations, strict=True):
        graph = scene_graph(scene_of(7, "held_out", asked["image_id"]))
        assert asked["question_id"] == answered["question_id"]
        assert answer(asked["question"], graph) == answered["multiple_choice_answer"]
    assert {entry["question_type"] for entry in annotations} == set(FAMILIES)
    for split in ("train", "test"):
        assert "held_out_pairs" not in (world / f"questions/{split}_annotations.json").read_text()


def test_an_older_world_of_these_settings_is_completed_and_its_pictures_stay(world: Path, tmp_path: Path) -> None:
    assert words(world) == OLD_WORDS
    out = tmp_path / "w"
    write_world(out, **SETTINGS)
    record = json.loads((out / "world.json").read_text())
    edit_json(out / "world.json", format_version=1)
    (out / "questions/train_text.json").unlink()
    assert write_world(out, **SETTINGS).written
    assert json.loads((out / "world.json").read_text()) == record
    assert (out / "questions/train_text.json").read_bytes() == (world / "questions/train_text.json").read_bytes()
    edit_json(out / "world.json", format_version=99)
    with pytest.raises(ValueError, match="format_version = 99 there, 2 asked"):
        write_world(out, **SETTINGS)
