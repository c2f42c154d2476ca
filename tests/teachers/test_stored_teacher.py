"""Training from a store of embeddings: the losses of the live teacher on the same views, misses taught live, or refused, by every rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.benchmarks import cached
from megakd.models.embeddings import Embeddings
from megakd.recipe import load as recipes
from megakd.runtime import checkpoint
from megakd.runtime.launch import World
from megakd.teachers.cached import StoredTeacher
from megakd.teachers.embed import EmbedJob
from megakd.teachers.embed_request import EmbedRequest
from support.runs import KD, TRAIN, Finished, curve, losses, rows, run_ranks, settings, train
from support.stores import write_stores

ALONE = World(0, 1, torch.device("cpu"))
STEPS = 14  # of 96 pairs: an epoch has 6, so the third epoch takes the first view again
LONG = ("optim.batch=96", f"optim.steps={STEPS}", "data.workers=1")
PARTS = 10  # of 64 samples


class Stores:
    """Stores of the tiny recipe's teacher, two views each: whole in both types, and with parts taken away."""

    def __init__(self, folder: Path, recipe_file: Path) -> None:
        recipe, _ = recipes.load(str(recipe_file), KD)
        self.folder = write_stores(recipe, folder)

    def __call__(self, name: str, *more: str) -> tuple[str, ...]:
        """Overrides of a run that trains from it."""
        return (*KD, *LONG, f"teacher.store={self.folder / name}", *more)


@pytest.fixture(scope="module")
def stores(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    return Stores(tmp_path_factory.mktemp("stores"), recipe_file)


@pytest.fixture(scope="module")
def run(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Finished]]:
    folder = tmp_path_factory.mktemp("runs")

    def go(name: str, sets: tuple[str, ...]) -> tuple[Path, Finished]:
        finished = train(recipe_file, "--out", folder / name, sets=sets)
        return folder / name, finished

    return go


@pytest.fixture(scope="module")
def live(run, stores: Stores) -> Path:
    """The live teacher on the stored views: the store is known, and has nothing."""
    out, finished = run("live", stores("empty"))
    assert finished.code == 0, finished.err
    assert len(losses(out)) == STEPS
    return out


def test_training_from_an_exact_store_has_the_losses_of_the_live_teacher(run, stores: Stores, live: Path) -> None:
    out, finished = run("fp32", stores("fp32"))
    assert finished.code == 0, finished.err
    for row, expected in zip(rows(out), rows(live), strict=True):
        assert row["losses"] == pytest.approx(expected["losses"], rel=1e-5)


