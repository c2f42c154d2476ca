"""Folders of images as evaluation sets: one for each class, or with a file of captions or hard negatives, scored as shards of the same."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from torchvision.datasets import ImageFolder

from megakd.evaluation import class_folders
from megakd.evaluation.sets import Sets, open_sets
from megakd.recipe import Data
from megakd.recipe import load as recipes
from megakd.runtime.launch import World
from support import PROGRAMS
from support.numbered_pictures import Reader, picture, recipe, results, scores
from support.runs import run_ranks
from support.shards import write_tar

TEMPLATES = "zeroshot_classification_templates.txt"


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def classes(folder: Path, images: dict[str, list[int]], names: list[str] | None = None) -> Path:
    """A folder for each class, with pictures of these numbers."""
    for name, numbers in images.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for place, number in enumerate(numbers):
            put(folder / name / f"{place:03d}.PNG", picture(number))
    if names is not None:
        (folder / "classnames.txt").write_text("\n".join(names))
        (folder / TEMPLATES).write_text("{c} it is\n{c}\n")
    return folder


def opened(**evaluation: Any) -> Sets:
    return open_sets(recipe(**evaluation), World(0, 1, torch.device("cpu")))


def test_class_folders_score_as_shards_of_the_same_images(tmp_path: Path) -> None:
    names = ["0", "1", "2", "3"]
    classes(tmp_path / "images" / "val", {"b": [0, 0, 1], "c": [1], "d": [2, 5, 2], "e": [3]})
    (tmp_path / "images" / "classnames.txt").write_text("\n".join(names))
    (tmp_path / "images" / TEMPLATES).write_text("{c} it is\n{c}\n")
    put(tmp_path / "images" / "val" / "d" / "deeper" / "x.jpeg", b"damaged")
    put(tmp_path / "images" / "val" / "d" / "notes.txt", b"")
    put(tmp_path / "images" / "val" / "d" / ".DS_Store", b"")
    labelled = [(0, 0), (0, 0), (1, 0), (1, 1), (2, 2), (5, 2), (2, 2), (None, 2), (3, 3)]
    members = [
        (f"{place:02d}.{kind}", data)
        for place, (number, label) in enumerate(labelled)
        for kind, data in (("png", b"damaged" if number is None else picture(number)), ("cls", b"%d" % label))
    ]
    write_tar(tmp_path / "tars" / "test" / "0.tar", members)
    for file in ("classnames.txt", TEMPLATES):
        (tmp_path / "tars" / file).write_text((tmp_path / "images" / file).read_text())
    both = {"images": str(tmp_path / "images"), "tars": str(tmp_path / "tars")}
    found = results(recipe(0.5, zero_shot=both))["zero_shot"]
    assert f"names: {tmp_path}/images/classnames.txt" in found["images"].pop("classes")
    assert found["images"] == found["tars"]
    assert (found["tars"]["images"], found["tars"]["unreadable"], found["tars"]["top1"]) == (9, 1, 6 / 9)
    assert found["tars"]["mean_per_class_recall"] == pytest.approx((2 / 3 + 1 + 2 / 4 + 1) / 4)
    with pytest.raises(ValueError, match=r"evaluation\.zero_shot\.mine: 1 of 9 samples are unusable.*corrupt_image.*deeper/x\.jpeg"):
        results(recipe(zero_shot={"mine": str(tmp_path / "images")}))


def test_two_ranks_score_a_folder_as_one(tmp_path: Path) -> None:
    folder = classes(tmp_path / "set", {"b": [0] * 5, "c": [1] * 9, "d": [2, 5, 7]}, ["0", "1", "2"])
    put(folder / "b" / "x.jpg", b"damaged")
    evaluation = {"zero_shot": {"mine": str(folder)}, "batch": 4}
    wanted = recipe(0.5, **evaluation)
    alone = scores(wanted)
    put(folder / "b" / "x.jpg", picture(0))
    assert scores(wanted)["zero_shot"]["mine"]["top1"] > alone["zero_shot"]["mine"]["top1"]
    whole = scores(recipe(**evaluation))
    said = run_ranks(PROGRAMS / "numbered_sets.py", json.dumps(evaluation), "")
    assert [one.strip().splitlines()[-1] for one in said] == [f"FOUND {whole}"] * 2
    said = run_ranks(PROGRAMS / "numbered_sets.py", json.dumps({"zero_shot": {"mine": str(tmp_path / "nowhere")}}), "")
    assert said[0] == said[1]
    assert "ERROR evaluation.zero_shot.mine" in said[0]


def test_the_order_is_that_of_torchvision(tmp_path: Path) -> None:
    classes(tmp_path, {"b_2": [1, 2], "B": [3], "a": [4, 5, 6]})
    put(tmp_path / "a" / "z" / "1.jpg", picture(1))
    put(tmp_path / "a" / "b" / "1.webp", picture(1))
    theirs = ImageFolder(str(tmp_path))
    images, names = class_folders.open_classes(tmp_path, Data())
    assert names == theirs.classes
    ours = [(images.where(index), int(images.read(index, ("cls",)).members["cls"])) for index in range(len(images))]
    assert ours == theirs.samples


def test_folders_of_imagenet_have_open_clips_names_and_templates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wordnet = classes(tmp_path / "ids" / "val", {"n01443537": [1], "n01440764": [0], "n15075141": [2]}).parent
    numbers = classes(tmp_path / "v2", {str(number): [number] for number in range(1000)})
    with caplog.at_level(logging.WARNING):
        found = opened(zero_shot={"some": str(wordnet), "v2": str(numbers)}).zero_shot
    assert found["some"][1].names == ["tench", "goldfish", "toilet paper"]
    assert found["some"][1].templates == [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES]
    samples, names = found["v2"]
    assert int(samples.read(2, ("cls",)).members["cls"]) == 2
    assert samples.where(2).split("/")[-2] == "10"  # sorted as texts, as ImageFolder
    assert names.names[2] == IMAGENET_CLASSNAMES[10]
    assert f"classes are the folders of {wordnet}/val; their names: open_clip's names of ImageNet's classes (tench, goldfish" in caplog.text


def test_other_folders_are_named_by_their_names_which_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = classes(tmp_path, {"polar_bear": [1], "ice bear": [2], "empty": []})
    with caplog.at_level(logging.WARNING):
        _, found = opened(zero_shot={"mine": str(folder)}).zero_shot["mine"]
    assert found.names == ["empty", "ice bear", "polar bear"]
    assert len(found.templates) == 7
    assert "their names: the folders' names (empty, ice bear, ...); templates: open_clip's 7 simple ones" in caplog.text
    assert "1 class folders hold no image; they stay classes: empty" in caplog.text


@pytest.mark.parametrize(
    ("images", "names", "message"),
    [
        ({"val/a": [1], "val/b": [1], "test/a": [1], "test/b": [1]}, None, "has class folders in val and in test: name one of them"),
        ({"a": [1]}, None, r"one class folder \(a\)"),
        ({".": [1], "a": [1], "b": [1]}, None, r"1 images lie beside the class folders \(000\.PNG\)"),
        ({"a": [1], "b": [2]}, ["x"], "classnames.txt has 1 lines, and there are 2 class folders"),
        ({"n00000001": [1], "n01440764": [2]}, None, "n00000001 is a WordNet id that is none of ImageNet's 1000 classes"),
        ({"a": [], "b": []}, None, "no classnames.txt there; .* or a folder of images for each class"),
    ],
)
def test_folders_that_are_no_set_are_one_message(
    tmp_path: Path, images: dict[str, list[int]], names: list[str] | None, message: str
) -> None:
    folder = classes(tmp_path, images, names)
    with pytest.raises(ValueError, match=r"^evaluation\.zero_shot\.mine.*" + message):
        opened(zero_shot={"mine": str(folder)})


def test_a_link_to_a_folder_above_it_is_refused_and_other_links_are_followed(tmp_path: Path) -> None:
    folder = classes(tmp_path / "set", {"a": [1, 2], "b": [3]})
    classes(tmp_path / "elsewhere", {"c": [4, 5]})
    (folder / "c").symlink_to(tmp_path / "elsewhere" / "c", target_is_directory=True)
    (folder / "a" / "more").symlink_to(folder / "b", target_is_directory=True)
    images, names = class_folders.open_classes(folder, Data())
    assert (len(images), names) == (6, ["a", "b", "c"])
    (folder / "a" / "again").symlink_to(folder, target_is_directory=True)
    with pytest.raises(ValueError, match="a/again: a link to a folder that it lies in; take it out"):
        class_folders.open_classes(folder, Data())


def captions_of(number: int) -> list[str]:
    return [f"{number} {word}\n" for word in "abc"[: 1 + number % 3]]


def karpathy(folder: Path, numbers: range, **more: Any) -> dict[str, Any]:
    """Numbered pictures in FOLDER/val2014 and a file as Karpathy's; the settings of the set."""
    images = []
    for number in numbers:
        put(folder / "val2014" / f"{number:03d}.png", picture(number))
        sentences = [{"raw": raw, "tokens": raw.split()} for raw in captions_of(number)]
        images.append({"filepath": "val2014", "filename": f"{number:03d}.png", "split": "test", "sentences": sentences, "imgid": number})
    images.append({"filepath": "train2014", "filename": "elsewhere.png", "split": "train", "sentences": []})
    (folder / "dataset.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return {"annotations": str(folder / "dataset.json"), "images": str(folder), **more}


def test_karpathys_and_cocos_captions_score_as_shards_of_the_same(tmp_path: Path) -> None:
    files = karpathy(tmp_path, range(20))
    inside = {**files, "images": str(tmp_path / "val2014"), "split": "test"}
    images = [{"id": 100 + number, "file_name": f"{number:03d}.png"} for number in range(21)]
    put(tmp_path / "val2014" / "020.png", picture(20))
    captions = [{"id": 0, "image_id": 100 + number, "caption": text} for number in range(20) for text in captions_of(number)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions, "info": {}}))
    coco = {"annotations": str(tmp_path / "captions.json"), "images": str(tmp_path / "val2014")}
    members = [
        (f"{number:03d}.{kind}", data)
        for number in range(20)
        for kind, data in (("png", picture(number)), ("txt", "\n".join(text.strip() for text in captions_of(number)).encode()))
    ]
    write_tar(tmp_path / "tars" / "0.tar", members)
    wanted = recipe(retrieval={"files": files, "inside": inside, "coco": coco, "tars": f"{tmp_path}/tars/*.tar"})
    for model in (Reader(), Reader(blind=True)):
        found = results(wanted, model)["retrieval"]
        assert found["files"] == found["inside"] == found["coco"] == found["tars"]
    assert (found["tars"]["images"], found["tars"]["pairs"]) == (20, 39)
    put(tmp_path / "val2014" / "003.png", b"damaged")
    found = results(recipe(0.1, retrieval={"files": files}))["retrieval"]["files"]
    assert (found["images"], found["pairs"], found["unreadable"]) == (20, 39, 1)
    assert found["image_to_text"]["R@1"] == pytest.approx(19 / 20)


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (None, {"split": "val"}, r"has no image of split = 'val'; it has test \(4 images\), train \(1 images\)"),
        (None, {"split": "train"}, r"image 4 has no caption; the layouts that are read: Karpathy's"),
        (None, {"images": "{folder}/nowhere"}, "nowhere' is no folder"),
        (None, {"images": "{folder}/empty"}, "lacks 4 images"),
        (None, {"annotations": "{folder}/nowhere.json"}, "nowhere.json: no such file"),
        ([], {}, r"is of no layout that annotations may have \(it is a list\): Karpathy's"),
        ({"images": [{"filename": 3, "split": "test"}]}, {}, 'image 0 has "filename" = 3: a text is expected; the layouts'),
        ({"images": [{"file_name": "a"}]}, {}, 'has "split" = None'),
        ({"images": [{"filename": "../a", "split": "test", "sentences": [{"raw": "x"}]}]}, {}, "from outside images"),
        ({"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2, "caption": "x"}]}, {}, '"image_id" = 2, which is no'),
        ({"images": [{"id": 1, "file_name": "a"}], "annotations": []}, {"split": "test"}, "one split a file: take split out"),
    ],
)
def test_files_of_captions_that_do_not_fit_are_one_message(tmp_path: Path, content: Any, settings: dict[str, str], message: str) -> None:
    files = karpathy(tmp_path, range(4))
    (tmp_path / "empty").mkdir()
    if content is not None:
        (tmp_path / "dataset.json").write_text(json.dumps(content))
    files |= {key: value.format(folder=tmp_path) for key, value in settings.items()}
    with pytest.raises(ValueError, match=r"^evaluation\.retrieval\.mine: .*" + message):
        opened(retrieval={"mine": files})


