"""Several processes against one: a small encoder is trained as data parallelism would, and must get the global gradient."""

from __future__ import annotations

from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from megakd_kernels import SimilarityLoss, contrastive, contrastive_reference, gather_with_grad
from support.loss_cases import Batch, Case, Watch, batch, forward, forward_reference, measure

# Legend: W ranks, B rows of one rank, D width.
ROWS = 7  # of each rank; no chunk below divides it
WIDTH = 12
OPTIONS = {
    "eager": {"backend": "eager"},
    "chunked": {"backend": "chunked", "chunk": 3},
    "chunked whole": {"backend": "chunked"},
    "ring": {"backend": "chunked", "chunk": 3, "ring": True},
    "ring whole": {"backend": "chunked", "ring": True},
}
INTERPRETED = {"triton": {"backend": "triton", "chunk": 3}, "triton ring": {"backend": "triton", "chunk": 3, "ring": True}}
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton; without it the backend is refused")
# Losses by the name of their options; those of one pass take the same panels whole as in chunks.
LOSSES = {
    "similarity": {"temperature": 1.0, "directions": (0.3, 0.9)},
    "similarity at 0.5": {"temperature": 0.5, "directions": (0.3, 0.9)},
    "interactive": {},
    "sigmoid": {},
}
WAYS = [(loss, name) for loss in LOSSES for name in OPTIONS if loss.startswith("similarity") or "whole" not in name]
EVERY_WAY = pytest.mark.parametrize(("loss", "name"), WAYS, ids=["-".join(way) for way in WAYS])


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


def _case(loss: str, rows: int, dtype: torch.dtype) -> Case:
    """The encoder's inputs and the teachers; the first is as wide as the student."""
    generator = torch.Generator().manual_seed(5)
    image, text = (torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype) for width in (10, 11))
    teachers = (batch(rows, WIDTH, 30.0, -4, dtype), batch(rows, 20, 10.0, -6, dtype))
    return Case(loss.split()[0], Batch(image, text, torch.tensor(0.0)), teachers)


def _own(rank: int) -> slice:
    return slice(rank * ROWS, (rank + 1) * ROWS)


def _results(loss: SimilarityLoss, encoder: nn.Module) -> list[Tensor]:
    (2.5 * loss.kd + 0.5 * loss.hard).backward()
    gradients = (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in encoder.parameters())
    return [*(part.detach() for part in loss), *gradients]


def _averaged(results: list[Tensor], ranks: int, group) -> list[Tensor]:
    """The parameters' gradients averaged over ranks as DeepSpeed does."""
    for gradient in results[2:]:
        dist.all_reduce(gradient, group=group)
        gradient /= ranks
    return results


def _step(loss: str, rank: int, ranks: list[int], dtype: torch.dtype, options: dict, group) -> list[Tensor]:
    encoder, case, own = _Encoder(dtype), _case(loss, ROWS * len(ranks), dtype), _own(ranks.index(rank))
    case = case._replace(student=case.student.rows(own), teachers=tuple(teacher.rows(own) for teacher in case.teachers))
    student = encoder(case.student)
    return _averaged(_results(forward(case, student, group=group, **LOSSES[loss], **options), encoder), len(ranks), group)


def _truth(loss: str, ranks: int) -> list[Tensor]:
    encoder, case = _Encoder(torch.float64), _case(loss, ROWS * ranks, torch.float64)
    return _results(forward_reference(case, encoder(case.student), **LOSSES[loss]), encoder)


def _gathered_infonce(student: Batch, group) -> Tensor:
    """InfoNCE as a new loss would be written: in plain torch, over the batch of all ranks."""
    image, text = (gather_with_grad(side, group) for side in (student.image, student.text))
    logits, labels = student.scale * image @ text.T, torch.arange(len(image))
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def _gather_step(rank: int, world: int) -> list[Tensor]:
    encoder, case = _Encoder(torch.float64), _case("similarity", ROWS * world, torch.float64)
    loss = _gathered_infonce(encoder(case.student.rows(_own(rank))), dist.group.WORLD)
    return _averaged(_results(SimilarityLoss(loss, loss.new_zeros(())), encoder), world, dist.group.WORLD)


