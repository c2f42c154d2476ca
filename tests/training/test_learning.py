"""What learns and how fast: frozen parts have no gradient, no state and no motion, and rates and decays reach the parts they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megakd.models import clip
from megakd.models.places import freeze
from megakd.models.student import Student
from megakd.planning import plan as planning
from megakd.planning.cluster import Cluster
from megakd.recipe import Recipe
from megakd.recipe import Student as Settings
from megakd.recipe import load as recipes
from megakd.runtime import checkpoint, launch
from megakd.runtime.engine import Engine
from megakd.runtime.run_folder import RunLog
from megakd.training import prepare
from megakd.training.build import build_learners
from megakd.training.learning import paces
from megakd.training.optim import parameter_groups
from support.runs import EVERY_OBJECTIVE, TEACHER, curve, ds_config, finish, ran, rows, settings, start_ranks, train, zero

BLOCKS = ("student.architecture.vision_cfg.layers=3", "student.architecture.text_cfg.layers=2")
FROZEN = (*BLOCKS, "student.freeze=['text', 'image.embeddings', 'image.blocks.0-1']")


def weights(run: Path, at: int = -1) -> dict[str, Tensor]:
    return checkpoint.load_weights(checkpoint.available(run)[at])[1]


def is_frozen(name: str) -> bool:
    """By FROZEN."""
    image = name.startswith("clip.visual.")
    learns = image and ("resblocks.2" in name or "ln_post" in name or name.endswith("visual.proj"))
    return not learns and not name.startswith(("clip.logit_", "heads."))


def student_of(recipe: Recipe) -> Student:
    assert recipe.student is not None
    with torch.device("meta"):
        module = Student(clip.on_meta(clip.resolve(recipe.student, "student")).clip, {}, 100.0)
    freeze(module, recipe.student.freeze)
    return module


def loaded(recipe_file: Path, *sets: str) -> Recipe:
    return recipes.load(str(recipe_file), sets)[0]


def test_frozen_parts_stay_as_they_were_and_are_saved_and_exported_all_the_same(recipe_file: Path, tmp_path: Path) -> None:
    run = ran(recipe_file, tmp_path / "run", *FROZEN, "optim.warmup=0")
    first, last = weights(run, 0), weights(run)
    same = {name for name, value in first.items() if torch.equal(value, last[name])}
    assert same == {name for name in first if is_frozen(name)}
    _, state = checkpoint.load(checkpoint.available(run)[-1])
    assert {name.partition("/")[2] for name in state.moments} == set(first) - same
    import open_clip

    exported = open_clip.create_model(f"local-dir:{run / 'model'}").state_dict()
    assert torch.equal(exported["token_embedding.weight"], first["clip.token_embedding.weight"])


def test_a_run_with_frozen_parts_goes_on_to_the_last_bit(recipe_file: Path, tmp_path: Path) -> None:
    whole = ran(recipe_file, tmp_path / "whole", *FROZEN)
    (tmp_path / "again").mkdir()
    for name in ("run.json", "metrics.jsonl"):
        (tmp_path / "again" / name).write_bytes((whole / name).read_bytes())
    resumed = train(recipe_file, "--out", tmp_path / "again", "--resume", checkpoint.available(whole)[0], sets=FROZEN)
    assert resumed.code == 0, resumed.err
    assert curve(tmp_path / "again") == curve(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(tmp_path / "again").items())
    other = train(recipe_file, "--out", whole, sets=(*BLOCKS, "student.freeze=['text']"))
    assert "student.freeze" in other.err, "another choice is another run"


def test_every_objective_learns_beside_a_frozen_text_tower_in_bf16_as_well(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGAKD_PRECISION", "bf16")
    config = ds_config(tmp_path / "ds.json", zero_optimization=zero(1), bf16={"enabled": True}, train_micro_batch_size_per_gpu=8)
    sets = (*EVERY_OBJECTIVE, "student.freeze=['text']", "optim.steps=3", "optim.warmup=0", "checkpoint.every=1", "checkpoint.keep=3")
    run = ran(recipe_file, tmp_path / "run", *sets, config=config)
    first, last = weights(run, 0), weights(run)
    moved = {name for name, value in first.items() if not torch.equal(value, last[name])}
    assert any(name.startswith("clip.visual.") for name in moved)
    assert all(name.startswith(("clip.visual.", "clip.logit_", "heads.")) for name in moved)
    words = last["clip.token_embedding.weight"]
    assert not torch.equal(words, words.bfloat16().float()), "saved as they came, not as the engine rounds them"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_engine_has_no_gradient_and_no_state_of_what_is_frozen(stage: int, recipe_file: Path, tmp_path: Path) -> None:
    config = ds_config(tmp_path / "ds.json", zero_optimization=zero(stage))
    recipe, origin = recipes.load(str(recipe_file), (*FROZEN, "student.activation_checkpointing=true"))
    world = launch.start()
    try:
        plan = prepare.prepare(prepare.RunRequest(recipe, origin, str(config), tmp_path / "run"), world)
        log = RunLog(tmp_path / "run", main=True)
        tasks = [task.start(plan.config, world, log) for task in plan.tasks]
        module, groups = build_learners(plan, tasks, world, log.say)
        learned = sum(parameter.numel() for name, parameter in module.named_parameters() if not is_frozen(name))
        engine = Engine(module, groups, recipe.optim, plan.config, world, None, module.frozen)
        pixels, tokens = torch.randn(4, 3, 32, 32), torch.randint(1, 100, (4, 32))
        outputs = engine.forward(pixels=pixels, tokens=tokens)
        assert not outputs["text"].requires_grad
        engine.backward((outputs["image"] @ outputs["text"].T).square().sum())
        assert all(parameter.grad is None for name, parameter in engine.module.named_parameters() if is_frozen(name))
        engine.update(1e-3)
        assert engine.gradient_norm > 0
        held = sum(one["exp_avg"].numel() for one in engine._base_optimizer().state.values())
        assert learned <= held <= learned + 16, "DeepSpeed pads its flat groups"
        planned = planning.job_of(recipe, origin, str(config), Cluster(1, "cpu", 64.0)).student
        assert sum(planned.sizes) == learned
        assert sum(planned.frozen) == sum(parameter.numel() for parameter in student_of(recipe).parameters()) - learned
        engine.close()
    finally:
        launch.stop()


def test_a_frozen_tower_costs_the_plan_no_activations_and_half_of_its_flops(recipe_file: Path) -> None:
    whole, frozen = (planning.job_of(loaded(recipe_file, *sets), "tiny", None, Cluster(1, "cpu", 64.0)).student for sets in ((), FROZEN))
    assert frozen.saved < 0.6 * whole.saved
    assert frozen.numel + sum(frozen.frozen) > whole.numel == sum(whole.sizes)
    assert whole.pair_backward == 2
    assert 0 < frozen.pair_backward < 1


@pytest.mark.parametrize("vision", ["ViT", "ResNet"])
def test_frozen_parts_neither_drop_out_nor_move_their_statistics(vision: str, recipe_file: Path) -> None:
    text = {"context_length": 16, "width": 32, "heads": 2, "layers": 2}
    tower: dict[str, Any] = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32, "patch_size": None}
    if vision == "ViT":
        tower = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32, "patch_dropout": 0.5}
    built = clip.build(
        clip.resolve(Settings(architecture={"embed_dim": 16, "vision_cfg": tower, "text_cfg": text}), "student"), torch.device("cpu")
    )
    module = Student(built.clip, {}, 100.0).train()
    pixels = torch.randn(4, 3, 32, 32)
    assert not torch.equal(module.clip.encode_image(pixels), module.clip.eval().encode_image(pixels)), "the test must show a difference"  # type: ignore[operator]
    freeze(module, ["image"])
    for _ in range(2):
        module.eval()
        module.train()
    assert module.training
    assert not any(part.training for part in module.clip.visual.modules())  # type: ignore[union-attr]
    assert module.clip.transformer.training  # type: ignore[union-attr]
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    first, second = (module.clip.encode_image(pixels) for _ in range(2))  # type: ignore[operator]
    assert torch.equal(first, second)
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


def test_rates_layer_decay_and_decays_reach_the_parts_they_name(recipe_file: Path) -> None:
    optim = loaded(
        recipe_file,
        *BLOCKS,
        "optim.lr=1e-3",
        "optim.rates={ text = 1e-4, 'image.blocks' = 2e-3, 'image.blocks.2' = 4e-3, scale = 5e-3 }",
        "optim.layer_decay={ image = 0.5 }",
        "optim.decays={ text = 0.01, vectors = 0.3 }",
    ).optim
    module = student_of(loaded(recipe_file, *BLOCKS))
    pace = paces(module, optim, {})
    found = {name: pace(name, parameter) for name, parameter in module.named_parameters()}
    factors = {
        name: found[name].factor for name in found if name.startswith("clip.visual.") or "logit" in name or "text_projection" in name
    }
    assert factors["clip.visual.conv1.weight"] == pytest.approx(0.5**4), "3 blocks and the embeddings below them"
    assert factors["clip.visual.transformer.resblocks.0.ln_1.weight"] == pytest.approx(2 * 0.5**3)
    assert factors["clip.visual.transformer.resblocks.1.ln_1.weight"] == pytest.approx(2 * 0.5**2)
    assert factors["clip.visual.transformer.resblocks.2.ln_1.weight"] == pytest.approx(4 * 0.5), "the narrowest name counts"
    assert factors["clip.visual.proj"] == 1
    assert factors["clip.logit_scale"] == pytest.approx(5)
    assert factors["clip.text_projection"] == pytest.approx(0.1)
    assert found["clip.text_projection"].decay == 0.01
    assert found["clip.visual.proj"].decay == optim.weight_decay
    assert found["clip.visual.ln_post.bias"].decay == found["clip.ln_final.weight"].decay == 0.3
    groups = parameter_groups(module, pace)
    assert sum(len(group["params"]) for group in groups) == len(found)  # type: ignore[arg-type]


def test_a_parts_rate_moves_its_weights_and_is_logged(recipe_file: Path, tmp_path: Path) -> None:
    """AdamW's first update is lr * g / (|g| + eps): of the scale, its rate."""
    sets = (*BLOCKS, "optim.steps=2", "optim.warmup=0", "optim.eps=1e-9", "optim.rates.scale=0.1", "optim.rates.image.head=1e-2")
    run = ran(recipe_file, tmp_path / "run", *sets)
    first, last = rows(run)
    assert abs(torch.tensor(last["scale"] / first["scale"]).log().item()) == pytest.approx(0.1, rel=0.01)
    assert first["rates"] == {"scale": pytest.approx(0.1), "image.head": pytest.approx(1e-2)}
    assert last["rates"]["scale"] == pytest.approx(0.05)
    assert "rates" not in rows(ran(recipe_file, tmp_path / "plain", "optim.steps=1", "optim.warmup=0"))[0]


