"""Runs on a mixture: what metrics.jsonl says by source, going on, ranks, stores, questions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.data.store.reader import StoreError
from megakd.recipe import load as recipes
from megakd.runtime import checkpoint
from megakd.runtime.exits import EXIT_USER_ERROR
from megakd.runtime.launch import World
from megakd.teachers.embed import EmbedJob, EmbedRequest
from support.runs import (
    KD,
    TEACHER,
    TINY_LLAMA,
    TRAIN,
    answering,
    ds_config,
    losses,
    question_source,
    ran,
    rows,
    run_ranks,
    settings,
    train,
)

SHORT = ("optim.steps=4", "optim.warmup=0")
ALONE = World(0, 1, torch.device("cpu"))


def shards(world: Path) -> list[Path]:
    return sorted((world / "train").glob("*.tar"))


def table(world: Path, first: float = 3, second: float = 1) -> str:
    """Two shards of the world, of 200 samples each; of a batch of 16 the first has 12 at 3 : 1."""
    named = {"clean": (shards(world)[0], first), "other": (shards(world)[1], second)}
    parts = [f"{name} = {{ shards = '{shard}', weight = {weight} }}" for name, (shard, weight) in named.items()]
    return f"data.train={{ {', '.join(parts)} }}"


@pytest.fixture(scope="module")
def undisturbed(recipe_file: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "run"
    finished = train(recipe_file, "--out", folder, sets=(*KD, *SHORT, table(world)))
    assert finished.code == 0, finished.err
    assert "data.train.clean: 75.00% of each batch, 200 pairs, 0.24 epochs in this run" in finished.out
    assert "data.train.other: 25.00% of each batch, 200 pairs, 0.08 epochs in this run" in finished.out
    return folder


def by_source(run: Path, items: str = "samples") -> list[dict[str, Any]]:
    return [row["sources"][items] for row in rows(run)]


def test_each_row_counts_what_was_seen_of_each_source_and_parts_its_losses(undisturbed: Path) -> None:
    for step, (row, sources) in enumerate(zip(rows(undisturbed), by_source(undisturbed), strict=True), 1):
        assert {name: (of["seen"], of["epochs"], of["bad"]) for name, of in sources.items()} == {
            "clean": (12 * step, 12 * step / 200, 0),
            "other": (4 * step, 4 * step / 200, 0),
        }
        assert set(sources["clean"]["losses"]) == {"contrastive", "similarity", "feature"}
        for name, loss in row["losses"].items():
            parts = {source: of["losses"][name] for source, of in sources.items()}
            assert (12 * parts["clean"] + 4 * parts["other"]) / 16 == pytest.approx(loss, rel=1e-4)
            assert parts["clean"] != parts["other"]


def test_without_a_mixture_nothing_is_said_by_source(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    run = ran(recipe_file, tmp_path / "run", "optim.steps=1", "optim.warmup=0")
    assert "sources" not in rows(run)[0]
    rare = ran(recipe_file, tmp_path / "rare", *SHORT, table(world), "log.every=3")
    assert [row["step"] for row in rows(rare)] == [3, 4]
    assert [sources["clean"]["seen"] for sources in by_source(rare)] == [36, 48]


def test_a_run_that_goes_on_is_the_undisturbed_one_and_counts_on(recipe_file: Path, world: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    shutil.rmtree(checkpoint.available(run)[-1])
    shutil.rmtree(run / "model")
    assert train(recipe_file, "--out", run, sets=(*KD, *SHORT, table(world))).code == 0
    assert losses(run) == losses(undisturbed)
    assert by_source(run) == by_source(undisturbed)


def test_other_weights_are_refused_also_where_the_checkpoint_is_another_runs(
    recipe_file: Path, world: Path, undisturbed: Path, tmp_path: Path
) -> None:
    here = train(recipe_file, "--out", undisturbed, sets=(*KD, *SHORT, table(world, 1, 1)))
    assert here.code == EXIT_USER_ERROR
    assert "data.train.clean.weight: 3.0 -> 1.0" in here.err
    first = checkpoint.available(undisturbed)[0]
    there = train(recipe_file, "--out", tmp_path / "new", "--resume", first, sets=(*KD, *SHORT, table(world, 1, 1)))
    assert there.code == EXIT_USER_ERROR
    assert "data.train.clean, data.train.other: the data have changed since" in there.err


def test_ranks_and_micro_batches_count_and_part_alike(recipe_file: Path, world: Path, undisturbed: Path, tmp_path: Path) -> None:
    config = ds_config(tmp_path / "ds.json", train_micro_batch_size_per_gpu=4)
    two = (*KD, "optim.steps=2", "optim.warmup=0", "optim.clip=0", table(world))
    run_ranks(TRAIN, "--recipe", recipe_file, "--out", tmp_path / "two", "--ds_config", config, *settings(*two))
    for one, other in zip(by_source(undisturbed), by_source(tmp_path / "two"), strict=False):
        for name in one:
            assert {**one[name], "losses": {}} == {**other[name], "losses": {}}
    # of the first step alone: later ones follow from another rounding
    for name, of in by_source(undisturbed)[0].items():
        assert by_source(tmp_path / "two")[0][name]["losses"] == pytest.approx(of["losses"], rel=1e-4)


def test_bad_samples_count_for_their_source(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    """A limit that the indexes cannot know: bytes of each second image of a source are no picture."""
    damaged = tmp_path / "damaged.tar"
    data = bytearray(shards(world)[1].read_bytes())
    places = [place for place in range(0, len(data), 512) if data[place : place + 2] == b"\xff\xd8"]
    for place in places[::2]:
        data[place : place + 2] = b"no"
    damaged.write_bytes(data)
    sets = (*SHORT, table(world), f"data.train.other.shards={damaged}")
    run = ran(recipe_file, tmp_path / "run", *sets, "data.max_bad_fraction=0.5")
    for step, (row, sources) in enumerate(zip(rows(run), by_source(run), strict=True), 1):
        assert sources["clean"]["bad"] == 0
        assert {"corrupt_image": sources["other"]["bad"]} == row["bad_samples"]
        assert (sources["clean"]["seen"], sources["other"]["seen"]) == (12 * step, 4 * step)
    refused = train(recipe_file, "--out", tmp_path / "refused", sets=sets)
    assert refused.code == EXIT_USER_ERROR
    assert "(by source: other " in refused.err


def test_a_store_of_a_mixture_gives_what_the_teacher_gives_at_any_weights(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    """Two views of each image, each source's own epoch its next one: 20 steps of 12 are more than the first one's 200."""
    sets = (*TEACHER, table(world), "objectives.contrastive=0", "objectives.similarity=1", "optim.steps=20", "log.every=20")
    recipe = recipes.load(str(recipe_file), sets)[0]
    folder = tmp_path / "store"
    EmbedJob(recipe, EmbedRequest(folder, 2, "fp32"), ALONE).embed()
    EmbedJob(recipe, EmbedRequest(folder, 2, "fp32"), ALONE).check(8)
    stored = (f"teacher.store={folder}", "teacher.store_miss=fail")
    for weights in ((3, 1), (1, 3)):
        run = train(recipe_file, "--out", tmp_path / f"run{weights[0]}", sets=(*sets, *stored, table(world, *weights)))
        assert run.code == 0, run.err
    assert by_source(tmp_path / "run3")[0]["clean"]["seen"] == 240
    whole = ran(recipe_file, tmp_path / "plain", *sets, *stored, f"data.train={list(map(str, shards(world)[:2]))}")
    assert rows(whole)
    third = f"data.train.third={{ shards = '{shards(world)[2]}', weight = 1 }}"
    with pytest.raises(StoreError, match=r"data\.samples: 400 in the store, 600 in the recipe"):
        EmbedJob(recipes.load(str(recipe_file), (*sets, third))[0], EmbedRequest(folder, 2, "fp32"), ALONE).embed()


def test_questions_are_mixed_by_weight_and_told_apart(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    other = "{ format = 'captions', images = '" + str(shards(world)[1]) + "', weight = 1 }"
    shapes = question_source(world, "train")[:-1] + ", weight = 3 }"
    sets = (
        *answering(world), f"decoder.architecture={TINY_LLAMA}", f"decoder.tokenizer={world}/tokenizer", "evaluation.vqa={}",
        "objectives.contrastive=0", f"answers.train.shapes={shapes}", f"answers.train.captions={other}", "optim.steps=3", "optim.warmup=0",
    )  # fmt: skip
    shown = train(recipe_file, "--out", tmp_path / "run", sets=sets)
    assert shown.code == 0, shown.err
    assert "answers.train.captions: 25.00% of each batch, 200 questions, 0.03 epochs in this run" in shown.out
    for step, (row, sources) in enumerate(zip(rows(tmp_path / "run"), by_source(tmp_path / "run", "questions"), strict=True), 1):
        assert (sources["shapes"]["seen"], sources["captions"]["seen"]) == (6 * step, 2 * step)
        parts = [of["losses"]["answer"] for of in sources.values()]
        assert min(parts) < row["losses"]["answer"] < max(parts)
    config = ds_config(tmp_path / "ds.json", train_micro_batch_size_per_gpu=2)
    micro = ran(recipe_file, tmp_path / "micro", *sets, "optim.steps=1", "decoder.lora.dropout=0", config=config)
    plain = ran(recipe_file, tmp_path / "whole", *sets, "optim.steps=1", "decoder.lora.dropout=0")
    for name, of in by_source(plain, "questions")[0].items():
        assert by_source(micro, "questions")[0][name]["losses"] == pytest.approx(of["losses"], rel=1e-4)


def test_a_dry_run_says_shares_and_how_often_a_small_source_is_repeated(recipe_file: Path, world: Path) -> None:
    shown = train(recipe_file, "--dry_run", sets=(table(world, 1, 3), "optim.steps=100", "optim.warmup=0"))
    assert shown.code == 0, shown.err
    assert "data.train.other: 75.00% of each batch, 200 pairs, 6 epochs in this run: each of them is seen about that often" in shown.out