def sugarcrepe(folder: Path) -> dict[str, Any]:
    def entry(number: int, false: str) -> dict[str, str]:
        return {"filename": f"{number}.png", "caption": f"{number} is there", "negative_caption": false}

    for number in range(6):
        put(folder / "images" / f"{number}.png", picture(number))
    own = {"add_att": {"0": entry(0, "9 x"), "1": entry(1, "1 x"), "7": entry(2, "9 y")}, "swap_obj": {"0": entry(5, "9 x")}}
    for kind, entries in own.items():
        put(folder / "data" / f"{kind}.json", json.dumps(entries).encode())
    return {"annotations": str(folder / "data"), "images": str(folder / "images")}


def test_sugarcrepes_files_are_kinds(tmp_path: Path) -> None:
    found = results(recipe(hard_negatives={"crepe": sugarcrepe(tmp_path)}))["hard_negatives"]["crepe"]
    assert found == {
        "mean of kinds": {"accuracy": (2 / 3 + 1) / 2, "kinds": 2, "pairs": 4, "unreadable": 0},
        "add_att": {"accuracy": 2 / 3, "pairs": 3, "unreadable": 0},
        "swap_obj": {"accuracy": 1.0, "pairs": 1, "unreadable": 0},
    }
    put(tmp_path / "images" / "0.png", b"damaged")
    found = results(
        recipe(0.5, hard_negatives={"crepe": sugarcrepe(tmp_path) | {"annotations": [str(tmp_path / "data" / "add_att.json")]}})
    )
    assert found["hard_negatives"]["crepe"]["add_att"]["pairs"] == 3
    put(tmp_path / "images" / "0.png", b"damaged")
    found = results(recipe(0.5, hard_negatives={"crepe": {"annotations": str(tmp_path / "data"), "images": str(tmp_path / "images")}}))
    assert found["hard_negatives"]["crepe"]["add_att"] == {"accuracy": 1 / 3, "pairs": 3, "unreadable": 1}
    assert found["hard_negatives"]["crepe"]["swap_obj"] == {"accuracy": 1.0, "pairs": 1, "unreadable": 0}


