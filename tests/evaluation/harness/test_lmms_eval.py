"""A bundle scored by lmms-eval itself, in its own environment: the answers, and the score, are those of our own evaluation."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megakd.data.transforms import decode
from megakd.export.bundle import Bundle
from megakd.models.patches import patch_tokens
from megakd.recipe import Data, QuestionSource
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller
from megakd.vqa.benchmarks.base import Question, most_frequent
from megakd.vqa.evaluate import Answerer, Opened, evaluate
from megakd.vqa.loader import ImageProcessor
from megakd.vqa.prompts import stack
from megakd.vqa.sets import QuestionSet, QuestionWithImage, open_questions
from support.decoders import make_decoder, make_towers
from support.runs import REPOSITORY
from support.shards import data

HERE, CPU = Path(__file__).parent, torch.device("cpu")
COUNT, CHOICES, LONGEST = 24, ["red", "blue", "yes", "no", "2"], 6
TOO_LONG = "red " * 99  # for the decoder's context


@pytest.fixture(scope="module")
def bundle(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, large enough that answers differ from question to question and from image to image."""
    torch.manual_seed(0)
    towers = make_towers(world / "tokenizer")
    decoder = make_decoder(world / "tokenizer", towers.clip.visual, adapt="full")
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if name.startswith("language") else 1.0))
    folder = tmp_path_factory.mktemp("run") / "bundle"
    Bundle(decoder, towers, 64).save(folder, tower_inside=True)
    return folder


def ten_answers(said: str, number: int) -> list[dict[str, Any]]:
    """Between 0 and 10 people say what the model says, some of them in another spelling: scores from 0 to 1."""
    agree = number % 6 if number % 4 else 10
    spelled = [said, f"{said}.", said.capitalize(), f"the {said}"]
    answers = [spelled[place % len(spelled)] if agree < 10 else said for place in range(agree)]
    answers += ["something else"] * (10 - agree)
    return [{"answer": answer, "answer_id": place + 1} for place, answer in enumerate(answers)]


