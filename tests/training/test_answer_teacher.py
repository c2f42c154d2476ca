"""`[answers.teacher]`: a small decoder learns from the bundle of a larger one, with another tower, image size and prompt."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from megakd.export.bundle import Bundle
from megakd.recipe import load as recipes
from megakd.runtime import checkpoint, precision
from megakd.runtime.exits import EXIT_USER_ERROR
from megakd.vqa.benchmarks.base import Question
from megakd.vqa.sets import QuestionWithImage, open_mixture, question_order
from support.runs import KD, TRAIN, answering, ds_config, losses, ran, rows, run_ranks, settings, train, zero

STEPS = ("optim.steps=4", "optim.warmup=0", "checkpoint.every=1", "checkpoint.keep=9", "optim.clip=0.0", "optim.lr=1e-2")
ALONE = ("objectives.contrastive=0.0", *STEPS)
LLAMA = "{{ model_type = 'llama', hidden_size = {}, num_hidden_layers = {}, num_attention_heads = 2, intermediate_size = 48{} }}"
RATE = 3.0  # of the divergence beside the answers


def decoder(world: Path, width: int, layers: int, more: str = ", initializer_range = 0.1") -> tuple[str, ...]:
    return (f"decoder.architecture={LLAMA.format(width, layers, more)}", f"decoder.tokenizer={world}/tokenizer", "decoder.adapt=full")


@pytest.fixture(scope="module")
def teacher(recipe_file: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an output layer of more rows than the tokenizer has words, 9 image tokens, images of 48 pixels and other prompts."""
    tower = "student.architecture.vision_cfg={ image_size = 48, patch_size = 16, width = 48, layers = 2, head_width = 16 }"
    padded = ", vocab_size = 200, initializer_range = 0.3, max_position_embeddings = 90"
    prompts = ("decoder.image_tokens=9", "decoder.template=Q: {question}", "answers.max_length=80")
    sets = (*answering(world), *decoder(world, 48, 3, padded), *prompts, tower, *ALONE, "optim.steps=1", "seed=5")
    kept = [item for item in sets if not item.startswith("evaluation")]
    return ran(recipe_file, tmp_path_factory.mktemp("teacher") / "run", *kept) / "bundle"


@pytest.fixture(scope="module")
def asking(world: Path) -> tuple[str, ...]:
    """The student's decoder, all of which is trained, without the evaluation."""
    return tuple(item for item in (*answering(world), *decoder(world, 32, 2)) if not item.startswith("evaluation"))


@pytest.fixture(scope="module")
def taught(teacher: Path) -> tuple[str, ...]:
    return (f"answers.teacher.bundle={teacher}", f"answers.teacher.weight={RATE}", "answers.teacher.temperature=2.0")