def framed(number: int) -> bytes:
    """The numbered picture at (5, 3) of a larger one of another colour."""
    canvas = Image.new("RGB", (40, 30), "red")
    canvas.paste(Image.open(io.BytesIO(picture(number))), (5, 3))
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()


def test_aros_images_are_cut_to_their_box_and_kinds_are_relations_or_attributes(tmp_path: Path) -> None:
    def entry(number: int, false: str, **more: Any) -> dict[str, Any]:
        put(tmp_path / "images" / f"{number}.png", framed(number))
        box = {"bbox_x": 5, "bbox_y": 3, "bbox_w": 16, "bbox_h": 16}
        return {"image_path": f"{number}.png", "true_caption": f"{number} is", "false_caption": false, **box, **more}

    relation = [entry(number, "9 is" if number % 2 else f"{number} is", relation_name="above") for number in range(4)]
    relation.append(entry(4, "9 is", relation_name="below"))
    attribution = [entry(5, "9", attributes=["red", "old"])] + [entry(number % 6, "9", attributes=["new", "big"]) for number in range(26)]
    attribution[0]["false_caption"] = "5"
    for name, entries in (("visual_genome_relation", relation), ("visual_genome_attribution", attribution)):
        put(tmp_path / f"{name}.json", json.dumps(entries).encode())
    sets = {
        name: {"annotations": str(tmp_path / f"visual_genome_{name}.json"), "images": str(tmp_path / "images")}
        for name in ("relation", "attribution")
    }
    found = results(recipe(hard_negatives=sets))["hard_negatives"]
    assert found["relation"]["above"] == {"accuracy": 0.5, "pairs": 4, "unreadable": 0, "same_as_caption": 2}
    assert found["relation"]["below"] == {"accuracy": 1.0, "pairs": 1, "unreadable": 0}
    assert found["relation"]["mean of kinds"]["accuracy"] == 0.75
    assert found["attribution"]["red_old"]["accuracy"] == 0.0
    # of fewer than 25 pairs, which ARO does not report
    assert found["attribution"]["mean of kinds"] == {"accuracy": 1.0, "kinds": 1, "pairs": 27, "unreadable": 0}


