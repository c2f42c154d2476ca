"""Several processes against one: a small encoder is trained as data parallelism would, and must get the global gradient."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from similarity_cases import Batch, batch, measure
from torch import nn
from torch.nn.functional import normalize

from megakd_kernels import similarity_kd, similarity_kd_reference

# Legend: W ranks, B rows of one rank, D width.
ROWS = 7  # of each rank; no chunk below divides it
OPTIONS = {
    "eager": {"backend": "eager"},
    "chunked": {"backend": "chunked", "chunk": 3},
    "chunked whole": {"backend": "chunked"},
    "ring": {"backend": "chunked", "chunk": 3, "ring": True},
    "ring whole": {"backend": "chunked", "ring": True},
}
TEMPERATURES = (1.0, 0.5)


class _Encoder(nn.Module):
    """Both towers over one input, and the scale: one parameter of each kind that the losses reach."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(10, 12), nn.Linear(11, 12)
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.to(dtype)

    def forward(self, inputs: Batch) -> Batch:
        towers = (normalize(tower(x), dim=-1) for tower, x in ((self.image, inputs.image), (self.text, inputs.text)))
        return Batch(*towers, self.log_scale.exp())


def _inputs(rows: int, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(5)
    image, text = (torch.randn(rows, width, generator=generator, dtype=dtype) for width in (10, 11))
    return Batch(image, text, torch.tensor(0.0))


def _own(pair: Batch, rank: int) -> Batch:
    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    return Batch(pair.image[rows], pair.text[rows], pair.scale)


def _teachers(rows: int, dtype: torch.dtype) -> list[Batch]:
    return [batch(rows, 20, 30.0, dtype), batch(rows, 9, 12.0, dtype)]


DIRECTIONS = (0.3, 0.9)


def _step(rank: int, ranks: list[int], dtype: torch.dtype, temperature: float, options: dict, group) -> list[torch.Tensor]:
    """Losses and the parameters' gradients, averaged over `ranks` as DeepSpeed does."""
    encoder, inputs, place = _Encoder(dtype), _inputs(ROWS * len(ranks), dtype), ranks.index(rank)
    teachers = [_own(teacher, place) for teacher in _teachers(ROWS * len(ranks), dtype)]
    asked = {"temperature": temperature, "hard": True, "directions": DIRECTIONS, "group": group}
    loss = similarity_kd(encoder(_own(inputs, place)), teachers, **asked, **options)
    (2.5 * loss.kd + 0.5 * loss.hard).backward()
    gradients = [parameter.grad for parameter in encoder.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient, group=group)
    return [*(part.detach() for part in loss), *(gradient / len(ranks) for gradient in gradients)]


def _truth(ranks: int, temperature: float) -> list[torch.Tensor]:
    encoder, inputs, teachers = _Encoder(torch.float64), _inputs(ROWS * ranks, torch.float64), _teachers(ROWS * ranks, torch.float64)
    loss = similarity_kd_reference(encoder(inputs), teachers, temperature=temperature, hard=True, directions=DIRECTIONS)
    (2.5 * loss.kd + 0.5 * loss.hard).backward()
    return [*(part.detach() for part in loss), *(parameter.grad for parameter in encoder.parameters())]


def _unlike(rank: int) -> dict[str, tuple[Batch, list[Batch] | Batch | None, dict]]:
    """What each rank passes where rank 1 does something of its own: student, teachers and options, by what differs."""
    first, pair, teacher = rank != 1, batch(ROWS, 16, 50.0), batch(ROWS, 20, 30.0)
    leaves = pair.leaves()
    return {
        "number of teachers": (pair, [teacher] if first else [teacher, teacher], {}),
        "no teacher": (pair, teacher if first else None, {"hard": True}),
        "dtype": (pair if first else Batch(*(tensor.double() for tensor in pair)), teacher, {}),
        "teacher's dtype": (pair, teacher if first else Batch(*(tensor.half() for tensor in teacher)), {}),
        "gradient": (leaves if first else leaves._replace(text=pair.text), teacher, {}),
        "no gradient": (leaves if first else pair, teacher, {}),
        "backend": (pair, teacher, {"backend": "eager" if first else "chunked"}),
        "unknown backend": (pair, teacher, {"backend": "eager" if first else "eagre"}),
        "backend that cannot run": (pair, teacher, {"backend": "chunked" if first else "triton"}),
        "ring": (pair, teacher, {"backend": "chunked", "ring": first}),
        "temperature": (pair, teacher, {"temperature": 1.0 if first else 2.0}),
        "temperature out of range": (pair, teacher, {"temperature": 1.0 if first else -1.0}),
        "hard": (pair, teacher, {"hard": first}),
        "no embeddings": (pair if first else Batch(None, None, None), teacher, {}),
    }


def _complaint(student: Batch, teacher: Batch | list[Batch] | None, **options) -> str:
    try:
        similarity_kd(student, teacher, group=dist.group.WORLD, **options)
    except (ValueError, AttributeError) as error:
        return str(error)
    return "no error"


def _work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    everyone = list(range(world))
    results: dict[object, object] = {}
    for name, options in OPTIONS.items():
        for temperature in TEMPERATURES:
            results[name, temperature] = _step(rank, everyone, torch.float64, temperature, options, dist.group.WORLD)
        results[name, "twice"] = [_step(rank, everyone, torch.float32, 0.5, options, dist.group.WORLD) for _ in range(2)]
        twin = _own(batch(world * ROWS, 16, 50.0, torch.bfloat16), rank)
        results[name, "twin"] = similarity_kd(twin, twin, group=dist.group.WORLD, **options).kd
        alone = Batch(*(tensor[:ROWS] for tensor in batch(ROWS, 16, 50.0)[:2]), torch.tensor(50.0))
        results[name, "alone"] = similarity_kd(alone, None, hard=True, **options).hard  # no group: no collective although gloo runs
    ragged = batch(ROWS + (rank == 1), 16, 50.0)
    results["ragged"] = _complaint(ragged, ragged)
    whole = batch(ROWS, 16, 50.0)
    results["faulty"] = _complaint(whole, whole._replace(text=whole.text[rank:]) if rank == 1 else whole)
    results["unlike"] = {what: _complaint(student, teachers, **options) for what, (student, teachers, options) in _unlike(rank).items()}
    if world == 4:
        members = [1, 3]
        subgroup = dist.new_group(members)
        for name, options in OPTIONS.items() if rank in members else ():
            results[name, "subgroup"] = _step(rank, members, torch.float64, 0.5, options, subgroup)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def outcomes(request, tmp_path_factory) -> list[dict]:
    """What every rank wrote down; one start of the processes serves every test below."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_work, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_averaged_gradients_are_those_of_one_process_with_the_whole_batch(outcomes, name, temperature):
    for ours, true in zip(outcomes[0][name, temperature], _truth(len(outcomes), temperature), strict=True):
        assert (ours - true).norm() <= 1e-12 * true.norm()


def test_ring_and_gather_give_the_same_result(outcomes):
    """In float32 the ring adds the same terms in another order: equal within its rounding."""
    for outcome in outcomes:
        for gathered, ring in zip(outcome["chunked", "twice"][0], outcome["ring", "twice"][0], strict=True):
            assert (gathered - ring).norm() <= 2e-6 * gathered.norm()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_subgroup_counts_its_own_ranks(outcomes, name):
    if len(outcomes) < 4:
        pytest.skip("a proper subgroup of two or more ranks needs four")
    for ours, true in zip(outcomes[3][name, "subgroup"], _truth(2, 0.5), strict=True):
        assert (ours - true).norm() <= 1e-12 * true.norm()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_rank_gets_the_same_loss_and_repeats_it_bit_for_bit(outcomes, name):
    first = outcomes[0][name, "twice"][0]
    for outcome in outcomes:
        for run in outcome[name, "twice"]:
            assert all(torch.equal(one, other) for one, other in zip(run, first, strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_student_equal_to_its_teacher_has_a_divergence_of_exactly_zero_on_every_rank(outcomes, name):
    assert [float(outcome[name, "twin"]) for outcome in outcomes] == [0.0] * len(outcomes)


@pytest.mark.parametrize("name", OPTIONS)
def test_without_a_group_a_rank_computes_by_itself(outcomes, name):
    expected = similarity_kd(batch(ROWS, 16, 50.0), None, hard=True, **OPTIONS[name]).hard
    assert all(torch.allclose(outcome[name, "alone"], expected) for outcome in outcomes)


def test_unequal_batches_raise_on_every_rank(outcomes):
    for outcome in outcomes:
        assert outcome["ragged"].startswith("every rank must compute the same loss of as many pairs; these differ: rows: ")
        assert f"rows: {ROWS} on rank 0, {ROWS + 1} on rank 1" in outcome["ragged"]


def test_a_faulty_rank_raises_on_every_rank(outcomes):
    assert f"teacher.text ({ROWS - 1}, 16)" in outcomes[1]["faulty"]
    assert all("rank 1 was given faulty" in outcome["faulty"] for rank, outcome in enumerate(outcomes) if rank != 1)


@pytest.mark.parametrize("what", _unlike(0))
def test_ranks_that_are_asked_for_different_things_all_raise(outcomes, what):
    said = [outcome["unlike"][what] for outcome in outcomes]
    assert "no error" not in said
    assert all("these differ" in text or "rank 1 was given faulty" in text for rank, text in enumerate(said) if rank != 1), said
    if what in ("number of teachers", "backend", "temperature", "ring"):
        assert all(f"{what}: " in text and " on rank 1" in text for text in said), said


@pytest.mark.parametrize("name", OPTIONS)
def test_a_group_of_one_equals_no_group_bit_for_bit(name, tmp_path):
    student, teacher = batch(ROWS, 12, 20.0, seed=1), batch(ROWS, 16, 30.0, seed=2)
    alone = measure(student, teacher, temperature=0.5, hard=True, **OPTIONS[name])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        grouped = measure(student, teacher, temperature=0.5, hard=True, group=dist.group.WORLD, **OPTIONS[name])
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(one, other) for one, other in zip(alone, grouped, strict=True))
