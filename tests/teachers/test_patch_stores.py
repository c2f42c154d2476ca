"""Patch tokens from a store: the losses of the live teacher averaged to the same grid, its misses, its checks, and what is refused."""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megakd.data.store import writer
from megakd.data.store.reader import Store, StoreError
from megakd.planning import plan as planning
from megakd.planning import report
from megakd.planning.cluster import Cluster
from megakd.recipe import Recipe
from megakd.recipe import load as recipes
from megakd.runtime.launch import World
from megakd.teachers import embed
from megakd.teachers.embed import EmbedJob, EmbedRequest
from support import PROGRAMS
from support.processes import python
from support.runs import ENSEMBLE, TRAIN, losses, rows, run_ranks, settings, train, wait_for
from support.stores import write_stores

ALONE = World(0, 1, torch.device("cpu"))
PROGRAM = PROGRAMS / "embed.py"
# 5 x 5 patches on 2 x 2 cells, whose borders cut patches; the student's 4 x 4 are brought to the same.
TEACHER = (
    "teacher.architecture={ embed_dim = 24, vision_cfg = { image_size = 40, patch_size = 8, width = 32, layers = 2, head_width = 16 }, "
    "text_cfg = { context_length = 24, width = 32, heads = 2, layers = 1 } }",
    "teacher.pretrained=random",
    "teacher.patch_grid=[2, 2]",
    "objectives.similarity=1.0",
    "objectives.patch=0.5",
    "patch={ blocks = [-1], standardise = 'phi_s', statistics = 3, loss = 'smooth_l1' }",
    "objectives.patch_relation=2.0",
    "patch_relation={ blocks = [0], teacher_blocks = [-2] }",
)
STEPS, PARTS = 8, 10  # of 96 pairs: an epoch has 6, so the second takes the other view; parts of 64 samples
LONG = ("optim.batch=96", f"optim.steps={STEPS}", "data.workers=1")


@pytest.fixture(scope="module")
def recipe(recipe_file: Path) -> Recipe:
    return recipes.load(str(recipe_file), TEACHER)[0]


