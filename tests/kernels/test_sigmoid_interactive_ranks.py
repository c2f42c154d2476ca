"""Several processes against one: a small encoder is trained as data parallelism would, and must get the global gradient."""

from __future__ import annotations

from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from single_pass_cases import LOSSES, Batch, Case, Watch, batch, forward, measure
from torch import nn
from torch.nn.functional import normalize

from megakd_kernels import SimilarityLoss
from megakd_kernels.reference import interactive_kd_reference, sigmoid_kd_reference
from megakd_kernels.sigmoid import sigmoid_kd

# Legend: W ranks, B rows of one rank, D width.
ROWS = 7  # of each rank; no chunk below divides it
WIDTH = 12
OPTIONS = {
    "eager": {"backend": "eager"},
    "chunked": {"backend": "chunked", "chunk": 3},
    "ring": {"backend": "chunked", "chunk": 3, "ring": True},
}
INTERPRETED = {"triton": {"backend": "triton", "chunk": 3}, "triton ring": {"backend": "triton", "chunk": 3, "ring": True}}
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton; without it the backend is refused")


class _Encoder(nn.Module):
    """Both towers over one input, scale and bias: one parameter of each kind that the losses reach."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(10, WIDTH), nn.Linear(11, WIDTH)
        self.log_scale, self.bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-3.0))
        self.to(dtype)

    def forward(self, inputs: Batch) -> Batch:
        towers = (normalize(tower(x), dim=-1) for tower, x in ((self.image, inputs.image), (self.text, inputs.text)))
        return Batch(*towers, self.log_scale.exp(), self.bias)


def _inputs(rows: int, dtype: torch.dtype) -> tuple[Batch, tuple[Batch, ...]]:
    """The encoder's inputs and the teachers; the first is as wide as the student."""
    generator = torch.Generator().manual_seed(5)
    image, text = (torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype) for width in (10, 11))
    return Batch(image, text, torch.tensor(0.0), torch.tensor(0.0)), (batch(rows, WIDTH, 30.0, -4, dtype), batch(rows, 20, 10.0, -6, dtype))


def _own(pair: Batch, rank: int) -> Batch:
    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    return pair._replace(image=pair.image[rows], text=pair.text[rows])


def _results(loss: SimilarityLoss, encoder: nn.Module) -> list[torch.Tensor]:
    (2.5 * loss.kd + 0.5 * loss.hard).backward()
    gradients = (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in encoder.parameters())
    return [*(part.detach() for part in loss), *gradients]


def _step(name: str, rank: int, ranks: list[int], dtype: torch.dtype, options: dict, group) -> list[torch.Tensor]:
    """Losses and the parameters' gradients, averaged over `ranks` as DeepSpeed does."""
    encoder, (inputs, teachers) = _Encoder(dtype), _inputs(ROWS * len(ranks), dtype)
    place = ranks.index(rank)
    case = Case(name, inputs, tuple(_own(teacher, place) for teacher in teachers))
    results = _results(forward(case, encoder(_own(inputs, place)), group=group, **options), encoder)
    for gradient in results[2:]:
        dist.all_reduce(gradient, group=group)
        gradient /= len(ranks)
    return results


def _truth(name: str, ranks: int) -> list[torch.Tensor]:
    encoder, (inputs, teachers) = _Encoder(torch.float64), _inputs(ROWS * ranks, torch.float64)
    student = encoder(inputs)
    if name == "sigmoid":
        return _results(sigmoid_kd_reference(student, teachers, hard=True), encoder)
    loss = interactive_kd_reference(student, teachers[0])
    return _results(SimilarityLoss(loss, loss.new_zeros(())), encoder)