def test_another_scale_reads_the_same_store(run, stores: Stores, live: Path) -> None:
    told = ("teacher.scale=40", "teacher.store_miss=fail", "optim.steps=3")
    out, finished = run("scaled", stores("fp32", *told))
    assert finished.code == 0, finished.err
    of_live, _ = run("scaled_live", stores("empty", "teacher.scale=40", "optim.steps=3"))
    for row, expected in zip(rows(out), rows(of_live), strict=True):
        assert row["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert rows(out)[0]["losses"]["feature"] == pytest.approx(rows(live)[0]["losses"]["feature"], rel=1e-5)
    assert rows(out)[0]["losses"]["similarity"] != pytest.approx(rows(live)[0]["losses"]["similarity"], rel=1e-2)


def test_the_seed_of_the_views_is_apart_from_the_runs(run, recipe_file: Path, tmp_path: Path) -> None:
    recipe, _ = recipes.load(str(recipe_file), (*KD, "views.seed=9"))
    EmbedJob(recipe, EmbedRequest(tmp_path / "whole", 2, "fp32"), ALONE, part=64).embed()
    same = (*KD, *LONG, "optim.steps=4", "optim.warmup=0")
    from_store = (*same, f"teacher.store={tmp_path / 'whole'}", "teacher.store_miss=fail")
    out, finished = run("other_views", (*from_store, "views.seed=9"))
    assert finished.code == 0, finished.err
    (tmp_path / "empty").mkdir()
    shutil.copy(tmp_path / "whole" / "manifest.json", tmp_path / "empty")
    of_live, _ = run("other_views_live", (*same, f"teacher.store={tmp_path / 'empty'}", "views.seed=9"))
    for row, expected in zip(rows(out), rows(of_live), strict=True):
        assert row["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    _, refused = run("own_views", from_store)
    assert refused.code == 2
    assert "seed: 9 in the store, 0 in the recipe" in refused.err
    assert "set views.seed to 9, which leaves the run its own seed" in refused.err


def test_training_from_a_bf16_store_has_them_within_rounding(run, stores: Stores, live: Path) -> None:
    out, finished = run("bf16", stores("bf16"))
    assert finished.code == 0, finished.err
    for row, expected in zip(rows(out), rows(live), strict=True):
        assert row["losses"] == pytest.approx(expected["losses"], rel=1e-2)
    assert losses(out) != losses(live)


def test_a_whole_store_needs_no_teacher(run, stores: Stores, monkeypatch) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("the teacher was built")

    monkeypatch.setattr("megakd.teachers.replicated.ReplicatedTeacher.load", build)
    out, finished = run("without_teacher", stores("fp32", "teacher.store_miss=fail"))
    assert finished.code == 0, finished.err
    assert "600 of 600 samples, 2 views each, fp32" in finished.out
    assert "teacher" in rows(out)[0]["seconds"]
    with pytest.raises(AssertionError, match="the teacher was built"):
        run("with_teacher", stores("partial"))


TEXT = ("teacher.store_of=text", "teacher.store_miss=fail")


@pytest.mark.parametrize("mode", ["replicated", "replicated_int8", "zero3_int8"])
def test_texts_from_a_store_and_images_live_train_on_fresh_augmentations_as_the_whole_teacher(
    run, stores: Stores, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The text tower is not loaded. int8 images beside exact texts are within quantisation error, which training adds up."""
    whole, by_whole = run(f"whole_{mode}", (*KD, *LONG, f"teacher.mode={mode}"))
    assert by_whole.code == 0, by_whole.err
    out, finished = run(f"text_{mode}", stores("fp32", *TEXT, f"teacher.mode={mode}"))
    assert finished.code == 0, finished.err
    assert ("made.int8: False in the store, True in the recipe" in caplog.text) == mode.endswith("int8")
    steps, tolerance = (STEPS, 1e-5) if mode == "replicated" else (4, 2e-2)
    for row, expected in list(zip(rows(out), rows(whole), strict=True))[:steps]:
        assert row["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    assert losses(out) != losses(run("replayed", stores("fp32"))[0])  # which sees other augmentations


def test_texts_of_other_augmentations_may_be_used(run, stores: Stores) -> None:
    _, finished = run("flipped_text", stores("fp32", *TEXT, "views.flip=0.0", "optim.steps=2", "optim.warmup=0"))
    assert finished.code == 0, finished.err


def test_two_ranks_with_different_misses_train_as_one_with_a_whole_store(run, stores: Stores, recipe_file: Path, tmp_path: Path) -> None:
    one, _ = run("one", stores("fp32"))
    said = "".join(run_ranks(TRAIN, "--recipe", recipe_file, "--out", tmp_path / "two", *settings(*stores("partial"))))
    assert "5 of 10 parts are not usable" in said
    assert "samples of this batch are not in the store" in said
    for row, expected in zip(rows(tmp_path / "two"), rows(one), strict=True):
        assert row["losses"] == pytest.approx(expected["losses"], rel=1e-5)


def test_a_resumed_run_takes_the_views_that_an_undisturbed_one_takes(run, stores: Stores, recipe_file: Path) -> None:
    sets = stores("bf16", "checkpoint.every=4", "checkpoint.keep=9")
    whole, _ = run("whole", sets)
    half = Path(shutil.copytree(whole, whole.with_name("half")))
    for path in checkpoint.available(half)[2:]:
        shutil.rmtree(path)
    finished = train(recipe_file, "--out", half, sets=sets)
    assert "step 8 of 14" in finished.out
    assert curve(half) == curve(whole)


@pytest.mark.parametrize(
    ("store", "sets", "said"),
    [
        ("fp32", ("seed=3",), ["seed: 0 in the store, 3 in the recipe", "weights.name: 'random, seed 0' in the store"]),
        ("fp32", ("views.flip=0.0",), ["views.flip: 0.5 in the store, 0.0 in the recipe"]),
        ("fp32", ("teacher.architecture.vision_cfg.layers=3",), ["teacher.vision_cfg.layers: 1 in the store, 3 in the recipe"]),
        ("partial", ("teacher.store_miss=fail",), ["5 of 10 parts are not usable", "000000.safetensors: missing"]),
        ("partial", TEXT, ["parts/000000.safetensors: missing"]),
        ("nowhere", (), ["no store of embeddings"]),
    ],
    ids=["seed", "views", "teacher", "missing parts", "missing texts", "no store"],
)
def test_an_unfit_store_ends_the_run_before_models_are_built(
    run, stores: Stores, store: str, sets: tuple[str, ...], said: list[str]
) -> None:
    out, finished = run("refused", stores(store, *sets))
    assert finished.code == 2
    assert all(words in finished.err for words in said), finished.err
    assert not (out / "run.json").exists()


def test_a_teacher_that_no_objective_uses_leaves_its_store_alone(run, tmp_path: Path) -> None:
    sets = (*KD, f"teacher.store={tmp_path / 'nothing'}", "objectives.similarity=0.0", "objectives.feature=0.0")
    _, finished = run("unused", sets)
    assert finished.code == 0, finished.err


def test_the_benchmarks_teacher_costs_ten_times_its_students_step() -> None:
    ratio = cached.cost(cached.TEACHER, training=False) / cached.cost(cached.STUDENT, training=True)
    assert ratio == pytest.approx(10, rel=0.02)


# The teacher's part alone


class Live:
    """Stands for a model: an embedding is the sample's number, and every call is counted."""

    width, dtype = 2, torch.float32

    def __init__(self) -> None:
        self.calls: list[int] = []

    def embed(self, pixels: torch.Tensor, tokens: torch.Tensor, blocks: tuple[int, ...] = ()) -> Embeddings:
        self.calls.append(len(pixels))
        return Embeddings(pixels, tokens, torch.tensor(1.0))


def stored(live: Live, miss: str, world: World = ALONE) -> StoredTeacher:
    def reread(index: torch.Tensor, view: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if len(index) == 0:
            return torch.full((1, 2), -1.0), torch.full((1, 2), -1.0)
        return torch.stack([index, view], 1).to(dtype), torch.stack([index, -index], 1).to(dtype)

    return StoredTeacher(
        width=2, scale=3.5, bias=-2.0, dtype=torch.float32, world=world, miss=miss, build=lambda: live, reread=reread,
        where=lambda index: f"shard: {index}", piece=2,
    )  # fmt: skip


INDEX, VIEW = torch.tensor([10, 11, 12, 13, 14]), torch.tensor([0, 1, 0, 1, 0])
KNOWN = torch.tensor([False, True, False, True, False])


def test_missed_rows_are_taught_in_pieces_and_put_in_their_places() -> None:
    live = Live()
    found = stored(live, "teacher").recall(torch.full((5, 2), 7.0), torch.full((5, 2), 8.0), KNOWN, INDEX, VIEW)
    assert found.image.tolist() == [[10, 0], [7, 7], [12, 0], [7, 7], [14, 0]]
    assert found.text.tolist() == [[10, -10], [8, 8], [12, -12], [8, 8], [14, -14]]
    assert (float(found.scale), float(found.bias)) == (3.5, -2.0)
    assert live.calls == [2, 1]


def test_a_rank_without_misses_calls_the_teacher_as_often_as_the_one_with_most(monkeypatch) -> None:
    """A sharded teacher communicates in `embed`: a rank that stayed away would hang the others."""
    live = Live()
    teacher = stored(live, "teacher", World(0, 2, torch.device("cpu")))
    monkeypatch.setattr("megakd.teachers.cached._misses", lambda mine, world: [mine, 5])
    found = teacher.recall(torch.full((5, 2), 7.0), torch.full((5, 2), 8.0), torch.ones(5, dtype=torch.bool), INDEX, VIEW)
    assert live.calls == [1, 1, 1]
    assert found.image.tolist() == [[7, 7]] * 5


def test_a_miss_of_any_rank_fails_on_every_rank_where_it_is_to_fail(monkeypatch) -> None:
    teacher = stored(Live(), "fail", World(0, 2, torch.device("cpu")))
    monkeypatch.setattr("megakd.teachers.cached._misses", lambda mine, world: [mine, 5])
    with pytest.raises(ValueError, match=r"8 samples of this batch are not in the store.*Example: shard: 10"):
        teacher.recall(torch.zeros(5, 2), torch.zeros(5, 2), KNOWN, INDEX, VIEW)
    with pytest.raises(ValueError, match=r"5 samples of this batch are not in the store.*Example: on another rank"):
        teacher.recall(torch.zeros(5, 2), torch.zeros(5, 2), torch.ones(5, dtype=torch.bool), INDEX, VIEW)