@pytest.fixture(scope="module")
def folder(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of stores: whole in both types, and with parts taken away."""
    return write_stores(recipe, tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def live(recipe_file: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The live teacher on the stored views: the store is known, and has nothing."""
    return _ran(recipe_file, tmp_path_factory.mktemp("live") / "run", folder / "empty")


def _ran(recipe_file: Path, out: Path, store: Path, *sets: str) -> Path:
    finished = train(recipe_file, "--out", out, sets=(*TEACHER, *LONG, f"teacher.store={store}", *sets))
    assert finished.code == 0, finished.err
    return out


@pytest.mark.parametrize(("store", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_training_from_a_store_has_the_losses_of_the_live_teacher_on_that_grid(
    recipe_file: Path, folder: Path, live: Path, tmp_path: Path, store: str, tolerance: float
) -> None:
    """With the statistics of PHI-S from stored rows, on augmented images, and without a teacher in memory."""
    out = _ran(recipe_file, tmp_path / "run", folder / store, "teacher.store_miss=fail")
    assert len(rows(out)) == STEPS
    for row, expected in zip(rows(out), rows(live), strict=True):
        assert set(row["losses"]) >= {"patch", "patch_relation", "similarity"}
        assert row["losses"] == pytest.approx(expected["losses"], rel=tolerance)


def test_attention_maps_come_from_stored_tokens_as_from_live_ones_and_attention_weights_from_none(
    recipe_file: Path, folder: Path, tmp_path: Path
) -> None:
    alone = (
        "objectives.patch=0",
        "objectives.patch_relation=0",
        "objectives.attention=1",
        "attention={ blocks = [0], teacher_blocks = [-2] }",
    )
    runs = {}
    for store, miss in {"empty": "teacher", "fp32": "fail"}.items():
        out = _ran(recipe_file, tmp_path / store, folder / store, *alone, "optim.steps=3", f"teacher.store_miss={miss}")
        runs[store] = [row["losses"]["attention"] for row in rows(out)]
    assert runs["fp32"] == pytest.approx(runs["empty"], rel=1e-5)
    refused = train(recipe_file, "--dry_run", sets=(*TEACHER, *alone[:3], "attention.map=weights", f"teacher.store={folder / 'fp32'}"))
    assert refused.code == 2
    assert "attention.map = 'weights': teacher.store holds no attention; set it to 'activation'" in refused.err


def test_two_ranks_with_different_misses_train_as_one_with_a_whole_store(
    recipe_file: Path, folder: Path, live: Path, tmp_path: Path
) -> None:
    sets = (*TEACHER, *LONG, f"teacher.store={folder / 'partial'}", "data.workers=0")
    said = "".join(run_ranks(TRAIN, "--recipe", recipe_file, "--out", tmp_path / "two", *settings(*sets)))
    assert "5 of 10 parts are not usable" in said
    assert "patch tokens of blocks 0 (width 32), 1 (width 32) on 2 x 2" in said
    for row, expected in zip(rows(tmp_path / "two"), rows(live), strict=True):
        assert row["losses"] == pytest.approx(expected["losses"], rel=1e-4)


def test_a_live_teacher_without_a_store_is_averaged_to_the_grid_too(recipe_file: Path, tmp_path: Path) -> None:
    """On fresh augmentations, as with texts from a store; another grid is another loss."""
    runs = {}
    for name, sets in {"coarse": (), "fine": ("teacher.patch_grid=[4, 4]",)}.items():
        finished = train(recipe_file, "--out", tmp_path / name, sets=(*TEACHER, *sets, "optim.steps=2", "optim.warmup=0"))
        assert finished.code == 0, finished.err
        runs[name] = losses(tmp_path / name)
    assert runs["coarse"] != runs["fine"]
    resumed = train(recipe_file, "--out", tmp_path / "fine", sets=(*TEACHER, "optim.steps=3", "optim.warmup=0"))
    assert resumed.code == 2
    assert "teacher.patch_grid" in resumed.err


def test_a_store_with_patch_tokens_serves_objectives_that_read_none_or_fewer(recipe_file: Path, folder: Path, tmp_path: Path) -> None:
    short = ("optim.steps=2", "optim.warmup=0", "objectives.patch=0.0", "teacher.store_miss=fail", f"teacher.store={folder / 'fp32'}")
    for more, losses_of, said in (
        ((), {"contrastive", "similarity", "patch_relation"}, "on 2 x 2\n"),
        (("objectives.patch_relation=0.0",), {"contrastive", "similarity"}, "on 2 x 2, which no objective reads\n"),
    ):
        finished = train(recipe_file, "--out", tmp_path / str(len(more)), sets=(*TEACHER, *short, *more))
        assert finished.code == 0, finished.err
        assert said in finished.out
        assert set(rows(tmp_path / str(len(more)))[0]["losses"]) == losses_of


# What `megakd embed` writes


def test_two_ranks_finish_a_killed_jobs_store_as_one_rank_writes_it(recipe_file: Path, folder: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "store", [PROGRAM, recipe_file, tmp_path / "store", "2", "64", json.dumps(list(TEACHER))]
    first = python(*told)
    wait_for(lambda: len(list(out.glob("parts/0*"))) >= 2, first)
    first.kill()
    first.communicate()
    done = len(list(out.glob("parts/0*")))
    assert 2 <= done < PARTS
    again, _ = run_ranks(*told)
    assert f"{done} of {PARTS} parts are there" in again
    whole = folder / "bf16"
    names = [str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file() and path.name != "lock"]
    assert len(names) == PARTS + 1
    assert filecmp.cmpfiles(out, whole, names, shallow=False) == (names, [], [])


def test_tokens_are_the_live_teachers_averages_on_the_stored_views(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    made = EmbedJob(recipe, EmbedRequest(tmp_path, 2), ALONE, part=64)
    teacher = embed.live_teacher(recipe, made.description, ALONE, made.shards, piece=64)
    index, view = torch.tensor([0, 599, 64, 63, 300]), torch.tensor([1, 0, 1, 0, 1])
    pixels, tokens = made._source.see_all(index.numpy(), view.numpy())
    seen = embed.normalise(pixels, teacher.towers.preprocess, torch.float32)
    whole = replace(made.description, settings=recipe.teacher.model_copy(update={"patch_grid": None}))  # type: ignore[union-attr]
    teacher.towers = replace(teacher.towers, description=whole)
    found = teacher.embed(seen, tokens, (0, -1)).features
    assert {name: map_BhwC.shape for name, map_BhwC in found.items()} == {"patches.0": (5, 5, 5, 32), "patches.-1": (5, 5, 5, 32)}
    stored = replace(Store.open(folder / "fp32"), asked={0: 0, -1: 1}).read(index.numpy(), view.numpy())
    share = torch.tensor([[1, 1, 0.5, 0, 0], [0, 0, 0.5, 1, 1]]) / 2.5
    for block in (0, -1):
        expected = torch.einsum("yh,xw,bhwc->byxc", share, share, found[f"patches.{block}"])
        torch.testing.assert_close(stored.patches[block], expected, atol=1e-5, rtol=1e-5)


def test_a_check_recomputes_tokens_too(recipe: Recipe, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong ones whose checksums are right are found, with their block."""
    store = Path(shutil.copytree(folder / "bf16", tmp_path / "store"))
    job = EmbedJob(recipe, EmbedRequest(store, 2), ALONE, part=64)
    assert job.check(sampled=32).worst_cosine > 0.9999
    manifest, found = Store.open(store).manifest, Store.open(store)
    for number in range(PARTS):
        arrays = {name: torch.from_numpy(array.copy()) for name, array in found._arrays(number).items()}
        image, text, *blocks = (arrays[name].view(torch.bfloat16) for name in ("image", "text", "patches.0", "patches.1"))
        wrong = {"patches.0": blocks[0], "patches.1": blocks[1].flip(2)}
        writer.write_part(store, replace(manifest, parts=()), number, image, text, arrays["known"].bool(), wrong)
    writer.finish(store, replace(manifest, parts=()))
    with pytest.raises(StoreError, match=r"recomputed embeddings differ from the stored ones: .*view [01], patch tokens of block 1\)"):
        job.check(sampled=32)


def _job(recipe_file: Path, out: Path, *sets: str) -> EmbedJob:
    return EmbedJob(recipes.load(str(recipe_file), (*TEACHER, *sets))[0], EmbedRequest(out, 2), ALONE)


def test_the_size_is_said_before_anything_is_written_and_a_full_disk_is_refused(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk ({mounted.stderr.strip()}); the check itself is tried in test_store_patches")
    try:
        with pytest.raises(StoreError, match=r"store: 7\d\d kB are to be written and [\d.]+ kB are free there"):
            _job(recipe_file, tmp_path / "store").embed()
        told = "600 samples, 2 views each, width 24 and patch tokens of blocks 0 (width 32), 1 (width 32) on 2 x 2, bf16: "
        assert told in capsys.readouterr().out
        assert [path.name for path in (tmp_path / "store").iterdir()] == ["lock"]
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_the_size_is_in_the_plan_and_in_the_dry_run(recipe: Recipe, recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished = train(recipe_file, "--dry_run", sets=TEACHER)
    assert finished.code == 0, finished.err
    assert "by `megakd embed`, for each of its --views: 600 samples, 1 views each, width 24 and patch tokens" in finished.out
    report.show(planning.plan(recipe, "r", None, Cluster(1, 80)))
    shown = capsys.readouterr().out
    assert "a store of a million pairs by `megakd embed`, for each of its --views" in shown
    assert "patch tokens of blocks 0 (width 32), 1 (width 32) on 2 x 2, bf16: 6" in shown


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (("teacher.patch_grid=[6, 6]",), r"teacher\.patch_grid = \[6, 6\]: the teacher's grid has 5 x 5 patches alone"),
        (("teacher.patch_grid=[2, 3]",), r"teacher\.patch_grid = \[2, 3\]: the teacher's grid of 5 x 5 patches has another aspect"),
        (("patch.teacher_blocks=[7]",), r"teacher: patch\.teacher_blocks = 7: the vision tower has 2 blocks"),
        (
            ("objectives.patch=0", "objectives.patch_relation=0"),
            r"teacher\.patch_grid = \[2, 2\]: no active objective reads patch tokens",
        ),
    ],
)
def test_patch_tokens_that_cannot_be_stored_are_one_message(recipe_file: Path, tmp_path: Path, sets: tuple[str, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        _job(recipe_file, tmp_path / "store", *sets)
    assert list(tmp_path.iterdir()) == []


def test_every_teacher_of_an_ensemble_has_a_grid_of_its_own(recipe_file: Path) -> None:
    blocks = ("patch.blocks=[0]", "patch_relation.blocks=[0]", "patch_relation.teacher_blocks=[0]")
    fits = train(recipe_file, "--dry_run", sets=(*TEACHER, *ENSEMBLE, "ensemble.second.patch_grid=[1, 1]", *blocks))
    assert (fits.code, "a store of the teacher" in fits.out) == (0, False), fits.err
    refused = train(recipe_file, "--dry_run", sets=(*TEACHER, *ENSEMBLE, "ensemble.second.patch_grid=[3, 3]", *blocks))
    assert refused.code == 2
    assert "ensemble.second.patch_grid = [3, 3]: the teacher's grid has 2 x 2 patches alone" in refused.err


@pytest.mark.parametrize("value", ["[2]", "[2, 0]", "[2.0, 2]", "[true, 2]", "2"])
def test_what_is_no_grid_is_refused_by_the_recipe(recipe_file: Path, value: str) -> None:
    with pytest.raises(ValueError, match=r"teacher\.patch_grid"):
        recipes.load(str(recipe_file), (*TEACHER, f"teacher.patch_grid={value}"))


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (("teacher.patch_grid=[4, 4]",), ["objectives.patch reads patch tokens of blocks", "on 4 x 4, and this store holds patch tokens",
         "set teacher.patch_grid to [2, 2], or make one by this recipe with `megakd embed`"]),
        (("patch.teacher_blocks=[0]", "STORE=of_one_block"), ["tokens of block 0", "this store holds patch tokens of block 1"]),
        (("STORE=of_embeddings",), ["objectives.patch reads patch tokens", "this store holds embeddings alone; make one"]),
    ],
    ids=["grid", "block", "none"],
)  # fmt: skip
def test_a_store_that_lacks_what_objectives_read_ends_the_run(
    recipe_file: Path, tmp_path: Path, folder: Path, sets: tuple[str, ...], told: list[str]
) -> None:
    store = folder / "fp32"
    if named := [one for one in sets if one.startswith("STORE=")]:
        store, sets = tmp_path / named[0][6:], sets[:-1]
        of_one = ("objectives.patch_relation=0",) if store.name == "of_one_block" else ("objectives.patch=0", "objectives.patch_relation=0")
        given = recipes.load(str(recipe_file), (*TEACHER, *of_one))[0]
        if store.name == "of_embeddings":
            given = given.model_copy(update={"teacher": given.teacher.model_copy(update={"patch_grid": None})})
        EmbedJob(given, EmbedRequest(store, 2), ALONE).embed()
    finished = train(recipe_file, "--out", tmp_path / "run", sets=(*TEACHER, *sets, f"teacher.store={store}"))
    assert finished.code == 2
    assert all(words in finished.err for words in told), finished.err
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_recipe_whose_store_will_hold_no_tokens_is_told(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = (one for one in TEACHER if "patch_grid" not in one)
    EmbedJob(recipes.load(str(recipe_file), tuple(sets))[0], EmbedRequest(tmp_path / "store"), ALONE)
    assert "objectives.patch reads patch tokens, which this store will not hold: that needs teacher.patch_grid" in capsys.readouterr().out
