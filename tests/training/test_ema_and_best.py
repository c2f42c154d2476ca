"""Averaged weights in runs, evaluated and exported when asked, and the best evaluation's weights, which outlive checkpoints and kills."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megakd import evaluate
from megakd.export import clip_folder
from megakd.recipe import Recipe
from megakd.recipe import load as recipes
from megakd.runtime import checkpoint
from megakd.training import best
from support.decoders import evaluated_and_asked_again
from support.runs import TEACHER, TINY_LLAMA, answering, curve, ds_config, events, finish, megakd, ran, settings, start_ranks, train, zero

EMA = ("optim.ema={ decay = 0.8, every = 2, warmup = true }", "evaluation.weights=ema", "export.weights=ema")
SCORE = "retrieval/test/mean_R@1"


def every_checkpoint(run: Path) -> dict[int, dict[str, Tensor]]:
    return {int(path.name.removeprefix("step_")): checkpoint.load_weights(path)[1] for path in checkpoint.available(run)}


def averages(run: Path) -> dict[str, Tensor]:
    return checkpoint.load(checkpoint.available(run)[-1])[1].averages


def test_the_average_of_a_run_follows_its_recurrence_and_is_evaluated_and_exported_when_asked(
    recipe_file: Path, evaluations: tuple[str, ...], tmp_path: Path
) -> None:
    sets = (*EMA, *evaluations, "checkpoint.every=1", "checkpoint.keep=10", "optim.warmup=0", "optim.lr=1e-2")
    run = ran(recipe_file, tmp_path / "run", *sets)
    at = every_checkpoint(run)
    found, before = averages(run), checkpoint.load(checkpoint.available(run)[0])[1]
    expected = before.averages  # the first weights: nothing has moved it yet
    for times, step in enumerate((2, 4, 6), 1):
        keeps = min(0.8, (1 + times) / (10 + times))
        expected = {name: keeps * value + (1 - keeps) * at[step][name] for name, value in expected.items()}
    assert all(not torch.equal(value, at[1][name]) for name, value in before.averages.items() if value.ndim > 1)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(value, at[6][name]) for name, value in found.items())
    # exported, and scored as `megakd evaluate` scores it
    import open_clip

    model = open_clip.create_model(f"local-dir:{run / 'model'}").state_dict()
    assert torch.equal(model["visual.conv1.weight"], found["clip.visual.conv1.weight"])
    written = json.loads((run / "evaluation.json").read_text())
    assert written["weights"] == "ema"
    again = evaluate(run)
    assert again["retrieval"] == written["retrieval"]
    both = evaluate(run, overrides=["evaluation.weights=both"])
    assert both["ema"]["retrieval"] == written["retrieval"]
    assert both["retrieval"] == evaluate(run, overrides=["evaluation.weights=current"])["retrieval"]
    assert megakd("export", run, "--to", "open_clip", "--out", tmp_path / "out") == 0
    exported = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").state_dict()
    assert torch.equal(exported["visual.conv1.weight"], found["clip.visual.conv1.weight"])


def test_a_run_with_an_average_learns_what_one_without_does_and_goes_on_to_the_last_bit(recipe_file: Path, tmp_path: Path) -> None:
    plain, whole = ran(recipe_file, tmp_path / "plain"), ran(recipe_file, tmp_path / "whole", EMA[0])
    assert curve(plain) == curve(whole)
    assert not (checkpoint.available(plain)[-1] / checkpoint.AVERAGES).exists()
    again = tmp_path / "again"
    again.mkdir()
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(whole / name, again)
    resumed = train(recipe_file, "--out", again, "--resume", checkpoint.available(whole)[0], sets=(EMA[0],))
    assert resumed.code == 0, resumed.err
    assert all(torch.equal(value, averages(whole)[name]) for name, value in averages(again).items())
    other = train(recipe_file, "--out", whole, sets=("optim.ema={ decay = 0.9 }",))
    assert "optim.ema.decay: 0.8 -> 0.9" in other.err
    foreign = train(recipe_file, "--out", tmp_path / "other", "--resume", checkpoint.available(plain)[0], sets=(EMA[0],))
    assert "holds no averages; take it out" in foreign.err


def test_the_average_of_norms_statistics_is_saved_too_and_both_are_scored(
    recipe_file: Path, evaluations: tuple[str, ...], tmp_path: Path
) -> None:
    resnet = "student.architecture.vision_cfg={ image_size = 64, layers = [1, 1, 1, 1], width = 8, head_width = 16 }"
    sets = (resnet, EMA[0], "evaluation.weights=both", *evaluations, "evaluation.every=3", "optim.warmup=0")
    run = ran(recipe_file, tmp_path / "run", *sets)
    state = checkpoint.load(checkpoint.available(run)[-1])[1]
    statistics = [name for name in state.averages if name.endswith("running_mean")]
    assert statistics
    assert not torch.equal(state.averages[statistics[0]], state.weights[statistics[0]])
    scored = [row["content"] for row in events(run, "evaluation")]
    assert [(one["step"], one["weights"]) for one in scored] == [(3, "both"), (6, "both")]
    assert scored[0]["retrieval"].keys() == scored[0]["ema"]["retrieval"].keys()


def test_a_decoder_answers_and_is_written_with_averaged_weights_and_learns_on_with_its_own(
    recipe_file: Path, world: Path, tmp_path: Path
) -> None:
    """Below ZeRO 3 it answers where it learns, so the weights that learn are back behind each evaluation."""
    asking = (f"decoder.architecture={TINY_LLAMA}", f"decoder.tokenizer={world}/tokenizer", *answering(world))
    sets = (*asking, "optim.steps=4", "optim.lr=1e-2", "student.freeze=['image.embeddings']", "optim.ema={ decay = 0.5 }")
    plain = ran(recipe_file, tmp_path / "plain", *sets)
    run = ran(recipe_file, tmp_path / "run", *sets, "evaluation.weights=ema", "export.weights=ema", "evaluation.every=2")
    assert curve(run) == curve(plain)
    said, again = evaluated_and_asked_again(run)
    assert said == again, "the bundle is of the weights that were scored"
    projectors = [load_file(folder / "bundle" / "projector.safetensors") for folder in (plain, run)]
    name = next(name for name in projectors[0] if name.endswith("weight"))
    assert not torch.equal(projectors[0][name], projectors[1][name])
    assert any(torch.equal(projectors[1][name], value) for value in averages(run).values() if value.shape == projectors[1][name].shape)


def test_the_best_evaluation_outlives_its_checkpoint_and_an_interruption(
    recipe_file: Path, evaluations: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learning rate is far too high, so later evaluations are worse, and the first is the best."""
    sets = (*evaluations, "optim.steps=8", "evaluation.every=2", "checkpoint.keep=1", "checkpoint.every=100", f"checkpoint.best={SCORE}")
    whole = ran(recipe_file, tmp_path / "whole", *sets, "optim.warmup=0", "optim.lr=3e-3")
    scores = {row["step"]: row["content"]["retrieval"]["test"]["mean_R@1"] for row in events(whole, "evaluation")}
    first = max(scores, key=lambda step: (scores[step], -step))
    record = json.loads((whole / "best" / best.RECORD).read_text())
    assert record == {"score": SCORE, "value": scores[first], "step": first, "weights": "current"}
    assert [path.name for path in checkpoint.available(whole)] == ["step_00000008"]

    # killed at the second evaluation, before its row is written; the first one's checkpoint is gone by then
    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:
        keep = best.keep

        def ends(run: Path, score: Any, results: Any, write: Any) -> str | None:
            if results["step"] == 4:
                raise KeyboardInterrupt
            return keep(run, score, results, write)

        patch.setattr(best, "keep", ends)
        assert train(recipe_file, "--out", killed, sets=(*sets, "optim.warmup=0", "optim.lr=3e-3")).code != 0
    assert best.read(killed) is not None
    assert [path.name for path in checkpoint.available(killed)] == ["step_00000004"], "each evaluation comes with a checkpoint"
    resumed = train(recipe_file, "--out", killed, sets=(*sets, "optim.warmup=0", "optim.lr=3e-3"))
    assert resumed.code == 0, resumed.err
    assert best.read(killed) == best.read(whole)
    file = f"best/model/{clip_folder.WEIGHTS_FILE}"
    assert (whole / file).read_bytes() == (killed / file).read_bytes()
    assert f"best so far: {SCORE}" in resumed.out or first <= 2


