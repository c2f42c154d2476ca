"""`megakd plan` of a decoder that learns to answer: numbers worked by hand, and memory against runs of the real program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from test_plan_measured import MODELS, Peaks

from megakd.benchmarks import plan_check
from megakd.export.bundle import Bundle
from megakd.planning import plan as planner
from megakd.planning import zero
from megakd.planning.memory_tracker import MemoryTracker
from megakd.recipe import load as recipes
from support.decoders import make_decoder, make_towers
from support.runs import REPOSITORY, answering, train

STUDENT = MODELS[0]
LENGTH, QUESTIONS = 128, 16
LLAMA = (
    "{ model_type = 'llama', hidden_size = 256, num_hidden_layers = 3, num_attention_heads = 4, intermediate_size = 512, "
    "vocab_size = 8192, tie_word_embeddings = true }"
)
CPU = planner.Cluster(1, 8, kind="cpu")


@pytest.fixture(scope="module")
def asking(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Conversations that fill answers.max_length but for a few tokens, nearly all of them answers; one is shorter, and so padded."""
    folder = tmp_path_factory.mktemp("asking")
    Image.new("RGB", (64, 64)).save(folder / "0.jpg")
    said = [" ".join(["red"] * (LENGTH - (16 if number else 40) - 4)) for number in range(QUESTIONS)]
    talk = [
        {"id": number, "image": "0.jpg", "conversations": [{"from": "human", "value": "is it"}, {"from": "gpt", "value": text}]}
        for number, text in enumerate(said)
    ]
    (folder / "talk.json").write_text(json.dumps(talk))
    kept = [item for item in answering(world) if not item.startswith(("answers.", "evaluation", "decoder.image_tokens"))]
    return (
        *kept, f"decoder.architecture={LLAMA}", f"decoder.tokenizer={world}/tokenizer", "decoder.image_tokens=16",
        f"answers.max_length={LENGTH}", f"answers.batch={QUESTIONS}", "optim.batch=16", "optim.steps=2", "optim.warmup=0",
        f"answers.train.talk={{ format = 'llava', questions = '{folder}/talk.json', images = '{folder}' }}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def taught(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A teacher of answers that is wider than the student, with 9 tokens for an image in place of 16."""
    towers = make_towers(world / "tokenizer")
    architecture = {
        "model_type": "llama", "hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768,
        "vocab_size": 8192,
    }  # fmt: skip
    language = make_decoder(
        world / "tokenizer", towers.clip.visual, architecture=architecture, adapt="none", image_tokens=9, template="{question}"
    )
    bundle = tmp_path_factory.mktemp("teacher") / "bundle"
    Bundle(language, towers, LENGTH).save(bundle, tower_inside=True, language_inside=True)
    return (f"answers.teacher.bundle={bundle}",)


@pytest.mark.parametrize(
    ("sets", "micro"),
    [
        ((STUDENT, "objectives.contrastive=0.0"), 16),
        ((STUDENT, "objectives.contrastive=0.0", "answers.tower=trained"), 4),
        ((*MODELS, "decoder.adapt=full", "answers.tower=trained"), 16),
        ((*MODELS, "decoder.adapt=full"), 4),
    ],
    ids=["adapters", "tower and adapters in pieces", "alongside", "alongside in pieces"],
)
def test_every_place_of_a_step_with_answers_holds_what_the_plan_says(
    sets: tuple[str, ...], micro: int, asking: tuple[str, ...], recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_places((*sets, *asking), micro, recipe_file, tmp_path, monkeypatch)


@pytest.mark.parametrize("micro", [16, 4])
@pytest.mark.parametrize("kind", ["forward", "js"])
def test_a_teacher_of_answers_is_counted_with_its_logits(
    kind: str,
    micro: int,
    asking: tuple[str, ...],
    taught: tuple[str, ...],
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sets = (STUDENT, "objectives.contrastive=0.0", *asking, *taught, f"answers.teacher.divergence={kind}")
    check_places(sets, micro, recipe_file, tmp_path, monkeypatch)
    found, alone = (planner.plan(*recipes.load(str(recipe_file), given), None, CPU).job for given in (sets, sets[:-2]))
    assert alone.answer_teacher is None
    assert found.answer_teacher is not None
    assert found.answer_teacher.logits == QUESTIONS * (LENGTH - 16) * 8192 * 4
    layer, length = 4 * 384 * 384 + 3 * 384 * 768, LENGTH - 16 + 9
    assert found.answer_teacher.flops == pytest.approx(2 * length * (4 * (layer + 2 * length * 384) + 384 * 8192), rel=0.01)


def check_places(sets: tuple[str, ...], micro: int, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 15 %, counted by the lives of all tensors of the real program."""
    config = tmp_path / "config.json"
    config.write_text(f'{{"train_micro_batch_size_per_gpu": {micro}}}', encoding="utf-8")
    watch = MemoryTracker("cpu")
    peaks = Peaks(watch, monkeypatch)
    with watch:
        done = train(recipe_file, "--ds_config", config, "--out", tmp_path / "run", sets=sets)
    assert done.code == 0, done.err
    plan = planner.plan(*recipes.load(str(recipe_file), sets), str(config), CPU)
    places = {place: plan.rows[0].places[place] for place in peaks.bytes}
    assert peaks.bytes == pytest.approx(places, rel=plan_check.TOLERANCE)


def test_what_is_frozen_takes_its_weights_and_nothing_else() -> None:
    """1000 elements of 2 bytes on 4 ranks: whole in each but for ZeRO-3, which gathers them, too, and sends them nowhere else."""
    for stage in range(4):
        of = zero.Settings.of({"zero_optimization": {"stage": stage}}, 2)
        alone, beside = zero.held((400,), 4, of), zero.held((400,), 4, of, (1000,))
        assert beside.weights - alone.weights == (500 if stage == 3 else 2000)
        assert beside.gathered - alone.gathered == (2000 if stage == 3 else 0)
        assert (beside.optimizer, beside.gradients, beside.updating) == (alone.optimizer, alone.gradients, alone.updating)
        sent = [zero.traffic((400,), 4, of, 1, 1, frozen)[0].bytes for frozen in ((), (1000,))]
        assert sent[1] - sent[0] == (1500 if stage == 3 else 0)


def test_a_forward_costs_two_flops_a_weight_and_position_and_its_attention(asking: tuple[str, ...], recipe_file: Path) -> None:
    """Adapters of rank 4 included; the tower's 64 patches and class token, and the projector on its 16 image tokens."""
    sets = (STUDENT, "objectives.contrastive=0.0", *asking)
    found = planner.plan(*recipes.load(str(recipe_file), sets), None, CPU).job.student
    layer = 4 * 256 * 256 + 3 * 256 * 512 + 4 * (4 * 512 + 3 * 768)
    language = 2 * LENGTH * (3 * (layer + 2 * LENGTH * 256) + 256 * 8192)
    tower = 2 * (65 * 4 * 12 * 256 * 256 + 4 * 2 * 65 * 65 * 256 + 64 * 3 * 64 * 256 + 256 * 128)
    assert found.asked_flops == language + tower + 2 * 16 * 2 * 256 * 256
    assert found.flops == 0
    assert found.asked_backward == 1


def test_a_plan_needs_none_of_the_models_that_are_still_to_come(world: Path, tmp_path: Path) -> None:
    shapes = (f"student.tokenizer={world}/tokenizer", f"student.model=local-dir:{tmp_path}/student/model")
    first = tmp_path / "first.json"
    reads, _ = recipes.load("smoke_decoder", [f"decoder.tokenizer={world}/tokenizer"])
    first.write_text(json.dumps({"recipe": reads.model_dump(mode="json")}))
    named = (f"decoder.model={tmp_path}/reads/bundle/language", f"decoder.recipe={first}")
    aligned = planner.plan(*recipes.load("vqa_align", (*shapes, *named)), None, CPU)
    adapted = planner.plan(*recipes.load("vqa_align", (*shapes, *named, "decoder.adapt=lora")), None, CPU)
    assert aligned.job.student.frozen
    assert aligned.job.student.numel < adapted.job.student.numel
    assert aligned.recommended == "no teacher"


@pytest.mark.parametrize("config", ["zero1_bf16", "zero2_bf16", "zero3_bf16", "zero3_offload_bf16"])
def test_every_way_to_run_it_has_a_plan(config: str, asking: tuple[str, ...], recipe_file: Path) -> None:
    """Frozen weights have no gradient that could leave early. ZeRO-3 has a share of all weights, with offload on the host."""
    sets = (STUDENT, "objectives.contrastive=0.0", *asking)
    found = planner.plan(*recipes.load(str(recipe_file), sets), str(REPOSITORY / "ds_configs" / f"{config}.json"), planner.Cluster(4, 80))
    whole = 2 * (sum(found.job.student.frozen) + found.job.student.numel)
    held = {"zero3_bf16": whole / 4, "zero3_offload_bf16": 0}.get(config, whole)
    assert found.rows[0].parts["student weights"] == pytest.approx(held, rel=1e-3)
    assert found.rows[0].bytes > found.rows[0].parts["student weights"]


def test_a_quantised_language_model_is_refused_with_what_can_be_planned(world: Path) -> None:
    zero1 = str(REPOSITORY / "ds_configs" / "zero1_bf16.json")
    recipe, origin = recipes.load("vqa_blind", ["decoder.quantise=nf4"])
    with pytest.raises(ValueError, match=r"plan with --set decoder\.quantise=none"):
        planner.plan(recipe, origin, zero1, planner.Cluster(8, 80))


def test_a_quantised_teacher_of_answers_is_refused_too(asking: tuple[str, ...], taught: tuple[str, ...], recipe_file: Path) -> None:
    sets = (STUDENT, "objectives.contrastive=0.0", *asking, *taught)
    with pytest.raises(ValueError, match=r"answers\.teacher\.bundle = .* in int8, .* plan with --set answers\.teacher\.quantise=none"):
        planner.plan(*recipes.load(str(recipe_file), (*sets, "answers.teacher.quantise=int8")), None, CPU)
    with pytest.raises(ValueError, match=r"answers\.teacher\.bundle = 'nowhere': nowhere: no bundle"):
        planner.plan(*recipes.load(str(recipe_file), (*sets, "answers.teacher.bundle=nowhere")), None, CPU)