def _unlike(rank: int) -> dict[str, tuple[Batch, tuple[Batch, ...], dict]]:
    """What each rank passes where rank 1 does something of its own: student, teachers and options, by what differs."""
    first, pair, teacher = rank != 1, batch(ROWS, 16, 50.0), batch(ROWS, 16, 30.0, seed=3)
    leaves = pair.leaves()
    return {
        "dtype": (pair if first else Batch(*(tensor.double() for tensor in pair)), (teacher,), {}),
        "teacher's dtype": (pair, (teacher if first else Batch(*(tensor.half() for tensor in teacher)),), {}),
        "gradient": (leaves if first else leaves._replace(text=pair.text), (teacher,), {}),
        "no gradient": (leaves if first else pair, (teacher,), {}),
        "backend": (pair, (teacher,), {"backend": "eager" if first else "chunked"}),
        "unknown backend": (pair, (teacher,), {"backend": "eager" if first else "eagre"}),
        "ring": (pair, (teacher,), {"backend": "chunked", "ring": first}),
        "no embeddings": (pair if first else Batch(None, None, None), (teacher,), {}),
    }


def _unlike_of_similarity(rank: int) -> dict[str, tuple[Batch, tuple[Batch, ...], dict]]:
    first, pair, teacher = rank != 1, batch(ROWS, 16, 50.0), batch(ROWS, 16, 30.0, seed=3)
    return {
        "number of teachers": (pair, (teacher,) if first else (teacher, teacher), {}),
        "no teacher": (pair, (teacher,) if first else (), {}),
        "backend that cannot run": (pair, (teacher,), {"backend": "chunked" if first else "triton"}),
        "temperature": (pair, (teacher,), {"temperature": 1.0 if first else 2.0}),
        "temperature out of range": (pair, (teacher,), {"temperature": 1.0 if first else -1.0}),
    }


UNLIKE = {"similarity": [*_unlike(0), *_unlike_of_similarity(0)], "interactive": [*_unlike(0)], "sigmoid": [*_unlike(0)]}


def _complaint(function, *arguments, **options) -> str:
    try:
        function(*arguments, group=dist.group.WORLD, **options)
    except (ValueError, AttributeError) as error:
        return str(error)
    return "no error"


def _complaint_of(loss: str, student: Batch, *teachers: Batch, hard: bool = True, **options) -> str:
    return _complaint(forward, Case(loss, student, teachers, hard), student, **options)


def _complaints(loss: str, rank: int) -> dict[str, str]:
    whole = batch(ROWS, 16, 50.0)
    cases = _unlike(rank) | (_unlike_of_similarity(rank) if loss == "similarity" else {})
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # without it "triton" cannot run on a CPU
        return {
            "faulty": _complaint_of(loss, whole, whole._replace(text=whole.text[rank:]) if rank == 1 else whole),
            **{what: _complaint_of(loss, student, *teachers, **options) for what, (student, teachers, options) in cases.items()},
        }


