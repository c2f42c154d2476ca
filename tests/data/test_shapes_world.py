"""The folder that `write_world` leaves: layout, bytes, splits, noise, and what it refuses."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megakd.data.shapes import shards, write_world
from megakd.data.shapes import world as shapes_world
from megakd.data.shapes.pixels import RGB, draw_picture
from megakd.data.shapes.scene import CELLS, COLOURS, HELD_OUT_PAIRS, PAIRS, SHAPES, Thing, is_held_out, scene_graph, scene_of, stream

SETTINGS: dict[str, Any] = {"train": 410, "test": 130, "seed": 7, "caption_noise": 0.3, "shard_size": 200, "zeroshot_per_class": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes") / "world"
    write_world(out, **SETTINGS, processes=1)
    return out


def samples(*tars: Path) -> list[dict[str, Any]]:
    """The samples of some tars in order: extension -> content, and "key"."""
    read: dict[str, dict[str, Any]] = {}
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                data = content.read()
                read.setdefault(key, {"key": key})[extension] = json.loads(data) if extension == "json" else data
    return list(read.values())


def split(world: Path, name: str) -> list[dict[str, Any]]:
    return samples(*sorted((world / name).glob("*.tar")))


def bytes_of(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pairs(sample: dict[str, Any]) -> set[tuple[str, str]]:
    return {(thing["shape"], thing["colour"]) for thing in sample["json"]["scene"]["things"]}


def test_shards_look_like_img2dataset_wrote_them(world: Path) -> None:
    names = [f"0000{shard}{end}" for shard in range(3) for end in (".tar", "_stats.json")]
    assert sorted(path.name for path in (world / "train").iterdir()) == names
    counts = [json.loads((world / "train" / f"0000{shard}_stats.json").read_text()) for shard in range(3)]
    assert [stats["count"] for stats in counts] == [stats["successes"] for stats in counts] == [200, 200, 10]
    with tarfile.open(world / "train" / "00001.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:4]] == ["000010000.jpg", "000010000.txt", "000010000.json", "000010001.jpg"]
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}
    for sample in split(world, "train"):
        assert sample["json"]["key"] == sample["key"]
        assert sample["json"]["caption"] == sample["txt"].decode()


def test_pictures_open_at_the_asked_size_and_keep_their_colours(world: Path) -> None:
    image = Image.open(io.BytesIO(split(world, "test")[0]["jpg"]))
    assert (image.size, image.mode) == ((36, 36), "RGB")
    for number, (shape, colour) in enumerate((shape, colour) for shape in SHAPES for colour in COLOURS):
        for size in ("small", "large"):
            cell = number % len(CELLS)
            picture = draw_picture((Thing(shape, colour, size, cell),), stream(0, "here", number, "pixels"), 32).astype(float)
            row, column = (int((place + 0.5) / 3 * 32) for place in divmod(cell, 3))
            middle = picture[row - 1 : row + 2, column - 1 : column + 2].reshape(-1, 3)
            nearest = min(RGB, key=lambda name: np.abs(middle - RGB[name]).sum(-1).min())
            assert nearest == colour, (shape, colour, size)


def test_image_size_is_a_setting(tmp_path: Path) -> None:
    write_world(tmp_path / "w", train=3, test=2, image_size=48, zeroshot_per_class=1)
    assert Image.open(io.BytesIO(split(tmp_path / "w", "train")[0]["jpg"])).size == (48, 48)


def test_equal_settings_are_equal_bytes_whatever_the_processes(world: Path, tmp_path: Path) -> None:
    other = write_world(tmp_path / "again", **SETTINGS, processes=2)
    assert other.written
    assert bytes_of(tmp_path / "again") == bytes_of(world)


def test_another_seed_is_another_world(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "other", **{**SETTINGS, "seed": 8})
    ours, theirs = ({sample["jpg"] for sample in split(folder, "train")} for folder in (world, tmp_path / "other"))
    assert not ours & theirs


def test_splits_share_no_seed_and_no_picture(world: Path) -> None:
    seeds: Counter[int] = Counter()
    pictures: Counter[bytes] = Counter()
    sets = [split(world, name) for name in ("train", "train_noisy", "test", "held_out", "zeroshot/test", "zeroshot_held_out/test")]
    for sample in (sample for members in sets for sample in members):
        seeds[sample["json"]["sample_seed"]] += 1
        pictures[sample["jpg"]] += 1
    assert len(seeds) == len(pictures) == sum(map(len, sets))


def test_held_out_pairs_stand_in_their_own_set_alone(world: Path) -> None:
    held_out = set(HELD_OUT_PAIRS)
    assert len(held_out) == 7
    assert all((SHAPES.index(shape) + COLOURS.index(colour)) % 6 == 0 for shape, colour in held_out)
    for name in ("train", "train_noisy", "test", "zeroshot/test"):
        assert not any(pairs(sample) & held_out for sample in split(world, name)), name
    assert set().union(*map(pairs, split(world, "zeroshot_held_out/test"))) == held_out
    assert set().union(*map(pairs, split(world, "held_out"))) == held_out


def test_zeroshot_labels_name_the_one_thing_in_the_picture(world: Path) -> None:
    names = (world / "zeroshot/classnames.txt").read_text().splitlines()
    assert len(names) == len(set(names)) == len(PAIRS) == 42
    assert (world / "zeroshot_held_out/classnames.txt").read_text().splitlines() == names
    templates = (world / "zeroshot/zeroshot_classification_templates.txt").read_text().splitlines()
    assert "a red circle" in {template.format(c="red circle") for template in templates}
    assert (world / "zeroshot/test/nshards.txt").read_text().strip() == "1"
    for name, count in (("zeroshot", 70), ("zeroshot_held_out", 14)):
        images = split(world, f"{name}/test")
        assert len(images) == count
        for sample in images:
            ((shape, colour),) = pairs(sample)
            assert names[int(sample["cls"].decode())] == f"{colour} {shape}"


def test_test_captions_are_full_clean_and_each_describes_one_picture(world: Path) -> None:
    test = split(world, "test")
    scenes = {frozenset(tuple(thing.values()) for thing in sample["json"]["scene"]["things"]) for sample in test}
    assert len({sample["txt"] for sample in test}) == len(scenes) == len(test) == SETTINGS["test"]
    assert all(sample["json"]["caption"] == sample["json"]["true_caption"] for sample in test)
    assert {sample["json"]["caption_kind"] for sample in test} == {"full"}
    assert not any(sample["json"]["caption_is_noisy"] for sample in test)
    assert all(sample["txt"].decode() not in sample["json"]["negatives"].values() for sample in test)


def test_training_captions_are_of_every_kind_and_carry_negatives(world: Path) -> None:
    train = split(world, "train")
    assert {sample["json"]["caption_kind"] for sample in train} == {"full", "partial", "relational", "counting", "synonyms"}
    assert sum(bool(sample["json"]["negatives"]) for sample in train) > 0.95 * len(train)


def test_noise_gives_the_asked_fraction_the_caption_of_another(world: Path) -> None:
    train = split(world, "train_noisy")
    noisy = [sample["json"] for sample in train if sample["json"]["caption_is_noisy"]]
    assert len(noisy) == round(0.3 * 410)
    assert Counter(truth["caption"] for truth in noisy) == Counter(truth["true_caption"] for truth in noisy)
    # A short caption such as "a star" may come back by chance; most must not.
    assert sum(truth["caption"] != truth["true_caption"] for truth in noisy) > 0.95 * len(noisy)
    assert all(s["json"]["caption"] == s["json"]["true_caption"] for s in train if not s["json"]["caption_is_noisy"])


def test_noise_moves_captions_and_nothing_else(world: Path, tmp_path: Path) -> None:
    less = write_world(tmp_path / "less", **{**SETTINGS, "caption_noise": 0.1})
    few, many = split(tmp_path / "less", "train_noisy"), split(world, "train_noisy")
    assert less.noisy_captions == 41
    assert [sample["json"]["true_caption"] for sample in few] == [sample["json"]["true_caption"] for sample in many]
    assert [sample["jpg"] for sample in few] == [sample["jpg"] for sample in many]
    assert not any(sample["json"]["caption_is_noisy"] for sample in split(world, "train"))
    everything = shapes_world.WorldSettings(**{**SETTINGS, "image_size": 32, "caption_noise": 1.0})
    ring = shapes_world.exchanged_captions(everything)
    assert sorted(ring) == sorted(ring.values()) == list(range(410))
    assert all(index != source for index, source in ring.items())


def test_no_noise_leaves_the_noisy_split_out(tmp_path: Path) -> None:
    summary = write_world(tmp_path / "clean", **{**SETTINGS, "caption_noise": 0.0})
    assert (summary.train_noisy, summary.noisy_captions) == (0, 0)
    assert not (tmp_path / "clean" / "train_noisy").exists()


def test_hard_groups_are_of_four_that_differ_by_one_thing_and_whose_captions_are_false_of_each_other(tmp_path: Path) -> None:
    summary = write_world(tmp_path / "hard", **{**SETTINGS, "train": 20, "test": 4, "hard": 402}, processes=1)
    assert summary.train_hard == 402
    scenes = [scene_of(7, "train_hard", index) for index in range(402)]
    samples = split(tmp_path / "hard", "train_hard")
    assert [scene_graph(scene) for scene in scenes] == [sample["json"]["scene"] for sample in samples]
    changed = Counter[str]()
    for start in range(0, 400, 4):
        first, *others = scenes[start : start + 4]
        for other in others:
            [(one, two)] = [pair for pair in zip(first, other, strict=True) if pair[0] != pair[1]]
            [attribute] = [name for name in Thing._fields if getattr(one, name) != getattr(two, name)]
            changed[attribute] += 1
        assert len({frozenset(scene) for scene in scenes[start : start + 4]}) == 4
    assert set(changed) == set(Thing._fields)
    assert not any(is_held_out(thing.shape, thing.colour) for scene in scenes for thing in scene)
    assert {sample["json"]["caption_kind"] for sample in samples} == {"full"}


def test_a_world_from_before_there_were_hard_groups_is_found(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "before")
    record = json.loads((world / "world.json").read_text())
    del record["settings"]["hard"], record["counts"]["train_hard"]
    (tmp_path / "before" / "world.json").write_text(json.dumps(record))
    assert not write_world(tmp_path / "before", **SETTINGS).written
    with pytest.raises(ValueError, match=r"holds another world \(hard = 0 there, 8 asked\)"):
        write_world(tmp_path / "before", **SETTINGS, hard=8)


def test_questions_are_vqav2_about_pictures_that_exist(world: Path) -> None:
    for name in ("train", "test", "held_out"):
        questions = json.loads((world / f"questions/{name}_questions.json").read_text())["questions"]
        annotations = json.loads((world / f"questions/{name}_annotations.json").read_text())["annotations"]
        assert [entry["question_id"] for entry in questions] == [entry["question_id"] for entry in annotations]
        assert len({entry["question_id"] for entry in questions}) == len(questions)
        assert {entry["image_id"] for entry in questions} == {int(sample["key"]) for sample in split(world, name)}
        assert set(annotations[0]) >= {"question_type", "answer_type", "multiple_choice_answer", "answers", "image_id"}
        assert all(len(entry["answers"]) == 10 for entry in annotations)


def test_the_summary_and_world_json_count_what_is_there(world: Path) -> None:
    summary = write_world(world, **SETTINGS)
    record = json.loads((world / "world.json").read_text())
    assert (summary.train, summary.test, summary.zeroshot, summary.zeroshot_held_out) == (410, 130, 70, 14)
    assert summary.train_questions == 3 * 410
    assert summary.max_caption_tokens <= 32
    assert summary.vocabulary_size == len(record["vocabulary"])
    assert len(record["held_out_pairs"]) == 7


def test_a_finished_world_is_found_and_not_written_again(world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    assert not write_world(world, **SETTINGS).written
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


def test_a_folder_of_another_world_or_of_other_files_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds another world \(seed = 7 there, 9 asked\).*another folder"):
        write_world(world, **{**SETTINGS, "seed": 9})
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex\)"):
        write_world(tmp_path, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_interrupted_world_is_done_again(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "w"
    done: list[Any] = []

    def interrupted(job: Any) -> Any:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(job)
        return shards.write_pairs(job)

    monkeypatch.setattr(shapes_world, "write_pairs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_world(out, **{**SETTINGS, "shard_size": 50}, processes=1)
    assert not (out / "world.json").exists()
    monkeypatch.undo()
    # Other settings than the interrupted ones: nothing of those may stay.
    assert write_world(out, **SETTINGS, processes=1).written
    assert bytes_of(out) == bytes_of(world)


def test_a_world_that_lost_a_file_says_so(tmp_path: Path) -> None:
    write_world(tmp_path / "w", train=3, test=2)
    for name in ("train/00000.tar", "questions/held_out_annotations.json", "tokenizer/tokenizer.json"):
        kept = (tmp_path / "w" / name).rename(tmp_path / "kept")
        with pytest.raises(ValueError, match=rf"{name} is gone: remove the folder"):
            write_world(tmp_path / "w", train=3, test=2)
        kept.rename(tmp_path / "w" / name)
    for content in ("{", "[]", '{"format_version": 2}'):
        (tmp_path / "w/world.json").write_text(content)
        with pytest.raises(ValueError, match=r"world\.json is damaged .*: remove the folder"):
            write_world(tmp_path / "w", train=3, test=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": 0}, "train = 0: give a whole number from 1"),
        ({"test": 1}, "test = 1: give a whole number from 2"),
        ({"caption_noise": 1.2}, "caption_noise = 1.2"),
        ({"caption_noise": float("nan")}, "caption_noise = nan"),
        ({"caption_noise": 0.003}, "takes two to exchange"),
        ({"image_size": 8}, "image_size = 8"),
        ({"shard_size": 20_000}, "shard_size = 20000: give a whole number from 1 to 10000"),
        ({"train": 2.5}, "train = 2.5"),
        ({"processes": 0}, "processes = 0"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_world(tmp_path / "w", **{**SETTINGS, **change})
    assert not (tmp_path / "w").exists()