@pytest.fixture(scope="module")
def documents(world: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's test questions, answered by ten people who know the bundle, in VQAv2's files and as lmms-eval's documents."""
    folder = tmp_path_factory.mktemp("task")
    loaded = Bundle.load(bundle, CPU)
    asked = shapes(world, world / "questions/test_questions.json", world / "questions/test_annotations.json")
    entries, answered, docs = [], [], []
    for number in range(COUNT):
        (read,) = asked.read([number], True)
        assert isinstance(read, QuestionWithImage)
        assert read.image is not None
        (folder / f"{number}.png").write_bytes(read.image)
        prompt = read.question.text + loaded.decoder.settings.instruction
        image = decode(read.image, 10**6)
        (said,) = loaded.answer([image], [prompt], LONGEST)
        answers = ten_answers(said, number)
        ids = {"image_id": int(str(read.question.image)), "question_id": number}
        best = most_frequent(str(entry["answer"]) for entry in answers)
        entries.append({**ids, "question": read.question.text})
        answered.append({**ids, "question_type": "what", "answer_type": "other", "multiple_choice_answer": best, "answers": answers})
        right = number % len(CHOICES)
        choices = CHOICES if number % 3 else CHOICES[: right + 1] + [TOO_LONG] * (len(CHOICES) - right - 1)
        docs.append(
            {**ids, "image": str(folder / f"{number}.png"), "question": prompt, "answer": best, "answers": answers}
            | {"choices": choices, "right": right}
        )
    (folder / "questions.json").write_text(json.dumps({"questions": entries}))
    (folder / "annotations.json").write_text(json.dumps({"annotations": answered}))
    (folder / "documents.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    return folder


def shapes(world: Path, questions: Path, annotations: Path) -> QuestionSet:
    files = {"questions": str(questions), "annotations": str(annotations), "images": str(world / "test/*.tar")}
    source = QuestionSource.model_validate({"format": "vqav2", **files, "image_name": "{image_id:09d}"})
    opened = open_questions(source, "evaluation.vqa.shapes", data("unused.tar"), 0, 1, lambda: None)
    assert isinstance(opened, QuestionSet)
    return opened


def ours(world: Path, bundle: Path, documents: Path, out: Path) -> dict[str, Any]:
    loaded = Bundle.load(bundle, CPU)
    assert loaded.towers is not None
    look = partial(patch_tokens, loaded.towers.clip.visual, layer=loaded.decoder.settings.layer)
    eyes = ImageProcessor(loaded.towers.preprocess, Data(max_pixels=10**6), loaded.decoder.settings.image_fit)
    questions = shapes(world, documents / "questions.json", documents / "annotations.json")
    one = Answerer(loaded.decoder, look, loaded.prompts, eyes, CPU, torch.float32, 8, LONGEST, {"bundle": str(bundle)})
    source = QuestionSource(format="vqav2", questions="unused")
    alone = World(0, 1, CPU)
    found = evaluate({"shapes": Opened(source, questions)}, one, alone, out, data("unused.tar"), StopPoller(alone))
    results: dict[str, Any] = found["shapes"]
    return results


def best_choice(loaded: Bundle, document: dict[str, Any]) -> int:
    """By the likelihood of each choice as an answer of its own, one at a time: mean log p of its tokens and the end."""
    conversations, losses = loaded.prompts, []
    with torch.no_grad(), Image.open(document["image"]) as image:
        visual_BVC = loaded.look([image.convert("RGB")])
        for choice in document["choices"]:
            if choice == TOO_LONG:
                losses.append(math.inf)
                continue
            encoded = conversations.training(Question(0, None, document["question"], (choice,), choice, ""), True)
            found = loaded.decoder(visual_BVC, *stack([encoded], conversations.padding, left=False))
            losses.append(float(found["answer_nll"] / found["answer_tokens"]))
    return losses.index(min(losses))


def plug_in(folder: Path) -> Path:
    """The entry point as pyproject.toml declares it, as an installed distribution."""
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    info = folder / "megakd_plugin-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megakd-plugin\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[lmms_eval.models]\n" + "".join(f"{name} = {value}\n" for name, value in declared.items()))
    return folder


def harness(python: Path, bundle: Path, documents: Path, folder: Path, *tasks: str) -> dict[str, dict[str, Any]]:
    """What lmms-eval prints into its results file, by task."""
    shutil.copytree(HERE / "task", folder / "task")
    for path in (folder / "task").glob("*.yaml"):
        path.write_text(path.read_text().replace("DOCUMENTS", str(documents / "documents.jsonl")))
    paths = os.pathsep.join(map(str, (plug_in(folder / "plugin"), REPOSITORY, REPOSITORY / "kernels")))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "lmms_eval", "eval", "--model", "megakd", "--model_args", f"bundle={bundle}", "--tasks", ",".join(tasks)]
    command += ["--include_path", folder / "task", "--batch_size", "8", "--device", "cpu", "--output_path", folder / "out", "--log_samples"]
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **offline, "PYTHONPATH": paths}, cwd=folder, capture_output=True, text=True, check=False
    )
    written = list((folder / "out").rglob("*results.json"))
    assert written, (done.stdout + done.stderr)[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(written[0].read_text())["results"]
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lmms_eval_scores_a_bundle_as_we_do(world: Path, bundle: Path, documents: Path, harness_python: Path, tmp_path: Path) -> None:
    mine = ours(world, bundle, documents, tmp_path / "ours")
    theirs = harness(harness_python, bundle, documents, tmp_path / "theirs", "megakd_shapes", "megakd_shapes_choice")
    assert 0.3 < mine["accuracy"] < 0.9  # of all scores from 0 to 1, so that agreement means something
    assert theirs["megakd_shapes"]["exact_match,none"] == pytest.approx(mine["accuracy"], abs=1e-9)
    loaded = Bundle.load(bundle, CPU)
    read = [json.loads(line) for line in (documents / "documents.jsonl").read_text().splitlines()]
    right = [best_choice(loaded, document) == document["right"] for document in read]
    assert theirs["megakd_shapes_choice"]["acc,none"] == pytest.approx(sum(right) / len(right), abs=1e-9)
