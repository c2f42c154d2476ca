"""What a dry run finds wrong with a decoder, before a weight is read, also where the models are still to come from other recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megakd.recipe import chain
from megakd.recipe import load as recipes
from megakd.runtime.exits import EXIT_USER_ERROR
from megakd.runtime.launch import World
from megakd.training import prepare
from megakd.training.build import build_learners
from support.runs import TINY_LLAMA, answering, question_source, rows, train

WITHOUT_OBJECTIVES = ("objectives.contrastive=0.0",)
# The tiny student has 4 x 4 patches and one block.
WRONG = [
    ("decoder.image_tokens=25", ("decoder.image_tokens = 25", "4 x 4 patches", "set it to 16 at most")),
    ("decoder.layer=-40", ("decoder.layer = -40", "the vision tower has 1 blocks")),
    ("answers.max_length=4", ("an image becomes 4 tokens", "answers.max_length")),
]


@pytest.fixture(scope="module")
def asking(world: Path) -> tuple[str, ...]:
    """Questions for a decoder that starts from nothing."""
    return (*WITHOUT_OBJECTIVES, f"decoder.architecture={TINY_LLAMA}", f"decoder.tokenizer={world}/tokenizer", *answering(world))


@pytest.fixture(scope="module")
def to_come(recipe_file: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe that starts from a student, a language model and a projector of other recipes; and the folder they are to come into."""
    folder = tmp_path_factory.mktemp("to_come")
    tokenizer, questions = f"{world}/tokenizer", question_source(world, "train", images=False)
    (folder / "student.toml").write_text(recipe_file.read_text())
    (folder / "reads.toml").write_text(
        f"name = 'reads'\n[decoder]\ntokenizer = '{tokenizer}'\nadapt = 'full'\narchitecture = {TINY_LLAMA}\n"
        f"[answers]\nmax_length = 160\ntrain.shapes = {questions}\n[optim]\nsteps = 2\nbatch = 8\nlr = 1e-2\n"
    )
    student = f"[student]\nmodel = 'local-dir:{folder}/student/model'\ntokenizer = '{tokenizer}'\nrecipe = '{folder}/student.toml'\n"
    language = f"[decoder]\nmodel = '{folder}/reads/bundle/language'\nlayer = -1\nimage_tokens = 4\n"
    answers = f"[answers]\nmax_length = 160\ntrain.shapes = {question_source(world, 'train')}\n[optim]\nsteps = 2\nbatch = 8\nlr = 1e-2\n"
    aligned = f"name = 'aligned'\n{student}{language}recipe = '{folder}/reads.toml'\nadapt = 'none'\n{answers}"
    (folder / "aligned.toml").write_text(aligned)
    start = f"start = '{folder}/aligned/bundle'\nrecipe = '{folder}/aligned.toml'\nlora.rank = 4\n"
    (folder / "last.toml").write_text(f"name = 'last'\n{student}{language}{start}{answers}")
    return folder / "last.toml", folder


@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_a_decoder_that_does_not_fit_its_tower_is_refused_before_the_run(
    recipe_file: Path, asking: tuple[str, ...], tmp_path: Path, wrong: str, words: tuple[str, ...]
) -> None:
    for flags in (("--dry_run",), ()):
        finished = train(recipe_file, "--out", tmp_path / "run", *flags, sets=(*asking, wrong))
        assert finished.code == EXIT_USER_ERROR
        assert all(word in finished.err for word in words), finished.err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "said", "remedy"),
    [
        (("decoder.image_tokens=25",), "set it to 16 at most", "decoder.image_tokens=16"),
        (("answers.max_length=4",), "raise that, or lower decoder.image_tokens", "decoder.image_tokens=1"),
        (("answers.max_length=12",), "Raise answers.max_length", "answers.max_length=64"),
        (
            (f"decoder.architecture={TINY_LLAMA[:-2]}, max_position_embeddings = 40 }}", "evaluation.answer_tokens=4"),
            "set answers.max_length to 36 at most",
            "answers.max_length=36",
        ),
    ],
    ids=["image tokens", "fewer of them", "length", "positions"],
)
def test_a_remedy_is_accepted_when_it_is_followed(
    wrong: tuple[str, ...], said: str, remedy: str, recipe_file: Path, asking: tuple[str, ...], tmp_path: Path
) -> None:
    """The second one then says what is too long next, as four tokens hold no question."""
    finished = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=(*asking, *wrong))
    assert finished.code == EXIT_USER_ERROR
    assert said in finished.err
    followed = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=(*asking, *wrong, remedy))
    if remedy == "decoder.image_tokens=1":
        assert "Raise answers.max_length" in followed.err
    else:
        assert followed.code == 0, followed.err