def _work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    everyone, group = list(range(world)), dist.group.WORLD
    subgroup = dist.new_group([1, 3]) if world == 4 else None
    results: dict[object, object] = {"gather": _gather_step(rank, world)}
    for loss, name in WAYS:
        options, kind = OPTIONS[name], loss.split()[0]
        results[loss, name] = _step(loss, rank, everyone, torch.float64, options, group)
        results[loss, name, "twice"] = [_step(loss, rank, everyone, torch.float32, options, group) for _ in range(2)]
        if subgroup is not None and rank in (1, 3):
            results[loss, name, "subgroup"] = _step(loss, rank, [1, 3], torch.float64, options, subgroup)
        alone = Case(kind, batch(ROWS, 16, 50.0), (batch(ROWS, 16, 30.0, seed=3),))
        with Watch() as watch:
            measure(alone, group=group, **options)
        results[loss, name, "largest"] = watch.elements
        results[loss, name, "alone"] = measure(alone, **options)  # no group: no collective although gloo runs
        if kind != "interactive":
            twin = batch(world * ROWS, 16, 50.0, -8.0, torch.bfloat16).rows(_own(rank))
            results[loss, name, "twin"] = forward(Case(kind, twin, (twin,), False), twin, group=group, **options).kd
    for loss in LOSSES:
        for name, options in INTERPRETED.items() if find_spec("triton") and world == 2 and not loss.startswith("similarity") else ():
            results[loss, name] = _step(loss, rank, everyone, torch.float32, options, group)
    results["unlike"] = {loss: _complaints(loss, rank) for loss in UNLIKE}
    ragged, whole = batch(ROWS + (rank == 1), 16, 50.0), batch(ROWS, 16, 50.0)
    results["ragged"] = _complaint_of("similarity", ragged, ragged, hard=False)
    results["hard"] = _complaint_of("similarity", whole, whole, hard=rank != 1)
    results["bias"] = _complaint_of("sigmoid", whole._replace(bias=torch.ones(1 + (rank == 1))), whole, hard=False)
    results["teachers"] = _complaint_of("sigmoid", whole, *([whole] * (1 + (rank == 1))))
    results["gather ragged"] = _complaint(gather_with_grad, ragged.image)
    results["gather dtype"] = _complaint(gather_with_grad, whole.image.double() if rank == 1 else whole.image)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def outcomes(request, tmp_path_factory) -> list[dict]:
    """What every rank wrote down; one start of the processes serves every test below. Triton runs in its interpreter there."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        mp.spawn(_work, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


@EVERY_WAY
def test_averaged_gradients_are_those_of_one_process_with_the_whole_batch(outcomes, loss, name):
    for ours, true in zip(outcomes[0][loss, name], _truth(loss, len(outcomes)), strict=True):
        assert (ours - true).norm() <= 1e-12 * true.norm()


@NEEDS_TRITON
@pytest.mark.parametrize("loss", ["interactive", "sigmoid"])
@pytest.mark.parametrize("name", INTERPRETED)
def test_the_triton_backend_agrees_with_one_process_in_float32(outcomes, loss, name):
    if len(outcomes) > 2:
        pytest.skip("two ranks take every path of the kernels; Triton's interpreter in four processes takes long")
    for ours, true in zip(outcomes[0][loss, name], _truth(loss, len(outcomes)), strict=True):
        assert (ours - true).norm() <= 5e-6 * true.norm()


def test_a_plain_loss_of_gathered_rows_has_the_gradient_of_one_batch(outcomes):
    encoder, case = _Encoder(torch.float64), _case("similarity", ROWS * len(outcomes), torch.float64)
    loss = contrastive_reference(encoder(case.student))
    truth = _results(SimilarityLoss(loss, loss.new_zeros(())), encoder)
    for outcome in outcomes:
        for ours, true in zip(outcome["gather"], truth, strict=True):
            assert (ours - true).norm() <= 1e-12 * true.norm()


def test_rows_that_cannot_be_gathered_together_raise_on_every_rank(outcomes):
    for outcome in outcomes:
        assert f"rows: {ROWS} on rank 0, {ROWS + 1} on rank 1" in outcome["gather ragged"]
        assert "dtype: torch.float32 on rank 0, torch.float64 on rank 1" in outcome["gather dtype"]


def test_without_a_group_nothing_is_gathered_and_the_gradient_is_autograds():
    pair = batch(ROWS, 16, 50.0).leaves()
    assert gather_with_grad(pair.image) is pair.image
    expected = batch(ROWS, 16, 50.0).leaves()
    _gathered_infonce(pair, None).backward()
    contrastive(expected, backend="eager").backward()
    for ours, other in zip(pair.gradients()[:3], expected.gradients()[:3], strict=True):
        assert torch.allclose(ours, other, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"a tensor of shape \(\) has none"):
        gather_with_grad(torch.tensor(1.0))


def test_ring_and_gather_give_the_same_result(outcomes):
    """In float32 the ring adds the same terms in another order: equal within its rounding."""
    for outcome in outcomes:
        for gathered, ring in zip(*(outcome["similarity at 0.5", name, "twice"][0] for name in ("chunked", "ring")), strict=True):
            assert (gathered - ring).norm() <= 2e-6 * gathered.norm()


@EVERY_WAY
def test_a_subgroup_counts_its_own_ranks(outcomes, loss, name):
    if len(outcomes) < 4:
        pytest.skip("a proper subgroup of two or more ranks needs four")
    for ours, true in zip(outcomes[3][loss, name, "subgroup"], _truth(loss, 2), strict=True):
        assert (ours - true).norm() <= 1e-12 * true.norm()


@EVERY_WAY
def test_every_rank_gets_the_same_loss_and_repeats_it_bit_for_bit(outcomes, loss, name):
    first = outcomes[0][loss, name, "twice"][0]
    for outcome in outcomes:
        for run in outcome[loss, name, "twice"]:
            assert all(torch.equal(one, other) for one, other in zip(run, first, strict=True))


@pytest.mark.parametrize("loss", ["interactive", "sigmoid"])
def test_the_ring_never_holds_the_columns_of_all_ranks(outcomes, loss):
    """Told with four ranks: with two, one block's gradients of both parts are as large."""
    columns = len(outcomes) * ROWS * 16
    assert outcomes[0][loss, "chunked", "largest"] >= columns
    if len(outcomes) == 4:
        assert outcomes[0][loss, "ring", "largest"] < columns