def _unlike(rank: int) -> dict[str, tuple[Batch, tuple[Batch, ...], dict]]:
    """What each rank passes where rank 1 does something of its own: student, teachers and options, by what differs."""
    first, pair, teacher = rank != 1, batch(ROWS, 16, 50.0), batch(ROWS, 16, 30.0, seed=3)
    leaves = pair.leaves()
    return {
        "dtype": (pair if first else Batch(*(tensor.double() for tensor in pair)), (teacher,), {}),
        "gradient": (leaves if first else leaves._replace(text=pair.text), (teacher,), {}),
        "no gradient": (leaves if first else pair, (teacher,), {}),
        "backend": (pair, (teacher,), {"backend": "eager" if first else "chunked"}),
        "unknown backend": (pair, (teacher,), {"backend": "eager" if first else "eagre"}),
        "ring": (pair, (teacher,), {"backend": "chunked", "ring": first}),
    }


def _complaint(loss: str, student: Batch, *teachers: Batch, **options) -> str:
    try:
        forward(Case(loss, student, teachers), student, group=dist.group.WORLD, **options)
    except ValueError as error:
        return str(error)
    return "no error"


def _work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    everyone, group = list(range(world)), dist.group.WORLD
    found: dict[object, object] = {}
    for loss in LOSSES:
        for name, options in OPTIONS.items():
            found[loss, name] = _step(loss, rank, everyone, torch.float64, options, group)
            found[loss, name, "twice"] = [_step(loss, rank, everyone, torch.float32, options, group) for _ in range(2)]
            alone = Case(loss, batch(ROWS, 16, 50.0), (batch(ROWS, 16, 30.0, seed=3),))
            with Watch() as watch:
                measure(alone, group=group, **options)
            found[loss, name, "largest"] = watch.elements
            found[loss, name, "alone"] = measure(alone, **options)  # no group: no collective although gloo runs
        for name, options in INTERPRETED.items() if find_spec("triton") and world == 2 else ():
            found[loss, name] = _step(loss, rank, everyone, torch.float32, options, group)
        whole = batch(ROWS, 16, 50.0)
        found[loss, "faulty"] = _complaint(loss, whole, whole._replace(text=whole.text[rank:]) if rank == 1 else whole)
        asked = _unlike(rank).items()
        found[loss, "unlike"] = {what: _complaint(loss, student, *teachers, **options) for what, (student, teachers, options) in asked}
        if world == 4 and rank in (1, 3):
            subgroup = dist.new_group([1, 3], use_local_synchronization=True)
            for name, options in OPTIONS.items():
                found[loss, name, "subgroup"] = _step(loss, rank, [1, 3], torch.float64, options, subgroup)
    for name, options in OPTIONS.items():
        twin = _own(batch(world * ROWS, 16, 50.0, -8.0, torch.bfloat16), rank)
        found[name, "twin"] = sigmoid_kd(twin, twin, group=group, **options).kd
    whole = batch(ROWS, 16, 50.0)
    found["bias"] = _complaint("sigmoid", whole._replace(bias=torch.ones(1 + (rank == 1))), whole)
    found["teachers"] = _complaint("sigmoid", whole, *([whole] * (1 + (rank == 1))))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def outcomes(request, tmp_path_factory) -> list[dict]:
    """What every rank wrote down; one start of the processes serves every test below. Triton runs in its interpreter there."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        mp.spawn(_work, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


EVERY_WAY = pytest.mark.parametrize("name", OPTIONS)
BOTH = pytest.mark.parametrize("loss", LOSSES)


@BOTH
@EVERY_WAY
def test_averaged_gradients_are_those_of_one_process_with_the_whole_batch(outcomes, loss, name):
    for ours, true in zip(outcomes[0][loss, name], _truth(loss, len(outcomes)), strict=True):
        assert (ours - true).norm() <= 1e-12 * true.norm()


@NEEDS_TRITON
@BOTH
@pytest.mark.parametrize("name", INTERPRETED)
def test_the_triton_backend_agrees_with_one_process_in_float32(outcomes, loss, name):
    if len(outcomes) > 2:
        pytest.skip("two ranks take every path of the kernels; Triton's interpreter in four processes takes long")
    for ours, true in zip(outcomes[0][loss, name], _truth(loss, len(outcomes)), strict=True):
        assert (ours - true).norm() <= 5e-6 * true.norm()


@BOTH
@EVERY_WAY
def test_a_subgroup_counts_its_own_ranks(outcomes, loss, name):
    if len(outcomes) < 4:
        pytest.skip("a proper subgroup of two or more ranks needs four")
    for ours, true in zip(outcomes[3][loss, name, "subgroup"], _truth(loss, 2), strict=True):
        assert (ours - true).norm() <= 1e-12 * true.norm()


@BOTH
@EVERY_WAY
def test_every_rank_gets_the_same_loss_and_repeats_it_bit_for_bit(outcomes, loss, name):
    first = outcomes[0][loss, name, "twice"][0]
    for outcome in outcomes:
        for run in outcome[loss, name, "twice"]:
            assert all(torch.equal(one, other) for one, other in zip(run, first, strict=True))


@BOTH
def test_the_ring_never_holds_the_columns_of_all_ranks(outcomes, loss):
    """Told with four ranks: with two, one block's gradients of both parts are as large."""
    columns = len(outcomes) * ROWS * 16
    assert outcomes[0][loss, "chunked", "largest"] >= columns
    if len(outcomes) == 4:
        assert outcomes[0][loss, "ring", "largest"] < columns


