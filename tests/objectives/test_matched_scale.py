"""teacher.scale = "matched": the entropy of the teacher's rows is that of a reference, batch by batch, over ranks and resumed runs."""

from __future__ import annotations

import logging
import math
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F

from megakd.models.embeddings import Embeddings
from megakd.objectives import teacher_scale
from megakd.objectives.cost import LossShape
from megakd.objectives.set import ObjectiveSet
from megakd.objectives.teacher_scale import HIGHEST, LOWEST, RATE, TeacherScales, row_entropy
from megakd.planning.memory_tracker import MemoryTracker
from megakd.recipe import Recipe
from megakd.recipe import load as recipes
from megakd.runtime import checkpoint
from megakd_kernels import panels
from megakd_kernels.distributed import Ranks
from support.runs import ENSEMBLE, KD, TEACHER, curve, rows, train

# Legend: N pairs, D embedding width.
N = 22
CPU, ALONE = torch.device("cpu"), Ranks.of(None)
MATCHED = (*TEACHER, "objectives.similarity=1", "teacher.scale=matched")
TWO = (*MATCHED, *ENSEMBLE, "ensemble.second.scale=matched", "ensemble.second.entropy=1.5")


def _recipe(recipe_file: Path, *overrides: str) -> Recipe:
    return recipes.load(str(recipe_file), (f"optim.batch={N}", *overrides))[0]


def _pair(seed: int, width: int, scale: float, number: int = N) -> Embeddings:
    """As of a trained model: the matching cosine stands out of the noise."""
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(number, width, generator=generator), dim=-1)
    text = F.normalize(0.5 * image + F.normalize(torch.randn(number, width, generator=generator), dim=-1), dim=-1)
    return Embeddings(image, text, torch.tensor(scale))


def _entropy(pair: Embeddings, scale: float | Tensor) -> Tensor:
    """In float64, N x N."""
    log_p = (torch.as_tensor(scale).double() * pair.image.double() @ pair.text.double().T).log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


@pytest.mark.parametrize("chunk", [5, 22])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1000.0])
def test_entropy_and_its_derivative_are_those_of_float64(scale: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_scale, "chunk_rows", lambda *_: chunk)
    pair, log_scale = _pair(3, 24, 1.0), torch.tensor(math.log(scale), dtype=torch.float64, requires_grad=True)
    expected = _entropy(pair, log_scale.exp())
    (slope,) = torch.autograd.grad(expected, log_scale)
    found, variance = row_entropy(pair, log_scale.detach().exp(), ALONE)
    assert found.dtype == variance.dtype == torch.float64
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(variance, -slope, rtol=1e-4, atol=1e-6)
    half = pair._replace(image=pair.image.bfloat16(), text=pair.text.bfloat16())
    torch.testing.assert_close(row_entropy(half, torch.tensor(scale), ALONE)[0], _entropy(half, scale), rtol=1e-5, atol=2e-6)


def test_the_first_batch_is_matched_to_nats_or_to_the_student(recipe_file: Path) -> None:
    student, teachers = _pair(1, 16, 20.0), [_pair(5, 24, 100.0), _pair(7, 20, 3.0)]
    scales = TeacherScales(_recipe(recipe_file, *TWO), None)
    first, second = scales(student, teachers)
    assert float(_entropy(first, first.scale)) == pytest.approx(float(_entropy(student, 20.0)), abs=1e-4)
    assert float(_entropy(second, second.scale)) == pytest.approx(1.5, abs=1e-4)
    assert first.scale.dtype == torch.float32
    assert {role: float(value) for role, value in scales.values().items()} == pytest.approx(
        {"teacher": float(first.scale), "ensemble.second": float(second.scale)}
    )
    fixed = TeacherScales(_recipe(recipe_file, *MATCHED, "similarity.student_scale=50"), None)
    (at_fixed,) = fixed(student, teachers[:1])
    assert float(_entropy(at_fixed, at_fixed.scale)) == pytest.approx(float(_entropy(student, 50.0)), abs=1e-4)


