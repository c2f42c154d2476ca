"""Teachers partitioned by ZeRO-3, with real DeepSpeed on two ranks: what they give, hold and read, and the student beside them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megakd.runtime import launch as ranks
from megakd.runtime import zero3
from megakd.teachers.sharded import ShardedTeacher
from support import PROGRAMS
from support.programs.sharded_teacher import STUDENTS
from support.runs import REPOSITORY, finish, launch, rank_process, run_ranks, wait_for
from support.teachers import ARCHITECTURES, build, described

JOB = PROGRAMS / "sharded_teacher.py"
NAMES = sorted(ARCHITECTURES)
BITS = (32, 8)

Outcomes = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("teachers")
    for name in NAMES:
        state = build(name).state_dict()
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, made / f"{name}.safetensors")
    save_file({"visual.nothing": torch.ones(2)}, made / "bad.safetensors")
    return made


def _outcomes(folder: Path, *tasks: str) -> Outcomes:
    run_ranks(JOB, ",".join(tasks), folder, seconds=280)
    return {task: [json.loads((folder / f"{task}-{rank}.json").read_text()) for rank in (0, 1)] for task in tasks}


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Outcomes:
    return _outcomes(folder, "teachers", "migrations", "students", "memory50", "errors")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_a_partitioned_teacher_gives_what_a_replicated_one_gives_bit_for_bit(name: str, bits: int, outcomes: Outcomes) -> None:
    for rank in outcomes["teachers"]:
        found = rank[f"{name}-{bits}"]
        assert found["equal"]
        assert found["widths"][0] == found["widths"][1] == ARCHITECTURES[name]["embed_dim"]
        assert found["dtypes"] == ["torch.float32", "torch.float32"]


def test_an_offloaded_one_does_so_too(outcomes: Outcomes) -> None:
    assert all(rank["offload"]["equal"] for rank in outcomes["teachers"])


@pytest.mark.parametrize("name", NAMES)
def test_outliers_move_into_a_partitioned_teachers_weights_as_into_a_whole_ones_bit_for_bit(name: str, outcomes: Outcomes) -> None:
    for rank in outcomes["migrations"]:
        found = rank[name]
        assert found["equal"]
        assert found["changed"]
        assert found["after"] > 0.999
    assert len({digest for rank in outcomes["migrations"] for digest in rank[name]["digests"]}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_forward_with_original_matrices_is_that_of_the_teacher_that_was_never_in_8_bit(name: str, outcomes: Outcomes) -> None:
    for rank in outcomes["migrations"]:
        assert max(rank[name]["from_exact"]) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_one_without_its_text_tower_gives_the_same_images_from_less_memory(name: str, outcomes: Outcomes) -> None:
    for rank in outcomes["teachers"]:
        found = rank[f"{name}-8"]
        assert found["images_alone_equal"]
        assert found["images_alone"] < 0.7 * found["resident"]


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_holds_half_of_it(name: str, outcomes: Outcomes) -> None:
    for bits in BITS:
        for rank in outcomes["teachers"]:
            found = rank[f"{name}-{bits}"]
            assert found["resident"] == pytest.approx(found["whole"] / 2, rel=0.01)
    half, eighth = (outcomes["teachers"][0][f"{name}-{bits}"]["resident"] for bits in BITS)
    assert eighth < 0.55 * half


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_reads_the_file_once_and_the_other_does_not(name: str, outcomes: Outcomes, folder: Path) -> None:
    size = (folder / f"{name}.safetensors").stat().st_size
    first, second = (rank[f"{name}-8"]["read"] for rank in outcomes["teachers"])
    assert size <= first < 1.4 * size  # the header is read twice, and Python reads its own files
    assert second < 0.05 * size


@pytest.mark.parametrize("bits", BITS)
def test_a_student_of_any_stage_learns_what_it_learns_from_a_replicated_teacher(bits: int, outcomes: Outcomes) -> None:
    for stage, accumulation in STUDENTS[bits]:
        for rank in outcomes["students"]:
            found = rank[f"stage{stage}-accumulation{accumulation}-{bits}"]
            assert found["sharded"] == found["replicated"], (stage, accumulation)
            assert found["sharded"]["losses"][-1] != found["sharded"]["losses"][0]


def test_a_students_state_holds_nothing_of_its_teacher(outcomes: Outcomes) -> None:
    own = {f"clip.{name}" for name in build("ViT-bigG").state_dict()}
    names = [set(entry["sharded"]["names"]) for entry in outcomes["students"][0].values() if isinstance(entry, dict)]
    assert names
    assert all(found == own for found in names)


def test_a_teacher_leaves_torchs_linear_function_alone(outcomes: Outcomes) -> None:
    assert all(rank["linear_is_torchs"] for rank in outcomes["students"])


def _growth(megabytes: list[float], skipped_fifths: int = 1) -> float:
    """From the first fifth that is not skipped to the last, in the middle of each: the first steps fill allocators."""
    fifth = len(megabytes) // 5
    middle = [sorted(part)[fifth // 2] for part in (megabytes[skipped_fifths * fifth :][:fifth], megabytes[-fifth:])]
    return middle[1] - middle[0]


def test_fifty_steps_of_both_engines_take_no_more_memory(outcomes: Outcomes) -> None:
    for rank in outcomes["memory50"]:
        assert _growth(rank["megabytes"]) < 2, rank["megabytes"]


def test_every_rank_hears_what_the_reading_one_finds_wrong(outcomes: Outcomes) -> None:
    for rank in outcomes["errors"]:
        kind, message = rank["bad"]
        assert kind == "ValueError"
        assert "bad.safetensors" in message
        assert "not of this model: visual.nothing" in message
        assert rank["breaking"][0] == "OSError"
        assert "Input/output error" in rank["breaking"][1]


def test_a_load_after_a_broken_one_is_right(outcomes: Outcomes) -> None:
    assert all(rank["afterwards"]["equal"] for rank in outcomes["errors"])


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_killed_in_the_middle_of_a_load_ends_the_run_and_leaves_the_file_as_it_was(folder: Path, victim: int) -> None:
    weights, mark = folder / "EVA02-E.safetensors", folder / "in_the_middle"
    before, files = weights.read_bytes(), {entry.name for entry in folder.iterdir()}
    mark.unlink(missing_ok=True)
    run = launch("torchrun", JOB, "slowly", folder)
    wait_for(mark.exists, run)
    os.kill(rank_process(run, victim).pid, signal.SIGKILL)
    assert finish(run).code != 0
    assert weights.read_bytes() == before
    assert {entry.name for entry in folder.iterdir()} - files <= {mark.name}


def test_a_coca_model_is_refused_before_anything_is_built() -> None:
    teacher = described({**ARCHITECTURES["ViT-bigG"], "multimodal_cfg": {}}, "random")
    with pytest.raises(ValueError, match="CoCa"):
        ShardedTeacher.load(teacher, ranks.World(0, 1, torch.device("cpu")))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_steps_of_both_engines_take_no_more_memory(folder: Path) -> None:
    """In fresh processes: the resident memory of a fork grows as well by the pages of libraries that it is the first to touch. In these the
    allocator goes on to fill for a hundred steps, 2.6 MB after the fortieth, and then stands still."""
    finished = finish(launch("torchrun", JOB, "memory200", folder), seconds=280)
    assert finished.code == 0, finished.out[-6000:]
    for rank in (0, 1):
        megabytes = json.loads((folder / f"memory200-{rank}.json").read_text())["megabytes"]
        assert _growth(megabytes, skipped_fifths=2) < 2, megabytes


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("model", "most_gb"), [("ViT-bigG-14", 2.5), ("EVA02-E-14-plus", 4.2)])
def test_a_giant_in_int8_fits_beside_its_other_half(model: str, most_gb: float, tmp_path: Path) -> None:
    """Beyond what the process had before it loaded anything. A load is timed against a forward, which reads the same weights."""
    from megakd.benchmarks import teacher_load

    for rank in teacher_load.run(model, "zero3_int8", 2, pairs=2, forwards=2, folder=tmp_path):
        assert rank["peak_gb"] - rank["start_gb"] <= most_gb
        assert rank["load_seconds"] <= 8 * min(rank["forward_seconds"])


def test_blocks_are_gathered_whole_and_attentions_at_least() -> None:
    visual: Any = build("ViT-bigG").visual
    blocks = list(visual.transformer.resblocks)
    size = sum(parameter.numel() for parameter in blocks[0].parameters())
    assert [leaf for leaf in zero3.gathered_together(visual, size) if leaf in blocks] == blocks
    smaller = zero3.gathered_together(visual, size - 1)
    assert not set(smaller) & set(blocks)
    assert {block.attn for block in blocks} <= set(smaller)
    assert not any(leaf is block.attn.out_proj for leaf in zero3.gathered_together(visual, 1) for block in blocks)
    assert zero3.gathered_together(visual, 10**9) == [visual]


def test_the_shipped_configuration_is_the_built_in_one() -> None:
    path = REPOSITORY / "ds_configs" / "teacher_zero3.json"
    assert json.loads(path.read_text()) == zero3.BUILT_IN
    assert zero3.settings(str(path)) == zero3.settings()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"optimizer": {}}, "optimizer"),
        ({"zero_optimization": {"stage": 2}}, "stage = 2"),
        ({"zero_optimization": {"stage": 3, "memory_efficient_linear": True}}, "memory_efficient_linear"),
    ],
)
def test_a_configuration_that_is_not_a_frozen_modules_is_refused(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "teacher.json"
    path.write_text(json.dumps({**zero3.BUILT_IN, **change}))
    with pytest.raises(ValueError, match=rf"{told}.*teacher\.json"):
        zero3.settings(str(path))


def test_a_missing_or_broken_configuration_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.json"):
        zero3.settings(str(tmp_path / "gone.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json"):
        zero3.settings(str(tmp_path / "broken.json"))