@EVERY_WAY
def test_a_student_equal_to_its_teacher_has_a_divergence_of_exactly_zero_on_every_rank(outcomes, name):
    assert [float(outcome[name, "twin"]) for outcome in outcomes] == [0.0] * len(outcomes)


@BOTH
@EVERY_WAY
def test_without_a_group_a_rank_computes_by_itself(outcomes, loss, name):
    expected = measure(Case(loss, batch(ROWS, 16, 50.0), (batch(ROWS, 16, 30.0, seed=3),)), **OPTIONS[name])
    for outcome in outcomes:
        assert all(torch.allclose(one, other) for one, other in zip(outcome[loss, name, "alone"], expected, strict=True))


@BOTH
def test_a_faulty_rank_raises_on_every_rank(outcomes, loss):
    assert f"teacher.text ({ROWS - 1}, 16)" in outcomes[1][loss, "faulty"]
    assert all("rank 1 was given faulty" in outcome[loss, "faulty"] for rank, outcome in enumerate(outcomes) if rank != 1)


def test_a_faulty_bias_or_number_of_teachers_raises_on_every_rank(outcomes):
    assert "student.bias must hold one floating point number, got shape (2,)" in outcomes[1]["bias"]
    assert all("rank 1 was given faulty" in outcome["bias"] for rank, outcome in enumerate(outcomes) if rank != 1)
    counts = ", ".join(f"{2 if rank == 1 else 1} on rank {rank}" for rank in range(len(outcomes)))
    assert all(f"number of teachers: {counts}" in outcome["teachers"] for outcome in outcomes)


@BOTH
@pytest.mark.parametrize("what", _unlike(0))
def test_ranks_that_are_asked_for_different_things_all_raise(outcomes, loss, what):
    said = [outcome[loss, "unlike"][what] for outcome in outcomes]
    assert "no error" not in said
    assert all("these differ" in text or "rank 1 was given faulty" in text for rank, text in enumerate(said) if rank != 1), said


@BOTH
@EVERY_WAY
def test_a_group_of_one_equals_no_group_bit_for_bit(loss, name, tmp_path):
    case = Case(loss, batch(ROWS, WIDTH, 20.0, -5, seed=1), (batch(ROWS, WIDTH, 30.0, -6, seed=2),))
    alone = measure(case, **OPTIONS[name])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        grouped = measure(case, group=dist.group.WORLD, **OPTIONS[name])
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(one, other) for one, other in zip(alone, grouped, strict=True))
