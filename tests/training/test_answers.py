"""A decoder that learns to answer, seen in the run folders: after the student, alongside it, blind; on one rank and on two."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from megakd.cli import app
from megakd.recipe import load as recipes
from megakd.runtime import checkpoint
from megakd.runtime import ds_config as ds_config_module
from megakd.runtime.exits import EXIT_USER_ERROR
from megakd.runtime.launch import World
from megakd.training.tasks import answer
from support.decoders import evaluated_and_asked_again
from support.runs import KD, TINY_LLAMA, answering, curve, ds_config, events, losses, question_source, ran, rows, train, zero

WITHOUT_OBJECTIVES = ("objectives.contrastive=0.0",)
STEPS = ("optim.steps=4", "optim.warmup=0", "checkpoint.every=1", "checkpoint.keep=9", "optim.clip=0.0")


@pytest.fixture(scope="module")
def reader(recipe_file: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a decoder that was trained on text alone."""
    folder = tmp_path_factory.mktemp("reader")
    blind, unseen = folder / "blind.toml", question_source(world, "test", images=False)
    blind.write_text(
        f"name = 'blind'\n[data]\nworkers = 0\n[decoder]\ntokenizer = '{world}/tokenizer'\nadapt = 'full'\narchitecture = {TINY_LLAMA}\n"
        f"template = '{{question}}'\ninstruction = ''\n[answers]\nmax_length = 160\n"
        f"train.text = {{ format = 'llava', questions = '{world}/questions/train_text.json' }}\n"
        f"[optim]\nsteps = 6\nbatch = 8\nlr = 1e-2\n[evaluation]\nvqa.test = {unseen}\n[log]\nevery = 1\n"
    )
    finished = train(blind, "--out", folder / "run")
    assert finished.code == 0, finished.err + finished.out
    return folder / "run"


@pytest.fixture(scope="module")
def asking(world: Path, reader: Path) -> tuple[str, ...]:
    """Overrides that add a decoder with adapters and the world's questions to the tiny recipe."""
    return (f"decoder.model={reader}/bundle/language", *answering(world))


