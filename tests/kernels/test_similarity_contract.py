"""What the public losses promise besides numbers: errors, which gradients flow, memory, repeatability."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megakd_kernels import contrastive, contrastive_reference, dispatch, similarity, similarity_kd
from support.loss_cases import INTERPRETED, Batch, batch
from support.similarity_cases import measure

STUDENT, TEACHER = batch(37, 48, 50, seed=1), batch(37, 64, 80, seed=2)
EVERY_BACKEND = pytest.mark.parametrize(
    "options",
    [
        pytest.param({"backend": "eager"}, id="eager"),
        pytest.param({"backend": "chunked", "chunk": 10}, id="chunked"),
        pytest.param({"backend": "triton", "chunk": 10}, id="triton", marks=INTERPRETED),
    ],
)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (STUDENT, TEACHER, {"backend": "trition"}, "unknown backend 'trition'; known: auto, eager, compiled, chunked, triton"),
        (STUDENT, TEACHER, {"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        (STUDENT, TEACHER, {"temperature": float("nan")}, "temperature must be positive"),
        (STUDENT, TEACHER, {"chunk": 0}, "chunk must be at least 1"),
        (STUDENT, TEACHER, {"chunk": 8, "backend": "eager"}, "takes no chunk"),
        (STUDENT, TEACHER, {"backend": "compiled", "ring": True}, "'compiled' gathers the whole batch and knows no ring"),
        (STUDENT, TEACHER, {"directions": (0.0, 0.0)}, r"not both 0, got \(0.0, 0.0\)"),
        (STUDENT, TEACHER, {"directions": (-1.0, 1.0)}, "not negative"),
        (STUDENT, TEACHER, {"scale_limit": 0.0}, "scale_limit must be positive and finite"),
        (STUDENT, [TEACHER, batch(36, 64, 80)], {}, r"teacher\[1\].image \(36, 64\)"),
        (STUDENT, batch(36, 64, 80), {}, r"same pairs, got student.image \(37, 48\).*teacher.image \(36, 64\)"),
        (STUDENT._replace(text=STUDENT.text[1:]), None, {}, r"student.image \(37, 48\), student.text \(36, 48\)"),
        (STUDENT._replace(image=STUDENT.image[0]), None, {}, r"student.image \(48,\)"),
        (STUDENT, TEACHER._replace(text=TEACHER.text[:, 1:]), {}, r"teacher.image \(37, 64\), teacher.text \(37, 63\)"),
        (batch(0, 48, 1), None, {}, "batch is empty"),
        (STUDENT._replace(scale=torch.ones(2)), None, {}, r"student.scale must hold one number, got shape \(2,\)"),
        (STUDENT._replace(text=STUDENT.text.long()), None, {}, "floating point: student.text is torch.int64"),
    ],
)
def test_faulty_requests_name_what_is_wrong(student, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        similarity_kd(student, teacher, **options)


@EVERY_BACKEND
def test_contrastive_is_the_hard_part_and_needs_no_teacher(options):
    assert torch.allclose(contrastive(STUDENT, **options).double(), contrastive_reference(STUDENT), rtol=1e-6)
    loss = similarity_kd(STUDENT, None, hard=True, temperature=3.0, **options)
    assert loss.kd == 0
    assert torch.equal(loss.hard, contrastive(STUDENT, **options))


@EVERY_BACKEND
def test_losses_are_float32_scalars_and_parts_not_asked_for_are_zero(options):
    leaves = Batch(*(tensor.bfloat16() for tensor in STUDENT)).leaves()
    loss = similarity_kd(leaves, TEACHER, **options)
    assert loss.kd.dtype == loss.hard.dtype == torch.float32
    assert loss.kd.shape == loss.hard.shape == ()
    assert loss.kd.requires_grad
    assert loss.hard == 0
    assert not loss.hard.requires_grad


@EVERY_BACKEND
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])
def test_a_gradient_does_not_depend_on_which_others_are_wanted(options, wanted):
    whole, some = STUDENT.leaves(), STUDENT.leaves()
    for leaf, want in zip(some, (*wanted, 0), strict=True):
        leaf.requires_grad_(bool(want))
    for leaves in (whole, some):
        loss = similarity_kd(leaves, TEACHER, temperature=2.0, hard=True, **options)
        (loss.kd + loss.hard).backward()
    for leaf, want, gradient in zip(some, (*wanted, 0), whole.gradients(), strict=True):
        assert torch.equal(leaf.grad, gradient) if want else leaf.grad is None


@EVERY_BACKEND
@pytest.mark.parametrize("part", ["kd", "hard"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_each_part_can_be_differentiated_alone(options, part, temperature):
    together, alone = STUDENT.leaves(), STUDENT.leaves()
    getattr(similarity_kd(together, TEACHER, temperature=temperature, hard=True, **options), part).backward()
    teacher = TEACHER if part == "kd" else None
    getattr(similarity_kd(alone, teacher, temperature=temperature, hard=part == "hard", **options), part).backward()
    for ours, expected in zip(together.gradients()[:3], alone.gradients()[:3], strict=True):
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-7)


@EVERY_BACKEND
def test_the_teacher_gets_no_gradient(options):
    student, teacher = STUDENT.leaves(), TEACHER.leaves()
    similarity_kd(student, teacher, **options).kd.backward()
    assert teacher.gradients() == [None] * 4
    frozen_scale = STUDENT.leaves()._replace(scale=torch.tensor([50.0]))
    similarity_kd(frozen_scale, teacher, **options).kd.backward()
    assert torch.equal(frozen_scale.image.grad, student.image.grad)


@EVERY_BACKEND
def test_a_scale_of_one_element_keeps_its_shape(options):
    scale = torch.tensor([50.0], requires_grad=True)
    contrastive(STUDENT._replace(scale=scale), **options).backward()
    assert scale.grad.shape == (1,)


def test_auto_is_eager_for_small_batches_and_chunked_for_large_ones(monkeypatch):
    monkeypatch.setitem(dispatch.TABLE, "cpu", {"similarity_kd": [(37, "eager")]})
    larger = (batch(38, 48, 50, seed=1), batch(38, 64, 80, seed=2))
    small = (STUDENT, TEACHER)
    for pairs, options, expected in [
        (small, {}, "eager"),
        (larger, {}, "chunked"),
        (small, {"chunk": 10}, "chunked"),
        (small, {"ring": True}, "chunked"),
    ]:
        chosen = measure(*pairs, temperature=2.0, hard=True, **options)
        named = measure(*pairs, temperature=2.0, hard=True, **{"backend": expected, **options})
        assert all(torch.equal(one, other) for one, other in zip(chosen, named, strict=True))


@pytest.mark.parametrize("loss", ["similarity_kd", "contrastive", "interactive_kd", "sigmoid_kd"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_every_choice_of_auto_is_a_backend_and_large_batches_never_form_the_matrix(loss, device):
    chosen = [dispatch.choose(loss, 2**power, torch.device(device), torch.float32) for power in range(24)]
    assert set(chosen) <= set(dispatch.BACKENDS) - {"auto"}
    assert chosen[-1] in ("chunked", "triton")
    assert "triton" not in chosen or device == "cuda"
    assert all(dispatch.choose(loss, 2**power, torch.device(device), torch.float64) != "triton" for power in range(24))


@pytest.mark.parametrize("loss", ["similarity_kd", "contrastive", "interactive_kd", "sigmoid_kd"])
def test_embeddings_of_float32_on_a_gpu_are_multiplied_by_its_library(loss, monkeypatch):
    """Only the kernels that form logits themselves care: their exact products do not run on the matrix units."""
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device, dtype: None)
    chosen = {halves: dispatch.choose(loss, 2**15, torch.device("cuda"), torch.float32, halves=halves) for halves in (True, False)}
    assert chosen == {True: "triton", False: "chunked" if loss in ("similarity_kd", "contrastive") else "triton"}


@pytest.mark.parametrize(
    ("student", "teacher", "halves"), [("bfloat16", "float16", True), ("float32", "bfloat16", False), ("bfloat16", "float32", False)]
)
def test_the_choice_is_told_whether_all_embeddings_are_halves(student, teacher, halves, monkeypatch):
    told = []
    monkeypatch.setattr(similarity, "choose", lambda *_, **options: told.append(options["halves"]) or "eager")
    similarity_kd(batch(4, 8, 5, dtype=getattr(torch, student)), batch(4, 8, 5, dtype=getattr(torch, teacher)))
    assert told == [halves]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="under the interpreter Triton does run on the CPU")
def test_triton_is_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match="'triton' cannot run here: it needs a CUDA device, and the embeddings are on cpu; use 'auto'"):
        similarity_kd(STUDENT, TEACHER, backend="triton")
    with pytest.raises(ValueError, match="an input is float64"):
        dispatch.choose("similarity_kd", 8, torch.device("cuda"), torch.float64, backend="triton")


def test_the_package_imports_without_triton():
    """And without touching a GPU: what needs either is imported when it is asked for."""
    code = "import sys; sys.modules['triton'] = None; import megakd_kernels, torch; assert not torch.cuda.is_initialized()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_default_chunk_keeps_a_panel_within_its_bytes():
    from megakd_kernels.panels import PANEL_BYTES, chunk_rows

    cpu = torch.device("cpu")
    assert chunk_rows(100, 100, torch.float32, cpu) == 100
    assert chunk_rows(10**5, 10**5, torch.float32, cpu) * 10**5 * 4 <= PANEL_BYTES["cpu"]
    assert chunk_rows(10**9, 10**9, torch.float32, cpu) == 1
