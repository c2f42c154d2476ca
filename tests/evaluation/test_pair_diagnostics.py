"""The numbers of a pair of student and teacher, each against a float64 reference and in cases with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from torch import Tensor

from megakd.evaluation.diagnostics import geometry, neighbours, pair, rows
from megakd.evaluation.diagnostics.cka import Moments, debiased_cka, linear_cka
from megakd.models.embeddings import Embeddings
from megakd_kernels import panels

# Legend: N pairs, P and Q widths of student and teacher.
N, P, Q = 53, 8, 12


def unit(rows_ND: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows_ND, dim=-1)


def model(width: int, seed: int, scale: float = 20.0, count: int = N) -> Embeddings:
    """Images and texts that have something in common, and a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    common, own = torch.randn(count, width, generator=generator), torch.randn(2, count, width, generator=generator)
    image, text = unit(common + own[0] + 0.5), unit(common + 0.3 * own[1] - 0.2)
    return Embeddings(image, text, torch.tensor(scale))


STUDENT, TEACHER = model(P, 1), model(Q, 2, 35.0)


@pytest.fixture(params=["one panel", "panels of a few rows"])
def _panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one panel":
        monkeypatch.setitem(panels.PANEL_BYTES, "cpu", 4 * N * 12 * 7)  # the last one is ragged