def test_later_batches_move_the_scale_by_a_part_and_come_to_theirs(recipe_file: Path) -> None:
    scales = TeacherScales(_recipe(recipe_file, *MATCHED, "teacher.entropy=1.5"), None)
    student, before, other = _pair(1, 16, 20.0), _pair(5, 24, 100.0), _pair(8, 12, 100.0)
    (at_first,) = scales(student, [before])
    (moved,) = scales(student, [other])
    entropy, variance = row_entropy(other, at_first.scale, ALONE)
    step = RATE * float((entropy - 1.5) / variance)
    assert math.log(moved.scale) - math.log(at_first.scale) == pytest.approx(step, abs=1e-5)
    assert step != 0
    for _ in range(100):
        (moved,) = scales(student, [other])
    assert float(_entropy(other, moved.scale)) == pytest.approx(1.5, abs=1e-4)


def test_one_odd_batch_moves_the_scale_by_a_tenth_of_its_logarithm_at_most(recipe_file: Path) -> None:
    scales = TeacherScales(_recipe(recipe_file, *MATCHED, "teacher.entropy=1.5"), None)
    student, usual = _pair(1, 16, 20.0), _pair(5, 24, 100.0)
    (before,) = scales(student, [usual])
    flat = usual._replace(text=usual.text[:1].expand(N, -1))  # of one caption alone: at every scale log N
    (after,) = scales(student, [flat])
    assert math.log(after.scale / before.scale) == pytest.approx(RATE, abs=1e-6)