def test_a_dry_run_refuses_what_cannot_answer_and_says_what_adapters_do_not_reach(
    recipe_file: Path, asking: tuple[str, ...], tmp_path: Path
) -> None:
    rwkv = "decoder.architecture={ model_type = 'rwkv', hidden_size = 32, num_hidden_layers = 2 }"
    finished = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=(*asking, rwkv))
    assert finished.code == EXIT_USER_ERROR
    assert "RwkvForCausalLM (rwkv) cannot be a decoder" in finished.err
    mixtral = f"decoder.architecture={TINY_LLAMA.replace('llama', 'mixtral')[:-2]}, num_key_value_heads = 2, num_local_experts = 4 }}"
    finished = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=(*asking, mixtral))
    assert finished.code == 0, finished.err
    assert "LoRA on 8 of 26 matrices" in finished.out
    assert "not covered: model.layers.*.mlp.experts.gate_up_proj" in finished.out


@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_it_is_refused_before_the_models_are_trained_that_it_starts_from(
    to_come: tuple[Path, Path], wrong: str, words: tuple[str, ...]
) -> None:
    recipe, folder = to_come
    for flags in (("--dry_run",), ()):
        finished = train(recipe, "--out", folder / "last", *flags, sets=(wrong,))
        assert finished.code == EXIT_USER_ERROR
        assert all(word in finished.err for word in words), finished.err
    assert {path.suffix for path in folder.iterdir()} == {".toml"}


def test_a_grid_that_is_not_the_one_of_the_projector_to_come_is_refused(to_come: tuple[Path, Path]) -> None:
    recipe, folder = to_come
    finished = train(recipe, "--out", folder / "last", "--dry_run", sets=("decoder.image_tokens=9",))
    assert finished.code == EXIT_USER_ERROR
    assert f"decoder.start = '{folder}/aligned/bundle': its projector was trained with decoder.image_tokens = 4" in finished.err


def test_a_dry_run_says_what_the_decoder_will_be(to_come: tuple[Path, Path]) -> None:
    """Two blocks of 4 * 32 * 32 + 3 * 32 * 48 weights, with adapters of rank 4 beside each."""
    recipe, folder = to_come
    finished = train(recipe, "--out", folder / "last", "--dry_run")
    assert finished.code == 0, finished.err
    adapters = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 48))
    projector = 32 * 32 + 32 + 32 * 32 + 32
    assert f"{adapters + projector:,} trained with the projector; an image becomes 4 tokens, which leaves 156 of 160" in finished.out
    assert [line.split()[3] for line in finished.out.splitlines() if line.startswith("would run first")] == [
        f"{folder}/{name}.toml" for name in ("student", "reads", "aligned")
    ]


def test_what_is_foreseen_is_what_is_built(recipe_file: Path, asking: tuple[str, ...], tmp_path: Path) -> None:
    recipe, origin = recipes.load(str(recipe_file), asking)
    world = World(0, 1, torch.device("cpu"))
    plan = prepare.prepare(prepare.RunRequest(recipe, origin, None, tmp_path / "run"), world)
    (questions,) = plan.tasks
    shapes = {name: value.shape for name, value in questions.outline.named_parameters() if value.requires_grad}
    module, _ = build_learners(plan, [questions.start(plan.config, world, None)], world, print)
    learned = {name.removeprefix("decoder."): value.shape for name, value in module.named_parameters() if value.requires_grad}
    assert shapes == learned
    assert shapes


def test_a_corrected_recipe_starts_in_the_same_folder(recipe_file: Path, asking: tuple[str, ...], tmp_path: Path) -> None:
    """The first one ends after run.json is written, without a checkpoint."""
    run = tmp_path / "run"
    run.mkdir()
    broken, _ = recipes.load(str(recipe_file), (*asking, "decoder.image_tokens=25"))
    (run / "run.json").write_text(json.dumps({"recipe": broken.model_dump(mode="json")}))
    finished = train(recipe_file, "--out", run, sets=(*asking, "optim.steps=2", "optim.warmup=0"))
    assert finished.code == 0, finished.err
    assert [row["step"] for row in rows(run)] == [1, 2]
    refused = train(recipe_file, "--out", run, sets=(*asking, "optim.steps=3", "optim.warmup=0"))
    assert refused.code == EXIT_USER_ERROR
    assert "belongs to a run of another recipe" in refused.err


def test_a_recipe_that_cannot_train_what_it_is_named_for_is_refused(to_come: tuple[Path, Path], recipe_file: Path) -> None:
    recipe, folder = to_come
    settings, _ = recipes.load(str(recipe), [f"student.recipe={folder}/reads.toml", f"decoder.recipe={recipe_file}"])
    assert settings.student is not None
    assert settings.decoder is not None
    with pytest.raises(ValueError, match=r"student\.recipe = .*: has no \[student\]"):
        chain.model(settings.student, "student")
    with pytest.raises(ValueError, match=r"decoder\.recipe = .*: has no \[decoder\]"):
        chain.decoder(settings.decoder)