def step_of(run: Path, number: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and moments of a checkpoint."""
    _, state = checkpoint.load(run / "checkpoints" / f"step_{number:08d}")
    return state.weights, state.moments


@pytest.fixture(scope="module")
def after(recipe_file: Path, asking: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(recipe_file, tmp_path_factory.mktemp("after") / "run", *WITHOUT_OBJECTIVES, *asking, *STEPS)


def test_a_blind_decoder_learns_from_text_and_is_judged(reader: Path) -> None:
    assert losses(reader)[-1] < losses(reader)[0]
    assert "scale" not in rows(reader)[0]
    (result,) = events(reader, "evaluation")
    assert result["content"]["vqa"]["test"]["questions"] > 100
    assert (reader / "bundle" / "language" / "config.json").is_file()
    assert not (reader / "model").exists()


def test_with_a_frozen_tower_projector_and_adapters_are_trained_and_nothing_else(after: Path) -> None:
    weights, _ = step_of(after, 4)
    assert {name.split(".")[1] for name in weights} == {"projector", "language"}
    assert all("lora_" in name for name in weights if name.startswith("decoder.language."))
    first, _ = step_of(after, 1)
    assert all(not torch.equal(first[name], value) for name, value in weights.items())
    row = rows(after)[0]
    assert row["images_per_second"] * sum(row["seconds"].values()) == pytest.approx(8), "answers.batch, and not optim.batch"


def test_the_bundle_answers_what_the_run_was_judged_by(after: Path, world: Path) -> None:
    result = json.loads((after / "evaluation.json").read_text())["vqa"]["test"]
    assert result == json.loads((after / "vqa.json").read_text())["sets"]["test"]
    said, again = evaluated_and_asked_again(after)
    assert said == again
    assert len(said) == result["questions"]
    assert len(set(said)) > 1


def test_answers_resume_bit_for_bit(recipe_file: Path, asking: tuple[str, ...], after: Path, tmp_path: Path) -> None:
    sets = (*WITHOUT_OBJECTIVES, *asking, *STEPS)
    ran(recipe_file, tmp_path / "run", *sets)
    for folder in sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[2:]:
        folder.rename(tmp_path / folder.name)
    ran(recipe_file, tmp_path / "run", *sets)
    assert curve_of(tmp_path / "run") == curve_of(after)
    assert all(torch.equal(value, step_of(after, 4)[0][name]) for name, value in step_of(tmp_path / "run", 4)[0].items())


def curve_of(run: Path) -> list[tuple[Any, ...]]:
    return [(row["step"], row["loss"], row["lr"], row["gradient_norm"]) for row in rows(run)]


def test_accumulated_answers_are_the_whole_batchs(recipe_file: Path, asking: tuple[str, ...], after: Path, tmp_path: Path) -> None:
    """Without dropout, whose draws differ by piece."""
    sets = (*WITHOUT_OBJECTIVES, *asking, *STEPS, "decoder.lora.dropout=0.0")
    whole = ran(recipe_file, tmp_path / "whole", *sets)
    pieces = ran(recipe_file, tmp_path / "pieces", *sets, config=ds_config(tmp_path / "z.json", train_micro_batch_size_per_gpu=4))
    assert losses(pieces) == pytest.approx(losses(whole), rel=1e-5)
    for name, value in step_of(whole, 1)[1].items():
        torch.testing.assert_close(step_of(pieces, 1)[1][name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_stages_train_and_answer_the_same(recipe_file: Path, asking: tuple[str, ...], after: Path, tmp_path: Path, stage: int) -> None:
    config = ds_config(tmp_path / "z.json", zero_optimization=zero(stage))
    run = ran(recipe_file, tmp_path / "run", *WITHOUT_OBJECTIVES, *asking, *STEPS, config=config)
    assert losses(run) == pytest.approx(losses(after), rel=1e-5)
    for name, value in step_of(after, 4)[0].items():
        torch.testing.assert_close(step_of(run, 4)[0][name], value, rtol=1e-3, atol=1e-5)
    said, again = evaluated_and_asked_again(run)
    assert said == again


class TestAlongside:
    """KD and answers in one step. The gradient of a step is AdamW's first moment after it, over 1 - beta1."""

    @pytest.fixture(scope="class")
    def runs(self, recipe_file: Path, asking: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp("alongside")
        sets = (*KD, *asking, *STEPS, "optim.steps=2", "decoder.lora.dropout=0.0")
        kinds = {
            "both": ("answers.tower=trained",),
            "frozen": ("answers.tower=frozen",),
            "weighted": ("answers.tower=trained", "answers.weight=3.0"),
            "slow": ("answers.tower=trained", "answers.lr.decoder=1e-5"),
        }
        found = {name: ran(recipe_file, folder / name, *sets, *more) for name, more in kinds.items()}
        micro = ds_config(folder / "micro.json", train_micro_batch_size_per_gpu=4)
        found["micro"] = ran(recipe_file, folder / "micro", *sets, *kinds["both"], config=micro)
        found["kd"] = ran(recipe_file, folder / "kd", *KD, *STEPS, "optim.steps=2")
        return found

    def test_one_step_has_all_losses(self, runs: dict[str, Path]) -> None:
        first = rows(runs["both"])[0]
        assert first["losses"].keys() == {"contrastive", "similarity", "feature", "answer"}
        weights = {"contrastive": 1.0, "similarity": 2.0, "feature": 0.5, "answer": 1.0}
        assert first["loss"] == pytest.approx(sum(weights[name] * value for name, value in first["losses"].items()))
        assert rows(runs["kd"])[0]["losses"] == {name: value for name, value in first["losses"].items() if name != "answer"}

    def test_answers_give_the_vision_tower_a_gradient(self, runs: dict[str, Path]) -> None:
        both, frozen, kd = (step_of(runs[name], 1)[1] for name in ("both", "frozen", "kd"))
        tower = [name for name in kd if name.startswith("exp_avg/clip.visual.transformer")]
        assert tower
        assert all(torch.equal(frozen[name], kd[name]) for name in kd)
        assert any(not torch.equal(both[name], kd[name]) for name in tower)
        text = [name for name in kd if name.startswith("exp_avg/clip.transformer")]
        assert text
        assert all(torch.equal(both[name], kd[name]) for name in text), "the text tower learns from pairs alone"

    def test_kd_gives_projector_and_adapters_none(self, runs: dict[str, Path]) -> None:
        """Their gradient is the answers' alone: three times the weight is three times the gradient."""
        once, thrice = step_of(runs["both"], 1)[1], step_of(runs["weighted"], 1)[1]
        own = [name for name in once if name.startswith("exp_avg/decoder.")]
        assert own
        for name in own:
            torch.testing.assert_close(thrice[name], 3 * once[name], rtol=1e-4, atol=1e-7)

    def test_a_group_has_its_own_learning_rate(self, runs: dict[str, Path]) -> None:
        """AdamW's first step moves every weight with a gradient by about the learning rate."""
        both, slow = step_of(runs["both"], 1)[0], step_of(runs["slow"], 1)[0]
        adapters = [name for name in both if "lora_B" in name]
        assert max(float(both[name].abs().max()) for name in adapters) > 50 * max(float(slow[name].abs().max()) for name in adapters) > 0
        towers = [name for name in both if name.startswith("clip.")]
        assert all(torch.equal(both[name], slow[name]) for name in towers)

    def test_accumulation_is_exact_for_both(self, runs: dict[str, Path]) -> None:
        assert losses(runs["micro"]) == pytest.approx(losses(runs["both"]), rel=1e-4)
        for name, value in step_of(runs["both"], 1)[1].items():
            torch.testing.assert_close(step_of(runs["micro"], 1)[1][name], value, rtol=2e-3, atol=2e-6)

    def test_it_ends_with_a_model_and_a_bundle(self, runs: dict[str, Path]) -> None:
        bundle = json.loads((runs["both"] / "bundle" / "bundle.json").read_text())
        assert bundle["tower"] == {"inside": True}
        assert (runs["both"] / "model" / "open_clip_config.json").is_file()
        assert curve(runs["both"])


def test_a_decoder_goes_on_from_an_aligned_projector(recipe_file: Path, asking: tuple[str, ...], world: Path, tmp_path: Path) -> None:
    """Alignment first, by a recipe that the second one names and that is run where its bundle is not there yet."""
    aligned = (*WITHOUT_OBJECTIVES, *asking, *STEPS, "decoder.adapt=none")
    loaded, _ = recipes.load(
        str(recipe_file),
        [item for item in aligned if not item.startswith("answers.train")]
        + [f"answers.train.captions={{ format = 'captions', images = '{world}/train/*.tar' }}"],
    )
    first = tmp_path / "align.json"
    first.write_text(json.dumps({"recipe": loaded.model_dump(mode="json")}))
    start = (f"decoder.start={tmp_path}/aligned/bundle", f"decoder.recipe={first}")
    run = ran(recipe_file, tmp_path / "run", *WITHOUT_OBJECTIVES, *asking, *STEPS, *start)
    weights, _ = step_of(tmp_path / "aligned", 4)
    assert {name.split(".")[1] for name in weights} == {"projector"}
    begun, _ = step_of(run, 1)
    away = {name: float((begun[name] - value).abs().max()) for name, value in weights.items()}
    assert max(away.values()) < 5e-3, "one step of lr 1e-3 away from where alignment ended"


def test_a_random_tower_has_the_architecture_of_a_folder_and_none_of_its_weights(
    recipe_file: Path, asking: tuple[str, ...], world: Path, tmp_path: Path
) -> None:
    """The control row. Its weights are in no file, so that the bundle has to hold them."""
    trained = ran(recipe_file, tmp_path / "trained", "optim.steps=3")
    control = tmp_path / "control.toml"
    text = recipe_file.read_text()
    start, end = text.index("[student.architecture]"), text.index("[objectives]")
    named = f"[student]\nmodel = 'local-dir:{trained}/model'\npretrained = 'random'"
    control.write_text(text[:start].replace("[student]", named) + text[end:])
    run = ran(control, tmp_path / "run", *WITHOUT_OBJECTIVES, *asking, *STEPS)
    mine, theirs = (load_file(folder / "open_clip_model.safetensors") for folder in (run / "bundle" / "tower", trained / "model"))
    assert mine.keys() == theirs.keys()
    assert not torch.equal(mine["visual.conv1.weight"], theirs["visual.conv1.weight"])


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (("objectives.contrastive=0.0",), ("nothing would be learned", "[answers]")),
        (("evaluation.vqa.x={ format = 'pope', questions = 'x' }",), ("evaluation.vqa", "[decoder]")),
        (("decoder.model=x",), ("[decoder] without [answers]",)),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(
    recipe_file: Path, tmp_path: Path, sets: tuple[str, ...], words: tuple[str, ...]
) -> None:
    finished = train(recipe_file, "--out", tmp_path / "run", sets=sets)
    assert finished.code == EXIT_USER_ERROR
    assert all(word in finished.err for word in words), finished.err


def test_sets_that_need_the_text_tower_are_refused_without_objectives(
    recipe_file: Path, asking: tuple[str, ...], evaluations: tuple[str, ...], tmp_path: Path
) -> None:
    finished = train(recipe_file, "--out", tmp_path / "run", sets=(*WITHOUT_OBJECTIVES, *asking, *evaluations))
    assert finished.code == EXIT_USER_ERROR
    assert "evaluation.zero_shot: without an objective" in finished.err


def test_a_dry_run_shows_the_questions_and_what_comes_first(recipe_file: Path, asking: tuple[str, ...], tmp_path: Path) -> None:
    finished = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=(*WITHOUT_OBJECTIVES, *asking))
    assert finished.code == 0, finished.err
    assert "questions to learn: 1" in finished.out
    assert "dry run: all of this is sound" in finished.out


def test_the_command_line_answers_from_a_bundle_and_merges_it(after: Path, world: Path, tmp_path: Path) -> None:
    with tarfile.open(world / "test" / "00000.tar") as shard:
        member = shard.extractfile(next(name for name in shard.getnames() if name.endswith(".jpg")))
        assert member is not None
        (tmp_path / "image.jpg").write_bytes(member.read())
    asked = [str(tmp_path / "image.jpg"), "how many things are there?"]
    said = CliRunner().invoke(app, ["answer", str(after / "bundle"), *asked], catch_exceptions=False)
    assert said.exit_code == 0
    merged = CliRunner().invoke(app, ["answer", str(after / "bundle"), "--merge", str(tmp_path / "merged")], catch_exceptions=False)
    assert merged.exit_code == 0
    assert not (tmp_path / "merged" / "adapter").exists()
    again = CliRunner().invoke(app, ["answer", str(tmp_path / "merged"), *asked], catch_exceptions=False)
    assert again.stdout == said.stdout
    with pytest.raises(ValueError, match="give an image and a question"):
        CliRunner().invoke(app, ["answer", str(after / "bundle")], catch_exceptions=False)


def test_a_blind_bundle_is_asked_without_an_image(reader: Path, tmp_path: Path) -> None:
    asked = CliRunner().invoke(app, ["answer", str(reader / "bundle"), "is there a red circle?"], catch_exceptions=False)
    assert asked.exit_code == 0
    assert asked.stdout.strip()
    (tmp_path / "image.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="give an image and a question"):
        CliRunner().invoke(app, ["answer", str(reader / "bundle"), str(tmp_path / "image.jpg")], catch_exceptions=False)


def test_conversations_longer_than_the_language_models_positions_are_refused(
    recipe_file: Path, asking: tuple[str, ...], world: Path, tmp_path: Path
) -> None:
    gpt = "{ model_type = 'gpt2', n_embd = 32, n_layer = 1, n_head = 2, n_positions = 66 }"
    named = [item for item in asking if not item.startswith("decoder.model")]
    sets = [*named, f"decoder.tokenizer={world}/tokenizer", f"decoder.architecture={gpt}"]
    finished = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=sets)
    assert finished.code == EXIT_USER_ERROR
    assert "answers.max_length = 64 + evaluation.answer_tokens = 3" in finished.err
    assert "set answers.max_length to 63 at most" in finished.err
    fits = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=[*sets, "answers.max_length=63"])
    assert fits.code == 0, fits.err


def test_questions_that_do_not_divide_by_the_ranks_are_refused_before_the_run(
    recipe_file: Path, asking: tuple[str, ...], tmp_path: Path
) -> None:
    settings, _ = recipes.load(str(recipe_file), [*asking, "answers.batch=9"])
    config = ds_config_module.resolve({}, settings, 2, config_name="", recipe_name="")
    with pytest.raises(ValueError, match=r"answers\.batch = 9 does not divide by 2 ranks"):
        answer.check_batch(settings, settings.decoder, config, World(0, 2, torch.device("cpu")))


def test_fewer_questions_than_places_for_them_are_refused(recipe_file: Path, asking: tuple[str, ...], tmp_path: Path) -> None:
    config = ds_config(tmp_path / "z.json", train_micro_batch_size_per_gpu=1)
    finished = train(recipe_file, "--out", tmp_path / "run", "--ds_config", config, sets=asking)
    assert finished.code == EXIT_USER_ERROR
    assert "answers.batch = 8: less than one question for each" in finished.err