def test_a_best_of_steps_that_are_still_to_come_is_moved_aside(tmp_path: Path) -> None:
    score = _recipe(tmp_path, f"checkpoint.best={SCORE}").best_score()
    assert score is not None

    def results(step: int, value: float) -> dict[str, Any]:
        return {"step": step, "retrieval": {"test": {"mean_R@1": value}}}

    def write(folder: Path) -> None:
        (folder / "model").mkdir()

    run = tmp_path / "run"
    assert best.keep(run, score, results(10, 0.5), write) is not None
    assert best.keep(run, score, results(20, 0.5), write) is None, "the first of equal ones stays"
    assert best.keep(run, score, results(30, 0.4), write) is None
    assert best.keep(run, score, results(40, 0.6), write) is not None
    assert best.set_aside(run, 40) is None
    assert "still to come" in (best.set_aside(run, 30) or "")
    assert not (run / "best").exists()
    assert best.keep(run, score, results(30, 0.1), write) is not None
    lower = _recipe(tmp_path, "checkpoint.best=diagnostics.test.rows_kl").best_score()
    assert lower is not None
    assert best.keep(run, lower, {"step": 5, "diagnostics": {"test": {"rows_kl": 2.0}}}, write) is not None, "another score begins anew"
    assert best.keep(run, lower, {"step": 6, "diagnostics": {"test": {"rows_kl": 1.0}}}, write) is not None
    assert best.keep(run, lower, {"step": 7, "diagnostics": {"test": {"rows_kl": 1.5}}}, write) is None
    wrong = _recipe(tmp_path, "checkpoint.best=hard_negatives.test.swap.accuracy").best_score()
    assert wrong is not None
    with pytest.raises(ValueError, match="the evaluation gave no 'swap' there, but colour; name one of them"):
        wrong.of({"hard_negatives": {"test": {"colour": {"accuracy": 1.0}}}})