@pytest.fixture(scope="module")
def run(recipe_file: Path, asking: tuple[str, ...], taught: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(recipe_file, tmp_path_factory.mktemp("taught") / "run", *ALONE, *asking, *taught)


def step_of(run: Path, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and moments of a checkpoint."""
    _, state = checkpoint.load(run / "checkpoints" / f"step_{number:08d}")
    return state.weights, state.moments


def curve(run: Path) -> list[Any]:
    return [(row["step"], row["loss"], row["losses"], row["gradient_norm"]) for row in rows(run)]


def test_the_divergence_is_a_loss_of_its_own_and_falls(run: Path) -> None:
    for row in rows(run):
        assert row["losses"].keys() == {"answer", "answer_kl"}
        assert row["loss"] == pytest.approx(row["losses"]["answer"] + RATE * row["losses"]["answer_kl"])
        assert row["seconds"]["teacher"] > 0
    found = [row["losses"]["answer_kl"] for row in rows(run)]
    assert 0 < found[-1] < found[0]


def test_the_run_holds_the_students_weights_alone(run: Path, teacher: Path) -> None:
    """Neither its checkpoints nor its bundle have the teacher's, whose widths are other ones."""
    weights, _ = step_of(run, 4)
    assert all(
        48 not in value.shape or name.endswith(("gate_proj.weight", "up_proj.weight", "down_proj.weight"))
        for name, value in weights.items()
    )
    assert json.loads((run / "bundle" / "bundle.json").read_text())["decoder"]["image_tokens"] == 4


def test_it_is_resumed_bit_for_bit_and_by_the_same_teacher_alone(
    recipe_file: Path, asking: tuple[str, ...], taught: tuple[str, ...], run: Path, teacher: Path, tmp_path: Path
) -> None:
    """Wherever its folder lies by then."""
    own = tmp_path / "teacher"
    shutil.copytree(teacher, own)
    sets = (*ALONE, *asking, *taught, f"answers.teacher.bundle={own}")
    ran(recipe_file, tmp_path / "run", *ALONE, *asking, *taught)
    for folder in sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[2:]:
        shutil.rmtree(folder)
    moved = train(recipe_file, "--out", tmp_path / "run", sets=sets)
    assert moved.code == 0, moved.err
    assert f"answers.teacher.bundle: {str(teacher)!r} -> {str(own)!r}: it has to be the same teacher" in moved.out
    assert curve(tmp_path / "run") == curve(run)
    assert all(torch.equal(value, step_of(run, 4)[0][name]) for name, value in step_of(tmp_path / "run", 4)[0].items())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    changed = train(recipe_file, "--out", tmp_path / "run", sets=(*sets, "answers.teacher.temperature=1.0"))
    assert changed.code == EXIT_USER_ERROR
    assert "answers.teacher.temperature: 2.0 -> 1.0" in changed.err
    shutil.rmtree(own)
    shutil.copytree(run / "bundle", own)
    other = train(recipe_file, "--out", tmp_path / "run", sets=sets)
    assert other.code == EXIT_USER_ERROR
    assert "is another bundle now than the one that this run has learned from" in other.err


def test_accumulated_pieces_are_the_whole_batchs(
    recipe_file: Path, asking: tuple[str, ...], taught: tuple[str, ...], run: Path, tmp_path: Path
) -> None:
    pieces = ran(
        recipe_file, tmp_path / "run", *ALONE, *asking, *taught, config=ds_config(tmp_path / "z.json", gradient_accumulation_steps=4)
    )
    assert rows(pieces)[0]["losses"] == pytest.approx(rows(run)[0]["losses"], rel=1e-6)
    for name, value in step_of(run, 1)[1].items():
        torch.testing.assert_close(step_of(pieces, 1)[1][name], value, rtol=1e-3, atol=1e-6)


def test_two_ranks_learn_what_one_does(
    recipe_file: Path, asking: tuple[str, ...], taught: tuple[str, ...], run: Path, tmp_path: Path
) -> None:
    """Whose answers are of unlike length: the mean is over tokens, not over ranks. A ZeRO-3 student beside a whole teacher."""
    config = ds_config(tmp_path / "z.json", zero_optimization=zero(3))
    sets = settings(*ALONE, *asking, *taught)
    run_ranks(TRAIN, "--recipe", recipe_file, "--out", tmp_path / "run", "--ds_config", config, *sets)
    assert rows(tmp_path / "run")[0]["losses"] == pytest.approx(rows(run)[0]["losses"], rel=1e-5)
    assert losses(tmp_path / "run") == pytest.approx(losses(run), rel=1e-3)
    for name, value in step_of(run, 1)[1].items():
        torch.testing.assert_close(step_of(tmp_path / "run", 1)[1][name], value, rtol=1e-3, atol=1e-5)


def test_beside_the_pairs_it_is_exact_in_pieces_too(
    recipe_file: Path, asking: tuple[str, ...], taught: tuple[str, ...], tmp_path: Path
) -> None:
    """Losses over pairs need all micro-batches at once, and the answers come from the second forward of each."""
    sets = (*KD, *STEPS, "optim.steps=2", *asking, *taught, "answers.tower=trained", "answers.teacher.divergence=js")
    whole = ran(recipe_file, tmp_path / "whole", *sets)
    pieces = ran(recipe_file, tmp_path / "pieces", *sets, config=ds_config(tmp_path / "z.json", train_micro_batch_size_per_gpu=4))
    assert rows(whole)[0]["losses"].keys() == {"contrastive", "similarity", "feature", "answer", "answer_kl"}
    assert rows(pieces)[0]["losses"] == pytest.approx(rows(whole)[0]["losses"], rel=1e-5)
    for name, value in step_of(whole, 1)[1].items():
        torch.testing.assert_close(step_of(pieces, 1)[1][name], value, rtol=2e-3, atol=2e-6)
    again = ran(recipe_file, tmp_path / "whole", *sets)  # goes on from the end, with what the objectives and the teacher have kept
    assert again == tmp_path / "whole"


@pytest.fixture(scope="module")
def going_on(
    recipe_file: Path, asking: tuple[str, ...], run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[str, ...]]:
    """A recipe and overrides by which the student of `run` does one more step."""
    text = recipe_file.read_text(encoding="utf-8")
    own = tmp_path_factory.mktemp("going_on") / "own.toml"
    own.write_text(text[: text.index("[student]")] + "[student]\n" + text[text.index("[objectives]") :], encoding="utf-8")
    kept = [item for item in asking if not item.startswith(("decoder.architecture", "decoder.tokenizer"))]
    start = (f"student.model=local-dir:{run}/bundle/tower", f"decoder.model={run}/bundle/language", f"decoder.start={run}/bundle")
    return own, (*ALONE, *kept, *start, "optim.steps=1")


def answer_probabilities(bundle: Bundle, question: Question, image: Image.Image | None) -> Tensor:
    """(N, 86) in float64, at temperature 2: of a question by itself, without padding, from the ids that the bundle's prompts give."""
    encoded = bundle.prompts.training(question, image is not None)
    ids_BL, labels = torch.tensor([encoded.ids]), torch.tensor(encoded.labels)
    image_mask_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
    image_mask_BL[0, encoded.image_start : encoded.image_start + encoded.image_tokens] = True
    with torch.no_grad():
        embeddings = bundle.decoder.embed(bundle.look([image]), ids_BL, image_mask_BL)
        logits_LW = bundle.decoder.language(inputs_embeds=embeddings).logits[0].double()
    places = [place for place, label in enumerate(labels.tolist()) if label != -100]
    assert labels[places].tolist()[-1] == bundle.prompts.end
    return (logits_LW[[place - 1 for place in places], :86] / 2).softmax(dim=1)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_the_loss_of_a_step_is_that_of_its_questions_one_by_one(
    kind: str, going_on: tuple[Path, tuple[str, ...]], taught: tuple[str, ...], teacher: Path, run: Path, tmp_path: Path
) -> None:
    """Both bundles asked by themselves, p log(p / q) summed in float64, over the answers' tokens of the first batch."""
    recipe, sets = going_on
    found = rows(ran(recipe, tmp_path / "run", *sets, *taught, f"answers.teacher.divergence={kind}"))[0]["losses"]
    settings, _ = recipes.load(str(tmp_path / "run" / "run.json"))
    assert settings.answers is not None
    train = open_mixture(settings.answers.train, "answers.train", settings.data, 0, 1, lambda: None)
    first = question_order(train, 8, settings.seed).indices(0, 8).tolist()
    student, larger = (Bundle.load(folder, torch.device("cpu")) for folder in (run / "bundle", teacher))
    total = torch.zeros(())
    tokens = 0
    for asked in train.read(first, True):
        assert isinstance(asked, QuestionWithImage)
        image = None if asked.image is None else Image.open(io.BytesIO(asked.image))
        q, p = (answer_probabilities(bundle, asked.question, image) for bundle in (student, larger))
        one, other = (p, q) if kind == "forward" else (q, p)
        total, tokens = total + 4 * (one * (one / other).log()).sum(), tokens + len(q)
    assert found["answer_kl"] == pytest.approx(total.item() / tokens, rel=1e-4)


def test_a_teacher_that_is_the_student_teaches_nothing(going_on: tuple[Path, tuple[str, ...]], run: Path, tmp_path: Path) -> None:
    """Its own bundle, before it moves: the divergence of the first step is 0, and the gradient is that of the answers alone."""
    own, sets = going_on
    for kind in ("forward", "reverse", "js"):
        more = (f"answers.teacher.bundle={run}/bundle", f"answers.teacher.divergence={kind}", "answers.teacher.weight=100.0")
        taught = ran(own, tmp_path / kind, *sets, *more)
        assert rows(taught)[0]["losses"]["answer_kl"] == 0
    alone = ran(own, tmp_path / "alone", *sets)
    assert rows(taught)[0]["gradient_norm"] == rows(alone)[0]["gradient_norm"]
    assert all(torch.equal(value, step_of(alone, 1)[0][name]) for name, value in step_of(taught, 1)[0].items())


@pytest.mark.parametrize("kept", ["none", "int8"])
def test_it_teaches_in_bf16_and_in_8_bit(
    kept: str, recipe_file: Path, asking: tuple[str, ...], taught: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the teacher's tower, language model and logits in bf16; the losses near those of float32."""
    exact = rows(ran(recipe_file, tmp_path / "exact", *ALONE, *asking, *taught, "optim.steps=1"))[0]["losses"]
    monkeypatch.setenv(precision.VARIABLE, "bf16")
    sets = (*ALONE, *asking, *taught, "optim.steps=2", f"answers.teacher.quantise={kept}")
    run = ran(
        recipe_file, tmp_path / "run", *sets, config=ds_config(tmp_path / "z.json", bf16={"enabled": True}, zero_optimization=zero(2))
    )
    assert rows(run)[0]["losses"] == pytest.approx(exact, rel=0.05)


def other_tokenizer(world: Path, folder: Path, change: Callable[[dict[str, Any]], object], **config: Any) -> str:
    """The override of a tokenizer like the world's, but for what `change` does to its tokenizer.json."""
    shutil.copytree(world / "tokenizer", folder)
    edits = {
        "tokenizer.json": change,
        **dict.fromkeys(("tokenizer_config.json", "special_tokens_map.json"), lambda content: content.update(config)),
    }
    for name, edit in edits.items():
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        edit(content)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return f"decoder.tokenizer={folder}"


def swapped(content: dict[str, Any]) -> None:
    words = content["model"]["vocab"]
    words["red"], words["green"] = words["green"], words["red"]


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (swapped, {}, "2 words differ, for example 'green' is 37 for decoder and 38 for the teacher"),
        (
            lambda content: content["model"]["vocab"].update(maroon=86),
            {},
            "1 words differ, for example 'maroon' is 86 for decoder and None",
        ),
        (lambda content: None, {"eos_token": "<pad>"}, "answers end with token 0 for decoder and with 85 for the teacher"),
        (lambda content: content.update(normalizer=None), {}, "the words are the same, but 'USER: What colour"),
    ],
    ids=["swapped", "one more", "another end", "another case"],
)
def test_a_vocabulary_that_is_another_is_refused_before_anything_is_loaded(
    change: Any,
    config: dict[str, Any],
    message: str,
    recipe_file: Path,
    world: Path,
    asking: tuple[str, ...],
    taught: tuple[str, ...],
    tmp_path: Path,
) -> None:
    other = other_tokenizer(world, tmp_path / "tokenizer", change, **config)
    done = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=(*ALONE, *asking, other, *taught))
    assert done.code == EXIT_USER_ERROR
    assert f"its vocabulary is not the decoder's ({message}" in done.err
    assert "answers.teacher.bundle" in done.err
    assert done.err.count("error:") == 1