def array(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def centred_kernel(features: np.ndarray) -> np.ndarray:
    h = np.eye(len(features)) - 1 / len(features)
    return h @ features @ features.T @ h


def hsic_1(k: np.ndarray, other: np.ndarray) -> float:
    """Song et al. 2012, equation 5, as Nguyen et al. write it."""
    n, one = len(k), np.ones(len(k))
    k, other = k - np.diag(np.diag(k)), other - np.diag(np.diag(other))
    terms = np.trace(k @ other), one @ k @ one * (one @ other @ one) / ((n - 1) * (n - 2)), 2 / (n - 2) * (one @ k @ other @ one)
    return float((terms[0] + terms[1] - terms[2]) / (n * (n - 3)))


def test_cka_is_that_of_centred_kernels() -> None:
    k, other = centred_kernel(array(STUDENT.image)), centred_kernel(array(TEACHER.image))
    expected = np.trace(k @ other) / math.sqrt(np.trace(k @ k) * np.trace(other @ other))
    assert linear_cka(STUDENT.image, TEACHER.image) == pytest.approx(expected, rel=1e-9)


def test_debiased_cka_is_that_of_the_unbiased_hsic() -> None:
    k, other = (array(one.image) @ array(one.image).T for one in (STUDENT, TEACHER))
    expected = hsic_1(k, other) / math.sqrt(hsic_1(k, k) * hsic_1(other, other))
    assert debiased_cka(STUDENT.image, TEACHER.image) == pytest.approx(expected, rel=1e-9)


def test_cka_does_not_see_rotations_scales_and_shifts() -> None:
    rotation = torch.linalg.qr(torch.randn(P, P, generator=torch.Generator().manual_seed(0))).Q
    turned = 3 * STUDENT.image @ rotation + 5
    for measure in (linear_cka, debiased_cka):
        assert measure(STUDENT.image, turned) == pytest.approx(1.0, abs=1e-6)
    apart = (
        torch.randn(20, 400, generator=torch.Generator().manual_seed(5)),
        torch.randn(20, 400, generator=torch.Generator().manual_seed(6)),
    )
    biased, debiased = linear_cka(*apart), debiased_cka(*apart)
    assert biased is not None
    assert debiased is not None
    assert biased > 0.9
    assert abs(debiased) < 0.1


def test_cka_adds_up_over_batches() -> None:
    both = Moments.of(STUDENT.image[:20], TEACHER.image[:20])
    both.add(Moments.of(STUDENT.image[20:], TEACHER.image[20:]))
    assert both.cka() == pytest.approx(linear_cka(STUDENT.image, TEACHER.image), rel=1e-12)
    assert both.count == N


@pytest.mark.parametrize("value", [0.0, 1 / 3, 1e4])
def test_features_that_are_all_alike_have_no_cka(value: float) -> None:
    alike = torch.full((N, 5), value)
    assert linear_cka(alike, STUDENT.image) is linear_cka(STUDENT.image, alike) is None
    assert debiased_cka(alike, STUDENT.image) is debiased_cka(STUDENT.image, alike) is None
    assert debiased_cka(STUDENT.image[:3], TEACHER.image[:3]) is None
    assert linear_cka(STUDENT.image[:0], TEACHER.image[:0]) is None


@pytest.mark.usefixtures("_panels")
@pytest.mark.parametrize("of_texts", [False, True])
def test_rows_agree_as_each_row_says(of_texts: bool) -> None:
    found = rows.agreement(STUDENT, TEACHER, of_texts=of_texts)
    cosines = [array(one.image) @ array(one.text).T for one in (STUDENT, TEACHER)]
    student, teacher = (one.T for one in cosines) if of_texts else cosines
    log_s, log_t = special.log_softmax(20 * student, axis=1), special.log_softmax(35 * teacher, axis=1)
    assert found.kl == pytest.approx(np.mean([stats.entropy(np.exp(t), np.exp(s)) for s, t in zip(log_s, log_t, strict=True)]), rel=1e-5)
    assert found.top1 == pytest.approx(np.mean(student.argmax(1) == teacher.argmax(1)))
    correlations = [stats.spearmanr(s, t).statistic for s, t in zip(student, teacher, strict=True)]
    assert found.spearman == pytest.approx(np.mean(correlations), rel=1e-6)


def test_ranks_of_equal_similarities_are_shared() -> None:
    first = torch.tensor([[0.1, 0.1, 0.3, 0.2], [0.5, 0.5, 0.5, 0.5]])
    second = torch.tensor([[0.4, 0.1, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4]])
    expected = stats.spearmanr(first[0], second[0]).statistic
    assert rows._correlations(first, second).tolist() == pytest.approx([expected, 0.0])


def test_rows_of_a_model_with_itself_agree() -> None:
    found = rows.agreement(STUDENT, STUDENT)
    assert (found.kl, found.top1, found.spearman) == (pytest.approx(0.0, abs=1e-7), 1.0, pytest.approx(1.0))


def test_entropy_and_the_temperature_that_gives_it() -> None:
    cosine = array(STUDENT.image) @ array(STUDENT.text).T

    def of(scale: float) -> float:
        return float(np.mean(stats.entropy(special.softmax(scale * cosine, axis=1), axis=1)))

    assert rows.entropy(STUDENT) == pytest.approx(of(20.0), rel=1e-5)
    target = rows.entropy(TEACHER)
    scale = optimize.brentq(lambda scale: of(scale) - target, 0.1, 900)
    assert rows.effective_temperature(STUDENT, target) == pytest.approx(1 / scale, rel=1e-4)
    assert rows.effective_temperature(STUDENT, rows.entropy(STUDENT)) == pytest.approx(1 / 20, rel=1e-4)


def test_gap_and_alignment() -> None:
    image, text = array(STUDENT.image), array(STUDENT.text)
    assert geometry.modality_gap(STUDENT.image, STUDENT.text) == pytest.approx(np.linalg.norm(image.mean(0) - text.mean(0)))
    assert geometry.alignment(STUDENT.image, STUDENT.text) == pytest.approx(np.mean(np.linalg.norm(image - text, axis=1) ** 2))
    assert geometry.alignment(STUDENT.image, STUDENT.image) == geometry.modality_gap(STUDENT.text, STUDENT.text) == 0.0


@pytest.mark.usefixtures("_panels")
def test_uniformity_is_the_papers() -> None:
    """Its published code: torch.pdist(x, p=2).pow(2).mul(-t).exp().mean().log() with t = 2."""
    expected = torch.pdist(STUDENT.image.double(), p=2).pow(2).mul(-2).exp().mean().log()
    assert geometry.uniformity(STUDENT.image) == pytest.approx(float(expected), rel=1e-6)
    assert geometry.uniformity(torch.ones(4, 3)) == pytest.approx(0.0, abs=1e-6)
    assert geometry.uniformity(STUDENT.image[:1]) is None


@pytest.mark.parametrize("count", [N, 5])  # more rows than columns, and fewer
def test_effective_rank_is_the_exponential_of_the_singular_values_entropy(count: int) -> None:
    singular = np.linalg.svd(array(STUDENT.image[:count]), compute_uv=False)
    shares = singular / singular.sum()
    assert geometry.effective_rank(STUDENT.image[:count]) == pytest.approx(math.exp(stats.entropy(shares)), rel=1e-9)


def test_effective_ranks_that_are_known() -> None:
    assert geometry.effective_rank(torch.eye(6)) == pytest.approx(6.0)
    assert geometry.effective_rank(torch.ones(40, 6)) == pytest.approx(1.0)
    assert geometry.effective_rank(torch.zeros(40, 6)) is None


@pytest.mark.usefixtures("_panels")
@pytest.mark.parametrize("k", [1, 10])
def test_mutual_neighbours_are_counted_one_by_one(k: int) -> None:
    def near(rows_ND: np.ndarray, own: int) -> set[int]:
        similarity = rows_ND @ rows_ND[own]
        similarity[own] = -np.inf
        return set(np.argsort(-similarity)[:k].tolist())

    first, second = array(STUDENT.image), array(TEACHER.image)
    expected = np.mean([len(near(first, own) & near(second, own)) / k for own in range(N)])
    assert neighbours.mutual_neighbours(STUDENT.image, TEACHER.image, k) == pytest.approx(expected)
    assert neighbours.mutual_neighbours(STUDENT.image, STUDENT.image, k) == 1.0


def test_too_few_examples_have_no_neighbours() -> None:
    assert neighbours.mutual_neighbours(STUDENT.image[:11], TEACHER.image[:11]) == 1.0  # all of them
    with pytest.raises(ValueError, match="10 examples: 10 nearest neighbours need 11"):
        neighbours.mutual_neighbours(STUDENT.image[:10], TEACHER.image[:10])


def test_of_many_pairs_rows_are_taken_evenly() -> None:
    many = rows.QUERIES + 300
    chosen = rows.spread(many, torch.device("cpu"))
    assert chosen.tolist() == [number * many // rows.QUERIES for number in range(rows.QUERIES)]
    student, teacher = model(4, 1, count=many), model(6, 2, 35.0, count=many)
    cosines = [(array(one.image)[chosen] @ array(one.text).T) for one in (student, teacher)]
    assert rows.agreement(student, teacher).top1 == pytest.approx(np.mean(cosines[0].argmax(1) == cosines[1].argmax(1)), abs=1e-3)
    assert rows.entropy(student) == pytest.approx(np.mean(stats.entropy(special.softmax(20 * cosines[0], axis=1), axis=1)), rel=1e-5)
    image = array(student.image)
    squared = (2 - 2 * image[chosen] @ image.T)[~np.eye(many, dtype=bool)[chosen]]
    assert geometry.uniformity(student.image) == pytest.approx(np.log(np.exp(-2 * squared).mean()), rel=1e-5)


def test_all_numbers_of_a_pair_are_there_and_finite() -> None:
    found = pair.numbers(STUDENT, TEACHER, Moments.of(STUDENT.image, TEACHER.image))
    assert all(math.isfinite(value) for value in found.values())
    assert found["cka_patch"] == found["cka_image"]
    assert found["rows_kl"] == pytest.approx((found["rows_kl_image_to_text"] + found["rows_kl_text_to_image"]) / 2)
    assert (found["student_temperature"], found["teacher_temperature"]) == pytest.approx((1 / 20, 1 / 35))
    assert found["student_knn_modalities"] == neighbours.mutual_neighbours(STUDENT.image, STUDENT.text)
    documented = pair.__doc__ or ""
    for name in found:
        plain = name.removesuffix("_image_to_text").removesuffix("_text_to_image")
        assert plain.removeprefix("student_").removeprefix("teacher_") in documented, name


def test_of_a_teacher_without_texts_the_image_numbers_are_left() -> None:
    blind = TEACHER._replace(text=TEACHER.text[:, :0], scale=torch.tensor(math.nan))
    found, whole = pair.numbers(STUDENT, blind, None), pair.numbers(STUDENT, TEACHER, None)
    expected = {"cka_image", "cka_image_debiased", "knn_image", "teacher_uniformity_image", "teacher_effective_rank_image"}
    assert {name for name in found if not name.startswith("student_")} == expected
    assert found == {name: value for name, value in whole.items() if name in found}
    assert "student_effective_temperature" not in found