def test_orders_have_several_false_captions(tmp_path: Path) -> None:
    files = sugarcrepe(tmp_path)
    cases = [{"image": f"{number}.png", "caption_options": [f"{number} a", "9", "8", "0", "7"]} for number in range(4)]
    put(tmp_path / "coco_order.json", json.dumps(cases).encode())
    found = results(recipe(hard_negatives={"order": files | {"annotations": str(tmp_path / "coco_order.json")}}))["hard_negatives"]["order"]
    assert found["coco_order"] == {"accuracy": 3 / 4, "pairs": 4, "unreadable": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, r"is of no layout that annotations may have \(it has images\): SugarCrepe's"),
        ([], r"is of no layout that annotations may have \(it is a list\)"),
        ([{"image": "0.png", "caption": "x"}], r"no layout that annotations may have \(it has image, caption\)"),
        ({"0": {"filename": "0.png", "caption": "x", "negative_caption": 3}}, 'entry 0 has "negative_caption" = 3.*the layouts'),
        ({"0": {"filename": "0.png", "caption": " ", "negative_caption": "a"}}, 'entry 0: "caption" is blank'),
        ({"0": {"filename": "77.png", "caption": "a", "negative_caption": "a"}}, r"lacks 1 images .*there are 0\.png"),
        ([{"image": "0.png", "caption_options": ["x"]}], "the true caption, then at least one false one"),
        (
            [{"image_path": "0.png", "true_caption": "a", "false_caption": "b", "relation_name": "on"}
             | {"bbox_x": 0, "bbox_y": 0, "bbox_w": 0, "bbox_h": 4}],
            r"has the box \(0, 0, 0, 4\): four whole numbers",
        ),
    ],
)  # fmt: skip
def test_files_of_negatives_that_do_not_fit_are_one_message(tmp_path: Path, content: Any, message: str) -> None:
    files = sugarcrepe(tmp_path)
    put(tmp_path / "mine.json", json.dumps(content).encode())
    with pytest.raises(ValueError, match=r"^evaluation\.hard_negatives\.mine: .*" + message):
        opened(hard_negatives={"mine": files | {"annotations": str(tmp_path / "mine.json")}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"annotations": "a.json"}, r"evaluation\.retrieval\.mine\.images: missing"),
        ({"annotations": "a.json", "images": "i", "spilt": "x"}, r"unknown key; did you mean 'evaluation\.retrieval\.mine\.split'"),
        (3, r"evaluation\.retrieval\.mine = 3: give shards as text, or a table with annotations and images"),
    ],
)
def test_a_table_of_files_is_checked_key_by_key(settings: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"evaluation": {"retrieval": {"mine": settings}}}}))
    with pytest.raises(ValueError, match=message):
        recipes.load_scored(str(tmp_path / "run.json"))