def test_a_dry_run_says_what_teaches_and_what_is_padding(
    recipe_file: Path, asking: tuple[str, ...], taught: tuple[str, ...], teacher: Path, tmp_path: Path
) -> None:
    done = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=(*ALONE, *asking, *taught))
    assert done.code == 0, done.err
    said = f"teacher of answers: {teacher}, "
    assert done.out.count(said) == 1
    assert "an image becomes 9 tokens of it; KL(teacher, student), temperature 2, weight 3" in done.out
    assert "compared over the tokenizer's 86 words" in done.out
    assert "0 of the decoder's 86 rows, 114 of the teacher's 200" in done.out
    assert "dry run: all of this is sound" in done.out


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("answers.teacher.bundle=nowhere/bundle",), "answers.teacher.bundle = 'nowhere/bundle': nowhere/bundle: no bundle"),
        (("answers.teacher.bundle=" + "x" * 300,), f"answers.teacher.bundle = '{'x' * 300}': [Errno 36] File name too long"),
        (
            ("answers.max_length=86",),
            "a conversation has 91, and the teacher takes 90 (max_position_embeddings); set answers.max_length to 85",
        ),
        (("answers.teacher.temperature=0",), "answers.teacher.temperature = 0: Input should be greater than 0"),
        (("answers.teacher.weight=-1",), "answers.teacher.weight = -1"),
        (("answers.teacher.divergence=kl",), "answers.teacher.divergence = 'kl': Input should be 'forward', 'reverse' or 'js'"),
        (("decoder.template={question}short",), "cannot be put to answers.teacher"),
    ],
)
def test_bad_settings_are_refused_with_the_key(
    sets: tuple[str, ...], message: str, recipe_file: Path, asking: tuple[str, ...], taught: tuple[str, ...], tmp_path: Path
) -> None:
    done = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=(*ALONE, *asking, *taught, *sets))
    assert done.code == EXIT_USER_ERROR
    assert message in done.err


