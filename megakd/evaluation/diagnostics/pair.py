"""The numbers of a pair of student and teacher, by the names that evaluation.json has them under.

Of the student and of the teacher, each behind "student_" or "teacher_":
  temperature                       1 / its logit scale
  row_entropy                       mean entropy in nats of its softmaxes of images over texts
  modality_gap, alignment           of images and texts; see `geometry`
  uniformity_image, uniformity_text
  effective_rank_image, effective_rank_text
  knn_modalities                    mutual nearest neighbours of images and texts; see `neighbours`

Of the two together:
  cka_image, cka_text, cka_patch
  cka_image_debiased                and cka_text_debiased; see `cka`. Of cka_patch each patch is an example
  knn_image, knn_text               mutual nearest neighbours of student and teacher
  rows_kl, rows_top1, rows_spearman means of both directions, which are there as well, as rows_kl_image_to_text; see `rows`
  student_effective_temperature     at which the student's rows have the teacher's entropy, see `rows.effective_temperature`
"""

from __future__ import annotations

from dataclasses import asdict

from megakd.evaluation.diagnostics import geometry, rows
from megakd.evaluation.diagnostics.cka import Moments, debiased_cka, linear_cka
from megakd.evaluation.diagnostics.neighbours import K, mutual_neighbours
from megakd.models.embeddings import Embeddings

FEWEST = K + 2  # pairs, so that a neighbour can be a wrong one
MOST = 50_000  # pairs of a set: embeddings of all of them are held at once


def numbers(student: Embeddings, teacher: Embeddings, patches: Moments | None) -> dict[str, float]:
    """Of the same pairs, at least FEWEST, embedded by both; patches: of the student's tokens and the teacher's. What cannot be computed,
    texts of a teacher without them and values that have no meaning, as a CKA of features that are all alike, is left out.
    """
    found: dict[str, float | None] = {**_of_one(student, "student_"), **_of_one(teacher, "teacher_")}
    for side in ("image", "text") if teacher.has_text else ("image",):
        of_student, of_teacher = getattr(student, side), getattr(teacher, side)
        found[f"cka_{side}"] = linear_cka(of_student, of_teacher)
        found[f"cka_{side}_debiased"] = debiased_cka(of_student, of_teacher)
        found[f"knn_{side}"] = mutual_neighbours(of_student, of_teacher)
    if patches is not None:
        found["cka_patch"] = patches.cka()
    if teacher.has_text:
        directions = {"image_to_text": rows.agreement(student, teacher), "text_to_image": rows.agreement(student, teacher, of_texts=True)}
        each = {direction: asdict(one) for direction, one in directions.items()}
        for name in ("kl", "top1", "spearman"):
            found[f"rows_{name}"] = sum(one[name] for one in each.values()) / len(each)
            found |= {f"rows_{name}_{direction}": one[name] for direction, one in each.items()}
        entropy = found["teacher_row_entropy"]
        assert entropy is not None
        found["student_effective_temperature"] = rows.effective_temperature(student, entropy)
    return {name: value for name, value in found.items() if value is not None}


def _of_one(model: Embeddings, prefix: str) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for side in ("image", "text") if model.has_text else ("image",):
        found[f"uniformity_{side}"] = geometry.uniformity(getattr(model, side))
        found[f"effective_rank_{side}"] = geometry.effective_rank(getattr(model, side))
    if model.has_text:
        found["temperature"] = 1 / float(model.scale)
        found["row_entropy"] = rows.entropy(model)
        found["modality_gap"] = geometry.modality_gap(model.image, model.text)
        found["alignment"] = geometry.alignment(model.image, model.text)
        found["knn_modalities"] = mutual_neighbours(model.image, model.text)
    return {f"{prefix}{name}": value for name, value in found.items()}