def _recipe(folder: Path, *sets: str) -> Recipe:
    from support.runs import RECIPE

    (folder / "tiny.toml").write_text(RECIPE.format(world="/nowhere"))
    sets_of = {"retrieval": "test", "hard_negatives": "test", "diagnostics": "test", "zero_shot": "a.b"}
    named = [f"evaluation.{kind}={{ '{name}' = 'files' }}" for kind, name in sets_of.items()]
    return recipes.load(str(folder / "tiny.toml"), (*named, *TEACHER, "objectives.similarity=1.0", "evaluation.every=5", *sets))[0]


@pytest.mark.parametrize(
    ("name", "path", "higher"),
    [
        (SCORE, ("retrieval", "test", "mean_R@1"), True),
        ("zero_shot.a.b.top1", ("zero_shot", "a.b", "top1"), True),
        ("retrieval.test.image_to_text.R@5", ("retrieval", "test", "image_to_text", "R@5"), True),
        ("hard_negatives.test.swap.accuracy", ("hard_negatives", "test", "swap", "accuracy"), True),
        ("diagnostics/test/rows_kl", ("diagnostics", "test", "rows_kl"), False),
    ],
)
def test_a_score_is_named_by_its_path_in_the_evaluation(name: str, path: tuple[str, ...], higher: bool, tmp_path: Path) -> None:
    found = _recipe(tmp_path, f"checkpoint.best={name}").best_score()
    assert found is not None
    assert (found.path, found.higher, found.averaged) == (path, higher, False)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ((f"checkpoint.best={SCORE}", "evaluation.every=0"), "nothing is scored before the end of the run: set evaluation.every"),
        (("checkpoint.best=retrieval.tset.mean_R@1",), "evaluation.retrieval has no set of that name; it has test"),
        (("checkpoint.best=vqa.test.accuracy",), "evaluation.vqa has no set of that name; it has none"),
        (("checkpoint.best=retreival.test.mean_R@1",), "did you mean 'retrieval'?"),
        (("checkpoint.best=retrieval.test.mean_R@2",), "did you mean 'mean_R@1'?"),
        (("checkpoint.best=reader.test.accuracy",), "scored at the end of a run alone"),
        (("checkpoint.best=diagnostics.test.student_row_entropy",), "what is better or worse of diagnostics is"),
        ((f"checkpoint.best=ema/{SCORE}",), "with evaluation.weights = 'both' alone"),
        (("evaluation.weights=ema",), "evaluation.weights = 'ema': there is no average of the weights; give optim.ema a decay"),
        (("export.weights=ema",), "export.weights = 'ema': there is no average of the weights"),
        (("optim.ema.decay=1.0",), "optim.ema.decay = 1.0: Input should be less than 1"),
        (("optim.ema={ decay = 0.9, every = 7 }",), "optim.ema.every = 7 is more than optim.steps = 6"),
    ],
)
def test_what_makes_no_sense_is_refused(sets: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _recipe(tmp_path, *sets)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_of_any_stage_have_the_average_of_one_and_go_on_to_the_last_bit(
    stage: int, recipe_file: Path, evaluations: tuple[str, ...], tmp_path: Path
) -> None:
    sets = (*EMA, *evaluations, "evaluation.every=2", f"checkpoint.best={SCORE}")
    alone = ran(recipe_file, tmp_path / "alone", *sets)
    config = ds_config(tmp_path / "ds.json", zero_optimization=zero(stage))
    command = ("--recipe", recipe_file, "--ds_config", config, *settings(*sets))
    assert [finish(rank).code for rank in start_ranks(*command, "--out", tmp_path / "both")] == [0, 0]
    for name, value in averages(alone).items():
        torch.testing.assert_close(averages(tmp_path / "both")[name], value, rtol=1e-3, atol=1e-5)
    (tmp_path / "again").mkdir()
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(tmp_path / "both" / name, tmp_path / "again")
    resume = ("--out", tmp_path / "again", "--resume", checkpoint.available(tmp_path / "both")[0])
    assert [finish(rank).code for rank in start_ranks(*command, *resume)] == [0, 0]
    assert all(torch.equal(value, averages(tmp_path / "both")[name]) for name, value in averages(tmp_path / "again").items())