def test_the_teacher_alone_may_be_learned_from(
    recipe_file: Path, asking: tuple[str, ...], taught: tuple[str, ...], run: Path, tmp_path: Path
) -> None:
    """Without a weight the answers' own loss is logged, and moves nothing."""
    alone = ran(recipe_file, tmp_path / "run", *ALONE, *asking, *taught, "answers.weight=0", "optim.steps=1")
    (row,) = rows(alone)
    assert row["losses"] == rows(run)[0]["losses"]
    assert row["loss"] == pytest.approx(RATE * row["losses"]["answer_kl"])
    assert row["gradient_norm"] < rows(run)[0]["gradient_norm"]


def test_a_teacher_that_is_not_there_yet_is_trained_first(
    recipe_file: Path, asking: tuple[str, ...], world: Path, teacher: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first.json"
    recorded = json.loads((teacher.parent / "run.json").read_text(encoding="utf-8"))["recipe"]
    first.write_text(json.dumps({"recipe": recorded}), encoding="utf-8")
    sets = (*ALONE, *asking, "optim.steps=1", f"answers.teacher.bundle={tmp_path}/large/bundle", f"answers.teacher.recipe={first}")
    dry = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=sets)
    assert dry.code == 0, dry.err
    assert f"teacher of answers: {tmp_path}/large/bundle, which recipe '{first}' trains first" in dry.out
    assert f"would run first: {first} into {tmp_path}/large" in dry.out
    other = train(recipe_file, "--dry_run", sets=(*sets, other_tokenizer(world, tmp_path / "tokenizer", swapped)))
    assert other.code == EXIT_USER_ERROR
    assert f"answers.teacher.recipe = '{first}': its vocabulary is not the decoder's (2 words differ" in other.err
    nothing = train(recipe_file, "--dry_run", sets=(*sets, f"answers.teacher.recipe={recipe_file}"))
    assert f"answers.teacher.recipe = '{recipe_file}': has no [decoder], and so trains none" in nothing.err
    misplaced = train(recipe_file, "--dry_run", sets=(*sets, "answers.teacher.bundle=elsewhere"))
    assert "bundle must be 'RUN/bundle' of that run, not 'elsewhere'" in misplaced.err
    run = ran(recipe_file, tmp_path / "run", *sets)
    assert json.loads((tmp_path / "large" / "bundle" / "bundle.json").read_text(encoding="utf-8"))["decoder"]["image_tokens"] == 9
    assert rows(run)[0]["losses"]["answer_kl"] > 0