def test_what_no_scale_reaches_stays_at_an_end_and_is_said(recipe_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each caption is there twice: no row falls below log 2 = 0.69 nats. And a student whose rows are uniform has log N."""
    student, twice = _pair(1, 16, 20.0), _pair(5, 24, 100.0, N // 2)
    twice = twice._replace(image=twice.image.repeat(2, 1), text=twice.text.repeat(2, 1))
    scales = TeacherScales(_recipe(recipe_file, *MATCHED, "teacher.entropy=0.5"), None)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            (found,) = scales(student, [twice])
            assert float(found.scale) == pytest.approx(HIGHEST, rel=1e-6)
    assert caplog.text.count("teacher.scale = 'matched': on the first batch an entropy of 0.5 nats asks for sharper rows") == 1
    even = student._replace(text=student.text[:1].expand(N, -1))
    with caplog.at_level(logging.WARNING):
        (found,) = TeacherScales(_recipe(recipe_file, *MATCHED), None)(even, [twice])
    assert float(found.scale) == pytest.approx(LOWEST, rel=1e-3)


def test_the_loss_goes_by_the_matched_scale_and_state_is_gone_on_with(recipe_file: Path) -> None:
    recipe, plain = _recipe(recipe_file, *TWO), _recipe(recipe_file, *TEACHER, *ENSEMBLE, "objectives.similarity=1")
    batches = [(_pair(seed, 16, 20.0), [_pair(seed + 1, 24, 100.0), _pair(seed + 2, 20, 3.0)]) for seed in (10, 20, 30)]
    whole, first, second = (ObjectiveSet(recipe, CPU, None) for _ in range(3))
    assert whole.logged == ("teacher_scale.teacher", "teacher_scale.ensemble.second")
    losses = [whole.losses(student, teachers, step) for step, (student, teachers) in enumerate(batches)]
    scaled = [teacher._replace(scale=scale.float()) for teacher, scale in zip(batches[2][1], whole.values().values(), strict=True)]
    assert losses[2] == ObjectiveSet(plain, CPU, None).losses(batches[2][0], scaled)
    for step, (student, teachers) in enumerate(batches[:2]):
        first.losses(student, teachers, step)
    state = first.state()
    assert state.keys() == {"teacher_scale.teacher", "teacher_scale.ensemble.second"}
    second.restore(state)
    assert second.losses(*batches[2], 2) == losses[2]
    assert second.values() == whole.values()
    with pytest.raises(ValueError, match=r"teacher_scale: the checkpoint has its state 'teacher', and the recipe"):
        ObjectiveSet(plain, CPU, None).restore(state)


def _on_two_ranks(rank: int, folder: str, recipe: Recipe) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    own, found = slice(rank * N // 2, (rank + 1) * N // 2), []
    scales = TeacherScales(recipe, dist.group.WORLD)
    for seed in (10, 20, 30):
        pairs = (_pair(seed, 16, 20.0), _pair(seed + 1, 24, 100.0), _pair(seed + 2, 20, 3.0))
        student, *teachers = (pair._replace(image=pair.image[own], text=pair.text[own]) for pair in pairs)
        scales(student, teachers)
        found.append(torch.stack(list(scales.values().values())))
    torch.save(torch.stack(found), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_agree_to_the_bit_and_with_one(recipe_file: Path, tmp_path: Path) -> None:
    recipe = _recipe(recipe_file, *TWO)
    mp.spawn(_on_two_ranks, (str(tmp_path), recipe), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first, second)
    alone, found = TeacherScales(recipe, None), []
    for seed in (10, 20, 30):
        alone(_pair(seed, 16, 20.0), [_pair(seed + 1, 24, 100.0), _pair(seed + 2, 20, 3.0)])
        found.append(torch.stack(list(alone.values().values())))
    torch.testing.assert_close(first, torch.stack(found), rtol=1e-6, atol=0)


def test_a_resumed_run_goes_on_with_its_scales_to_the_last_bit(recipe_file: Path, tmp_path: Path) -> None:
    sets = (*KD, *ENSEMBLE, "teacher.scale=matched", "ensemble.second.scale=matched", "ensemble.second.entropy=1.5", "checkpoint.keep=9")
    whole = train(recipe_file, "--out", tmp_path / "whole", sets=sets)
    assert whole.code == 0, whole.err
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for path in checkpoint.available(tmp_path / "half")[1:]:
        shutil.rmtree(path)
    assert train(recipe_file, "--out", tmp_path / "half", sets=sets).code == 0
    logged = [[row["teacher_scale"] for row in rows(tmp_path / name)] for name in ("whole", "half")]
    assert logged[0] == logged[1]
    assert all(row.keys() == {"teacher", "ensemble.second"} for row in logged[0])
    assert len({row["teacher"] for row in logged[0]}) == len(logged[0]) == 6
    assert curve(tmp_path / "half") == curve(tmp_path / "whole")


def test_panels_are_all_that_is_held_and_the_planner_counts_them(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = 1536
    monkeypatch.setitem(panels.PANEL_BYTES, "cpu", 1 << 20)
    scales = TeacherScales(_recipe(recipe_file, *MATCHED), None)
    student, teacher, watch = _pair(1, 64, 20.0, number), _pair(5, 96, 100.0, number), MemoryTracker("cpu")
    watch.ignore(tensor for pair in (student, teacher) for tensor in pair[:3])  # type: ignore[arg-type]
    with watch:
        scales(student, [teacher])
    cost = scales.cost(LossShape(number, 1, (64, 96), (4, 4), 1, False, CPU))
    assert watch.peak == pytest.approx(cost.memory, rel=0.2)
    assert cost.memory < number**2 * 4
    assert cost.flops == 2 * number**2 * (64 + 96)
    assert cost.wire.bytes == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("objectives.similarity=0", "objectives.feature=1"),
            "teacher.scale = 'matched': no active objective compares rows of the similarity",
        ),
        (("teacher.entropy=3.2",), "teacher.entropy = 3.2: a row of optim.batch = 22 pairs has less than log 22 = 3.091 nats; lower it"),
        (("teacher.entropy=0",), "teacher.entropy = 0: Input should be greater than 0"),
        (("teacher.scale=70", "teacher.entropy=1"), "entropy = 1 is what a matched scale aims at: set scale to 'matched'"),
        (("teacher.scale=mached",), "teacher.scale = 'mached': a number above 0 and up to 1e+06, or 'matched'"),
        (("teacher.scale=true",), "teacher.scale = True: a number above 0"),
    ],
)
def test_a_scale_that_cannot_be_matched_is_one_message(recipe_file: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match="recipe") as caught:
        _recipe(recipe_file, *MATCHED, *settings)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2
