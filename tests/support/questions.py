"""Tiny files in the formats that VQA benchmarks publish, with the fields the real ones have, and their images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megakd.recipe import QuestionSource
from megakd.vqa.sets import Mixture, open_mixture, open_questions
from support.shards import data, jpeg, no_barrier

IMAGES = 5


def source(format: str, **more: Any) -> QuestionSource:
    return QuestionSource.model_validate(
        {"format": format, **{key: value if value is True else str(value) for key, value in more.items() if value is not None}}
    )


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, (30 + 7 * number, 25)))
    return folder


def ten(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": number + 1} for number, answer in enumerate(answers)]


def vqav2_entries(count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Three questions an image."""
    asked, answered = [], []
    for number in range(count):
        ids = {"image_id": number // 3 % IMAGES + 40, "question_id": 1000 + number}
        asked.append({**ids, "question": f"what is the number of question {number}?"})
        kind = ("yes/no", "number", "other")[number % 3]
        said = ten(*[f"answer {number}"] * 7, "other", "other", "third")
        more = {"multiple_choice_answer": f"answer {number}", "answers": said, "question_type": f"what {number % 2}"}
        answered.append({**ids, "answer_type": kind, **more})
    return asked, answered


def vqav2(folder: Path, count: int = 30, **more: Any) -> QuestionSource:
    asked, answered = vqav2_entries(count)
    head = {"info": {}, "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    questions = write(folder / "questions.json", {**head, "task_type": "Open-Ended", "questions": asked})
    annotations = write(folder / "annotations.json", {**head, "annotations": answered})
    images = write_images(folder / "images", *(f"COCO_val2014_{40 + number:012d}.jpg" for number in range(IMAGES)))
    return source("vqav2", **{"questions": questions, "annotations": annotations, "images": images, **more})


def textvqa(folder: Path, **more: Any) -> QuestionSource:
    entry = {"image_id": "0054c91397f2fe05", "image_classes": ["Sign"], "image_width": 30, "set_name": "val", "question_tokens": ["what"]}
    entries = [{**entry, "question": "what does it say?", "question_id": 34602, "answers": ["stop", "STOP", "stop", "halt"]}]
    images = write_images(folder / "images", "0054c91397f2fe05.jpg")
    file = write(folder / "textvqa.json", {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": entries})
    return source("textvqa", **{"questions": file, "images": images, **more})


def vizwiz(folder: Path, **more: Any) -> QuestionSource:
    answers = [{"answer_confidence": "yes", "answer": word} for word in ("grey", "gray", "grey", "unanswerable")]
    entries = [
        {"image": "VizWiz_val_00000000.jpg", "question": "What colour?", "answers": answers, "answer_type": "other"},
        {"image": "VizWiz_val_00000001.jpg", "question": "What is it?", "answers": answers[3:], "answer_type": "unanswerable"},
    ]
    for entry in entries:
        entry["answerable"] = int(entry["answer_type"] == "other")
    images = write_images(folder / "images", *(str(entry["image"]) for entry in entries))
    return source("vizwiz", **{"questions": write(folder / "vizwiz.json", entries), "images": images, **more})


def gqa(folder: Path, **more: Any) -> QuestionSource:
    types = {"detailed": "existAttr", "semantic": "attr", "structural": "verify"}
    entry = {"semantic": [], "entailed": [], "equivalent": [], "imageId": "2370799", "isBalanced": True, "types": types}
    entries = {
        "05515938": {**entry, "question": "Is it red?", "answer": "no", "fullAnswer": "No, it is blue.", "groups": {"global": "colour"}},
        "05515939": {**entry, "question": "What is it?", "answer": "bus", "types": {**types, "structural": "query"}},
    }
    return source("gqa", **{"questions": write(folder / "gqa.json", entries), "images": write_images(folder / "i", "2370799.jpg"), **more})


def scienceqa(folder: Path, **more: Any) -> QuestionSource:
    entry = {"task": "closed choice", "grade": "grade2", "topic": "geography", "lecture": "Maps ...", "solution": "B, as ..."}
    problems = {
        "1": {**entry, "question": "Which is north?", "choices": ["Maine", "Ohio"], "answer": 0, "hint": "", "image": "image.png"},
        "2": {**entry, "question": "Which is a gas?", "choices": ["ice", "steam", "rain"], "answer": 1, "hint": "Look.", "image": None},
        "3": {**entry, "question": "Training?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None, "split": "train"},
    }
    for name, subject in (("1", "social science"), ("2", "natural science"), ("3", "language science")):
        problems[name]["subject"] = subject
        problems[name].setdefault("split", "test")
    write(folder / "pid_splits.json", {"train": ["3"], "val": [], "test": ["1", "2"]})
    images = write_images(folder / "images", "test/1/image.png")
    return source("scienceqa", **{"questions": write(folder / "problems.json", problems), "images": images, "split": "test", **more})


def pope(folder: Path, **more: Any) -> QuestionSource:
    name = "COCO_val2014_000000310196.jpg"
    lines = [
        {"question_id": 1, "image": name, "text": "Is there a snowboard in the image?", "label": "yes"},
        {"question_id": 2, "image": name, "text": "Is there a backpack in the image?", "label": "no"},
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "coco_pope_random.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    images = write_images(folder / "val2014", name)
    return source("pope", **{"questions": folder / "coco_pope_random.json", "images": images, **more})


def seed_entry(**more: Any) -> dict[str, Any]:
    choices = {f"choice_{letter}": word for letter, word in zip("abcd", ("One", "Two", "Three", "Four"), strict=True)}
    ids = {"question_id": "101669", "question_type_id": 5, "data_id": "1454426_2591111986", "data_type": "image"}
    return {"answer": "A", **choices, **ids, "question": "How many towels are in the image?", **more}


def seed(folder: Path, **more: Any) -> QuestionSource:
    entries = [seed_entry(), seed_entry(question_id="75500", question_type_id=1, answer="D", question="What is it?")]
    file = write(folder / "SEED-Bench.json", {"questions": entries, "question_type": {"Scene Understanding": 1, "Instances Counting": 5}})
    return source("seed", **{"questions": file, "images": write_images(folder / "images", "1454426_2591111986"), **more})


def talk(*texts: str) -> list[dict[str, str]]:
    """Turns by human and gpt."""
    return [{"from": "human" if number % 2 == 0 else "gpt", "value": text} for number, text in enumerate(texts)]


def llava(folder: Path, **more: Any) -> QuestionSource:
    entries = [
        {"id": "000000033471", "image": "coco/0.jpg", "conversations": talk("<image>\nWhat is it?", "A bus.", "What colour?", "Red.")},
        {"id": "wgByO4Y_0", "model": "", "conversations": talk("Write a haiku.", "Leaves fall.")},
        {"id": "000000033471", "image": "gqa/1.jpg", "conversations": talk("Is it {red}?\n<image>", "No")},
    ]
    images = write_images(folder / "images", "coco/0.jpg", "gqa/1.jpg")
    return source("llava", **{"questions": write(folder / "llava.json", entries), "images": images, **more})


WRITERS: dict[str, Callable[..., QuestionSource]] = {
    make.__name__: make for make in (vqav2, textvqa, vizwiz, gqa, scienceqa, pope, seed, llava)
}


def opened(source: QuestionSource, key: str = "answers.train.mine", **more: Any) -> Any:
    """The set of a source, by a single rank."""
    return open_questions(source, key, data("unused.tar"), 0, 1, no_barrier, **more)


def mixture(**sources: QuestionSource) -> Mixture:
    """What `answers.train` makes of several sources, by a single rank."""
    return open_mixture(sources, "answers.train", data("unused.tar"), 0, 1, no_barrier)