def test_the_dry_run_says_what_learns_and_how_fast(recipe_file: Path, tmp_path: Path) -> None:
    sets = (*FROZEN, "optim.layer_decay=0.5", "optim.rates.heads=1e-2", *TEACHER, "objectives.feature=1.0", "optim.decays.image=0.1")
    said = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=sets)
    assert said.code == 0, said.err
    assert "of the student's" in said.out
    assert "frozen: text, image.embeddings, image.blocks.0-1" in said.out
    assert "learning rates: 0.001; heads 0.01" in said.out
    assert "layer decay of image: 0.5 for each of 3 blocks; 0.5 in the last, 0.0625 in its embeddings" in said.out
    assert "layer decay of text" not in said.out
    assert "weight decay: 0.2; image 0.1" in said.out


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("student.freeze=['txt']",), "student.freeze = ['txt']: 'txt': no part of a student; did you mean 'text'? known are image,"),
        (("student.freeze=['image', 'text']",), "nothing of the student would learn"),
        (("student.freeze=['image.blocks', 'image.head', 'image.embeddings', 'text']",), "nothing of the student would learn"),
        (("student.freeze=['image.blocks.0-5']",), "the student's image tower has 3 blocks, 0 to 2"),
        (("student.freeze=['image.blocks.2-1']",), "a range of blocks begins with the lower number: write image.blocks.1-2"),
        (("student.freeze=['heads']",), "heads have no weights of their own to keep"),
        (("student.freeze=['text']", "optim.rates.text=1e-4"), "optim.rates.text: student.freeze = ['text'] holds all of it"),
        (("student.freeze=['text']", "optim.layer_decay={ text = 0.5 }"), "optim.layer_decay.text: student.freeze = ['text'] holds"),
        (("optim.rates={ imag = 1e-4 }",), "rates.imag: no part of a student; did you mean 'image'?"),
        (("optim.rates={ decoder = 1e-4 }",), "and answers.lr how fast"),
        (("optim.rates={ heads = 1e-4 }",), "optim.rates.heads: the student has no such part; its objectives train no heads"),
        (("optim.rates={ 'image.blocks.0-1' = 1e-4, 'image.blocks.1-2' = 1e-3 }",), "rates.image.blocks.1-2 share a block"),
        (("optim.rates={ image = 0 }",), "optim.rates.image = 0: Input should be greater than 0"),
        (("optim.decays={ 'text.blocks.7' = 0.1 }",), "optim.decays.text.blocks.7: the student's text tower has 2 blocks, 0 to 1"),
        (("optim.layer_decay=1.5",), "optim.layer_decay = 1.5: 1.5: give a factor above 0 and up to 1"),
        (("optim.layer_decay={ imag = 0.5 }",), "'imag' is no tower: did you mean 'image'?"),
        (("optim.cooldown=2",), "cooldown = 2 is for schedule = 'wsd', and schedule is 'cosine'"),
        (("optim.cooldown_shape=sqrt",), "cooldown_shape = 'sqrt' is for schedule = 'wsd'"),
        (("optim.schedule=wsd",), "give their number as cooldown"),
        (("optim.schedule=wsd", "optim.cooldown=5"), "warmup = 2 and cooldown = 5 are more than steps = 6"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_a_model_is_loaded(
    sets: tuple[str, ...], message: str, recipe_file: Path, tmp_path: Path
) -> None:
    refused = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=(*BLOCKS, *sets))
    assert refused.code == 2
    assert message in refused.err, refused.err


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_of_any_stage_learn_as_one_does_with_frozen_parts(stage: int, recipe_file: Path, tmp_path: Path) -> None:
    sets = (*FROZEN, *TEACHER, "objectives.similarity=1.0", "objectives.feature=0.5", "student.activation_checkpointing=true")
    alone = ran(recipe_file, tmp_path / "alone", *sets, "optim.rates.heads=2e-3", "optim.layer_decay=0.7")
    config = ds_config(tmp_path / "ds.json", zero_optimization=zero(stage), train_micro_batch_size_per_gpu=4)
    more = settings(*sets, "optim.rates.heads=2e-3", "optim.layer_decay=0.7")
    both = start_ranks("--recipe", recipe_file, "--out", tmp_path / "both", "--ds_config", config, *more)
    assert [finish(rank).code for rank in both] == [0, 0]
    for one, two in zip(rows(alone), rows(tmp_path / "both"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(tmp_path / "both")[name], value, rtol=1e-3, atol=1e-5)
    assert json.loads((tmp_path / "both" / "run.json").read_text())["recipe"]["student"]["freeze"]