@pytest.mark.parametrize(("loss", "name"), [way for way in WAYS if way[0] != "interactive"])
def test_a_student_equal_to_its_teacher_has_a_divergence_of_exactly_zero_on_every_rank(outcomes, loss, name):
    assert [float(outcome[loss, name, "twin"]) for outcome in outcomes] == [0.0] * len(outcomes)


@EVERY_WAY
def test_without_a_group_a_rank_computes_by_itself(outcomes, loss, name):
    expected = measure(Case(loss.split()[0], batch(ROWS, 16, 50.0), (batch(ROWS, 16, 30.0, seed=3),)), **OPTIONS[name])
    for outcome in outcomes:
        assert all(torch.allclose(one, other) for one, other in zip(outcome[loss, name, "alone"], expected, strict=True))


def test_unequal_batches_raise_on_every_rank(outcomes):
    for outcome in outcomes:
        assert outcome["ragged"].startswith("every rank must compute the same loss of as many pairs; these differ: rows: ")
        assert f"rows: {ROWS} on rank 0, {ROWS + 1} on rank 1" in outcome["ragged"]


@pytest.mark.parametrize("loss", UNLIKE)
def test_a_faulty_rank_raises_on_every_rank(outcomes, loss):
    faulty = [outcome["unlike"][loss]["faulty"] for outcome in outcomes]
    assert f"teacher.text ({ROWS - 1}, 16)" in faulty[1]
    assert all("rank 1 was given faulty" in text for rank, text in enumerate(faulty) if rank != 1)


def test_a_faulty_bias_or_number_of_teachers_raises_on_every_rank(outcomes):
    assert "student.bias must hold one floating point number, got shape (2,)" in outcomes[1]["bias"]
    assert all("rank 1 was given faulty" in outcome["bias"] for rank, outcome in enumerate(outcomes) if rank != 1)
    counts = ", ".join(f"{2 if rank == 1 else 1} on rank {rank}" for rank in range(len(outcomes)))
    assert all(f"number of teachers: {counts}" in outcome["teachers"] for outcome in outcomes)


@pytest.mark.parametrize(("loss", "what"), [(loss, what) for loss in UNLIKE for what in UNLIKE[loss]])
def test_ranks_that_are_asked_for_different_things_all_raise(outcomes, loss, what):
    said = [outcome["unlike"][loss][what] for outcome in outcomes]
    assert "no error" not in said
    assert all("these differ" in text or "rank 1 was given faulty" in text for rank, text in enumerate(said) if rank != 1), said
    if what in ("number of teachers", "backend", "temperature", "ring"):
        assert all(f"{what}: " in text and " on rank 1" in text for text in said), said


def test_ranks_that_disagree_about_the_hard_part_all_raise(outcomes):
    assert all("these differ: hard: " in outcome["hard"] for outcome in outcomes)


@EVERY_WAY
def test_a_group_of_one_equals_no_group_bit_for_bit(loss, name, tmp_path):
    case = Case(loss.split()[0], batch(ROWS, WIDTH, 20.0, -5, seed=1), (batch(ROWS, WIDTH, 30.0, -6, seed=2),))
    options = LOSSES[loss] | OPTIONS[name]
    alone = measure(case, **options)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        grouped = measure(case, group=dist.group.WORLD, **options)
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(one, other) for one, other in zip(alone, grouped, strict=True))
