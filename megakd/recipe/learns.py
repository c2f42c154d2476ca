"""Whether what a recipe says of learning fits its other sections: `freeze`, parts' `rates`, `decays`, `layer_decay`, `ema`, `log.profile`.

Whether the student has these parts is found where it is built, see `training/learning.py`.
"""

from __future__ import annotations

from megakd.recipe.evaluation import Evaluation
from megakd.recipe.models import Student
from megakd.recipe.optim import VECTORS, Optim
from megakd.recipe.parts import IMAGE
from megakd.recipe.vqa import Answers


def check_parts(optim: Optim, student: Student | None, answers: Answers | None, *, pairs: bool) -> None:
    """pairs: whether an objective learns from them. Raises ValueError naming the key for what would change nothing, or be said twice."""
    layered = optim.layer_decay if isinstance(optim.layer_decay, dict) else {}
    named = {
        **{f"optim.rates.{name}": name for name in optim.rates},
        **{f"optim.decays.{name}": name for name in optim.decays if name != VECTORS},
        **{f"optim.layer_decay.{tower}": tower for tower in layered},
    }
    if student is None:
        if given := [*named, *(["optim.layer_decay"] if optim.layer_decay is not None else [])]:
            raise ValueError(f"{given[0]}: there is no [student] with parts; answers.lr gives a decoder's rates; take it out")
        return
    frozen = {f"student.freeze: {name!r}": name for name in student.freeze}
    of_any = ["optim.layer_decay"] if isinstance(optim.layer_decay, float) else []
    if not pairs:
        others = [key for key, name in (frozen | named).items() if name.partition(".")[0] != IMAGE]
        if others:
            raise ValueError(f"{others[0]}: without an objective answers train the vision tower alone; take it out")
        if answers is not None and answers.tower == "frozen" and (given := [*frozen, *named, *of_any]):
            raise ValueError(f"{given[0]}: nothing trains the vision tower: take it out, or set answers.tower to 'trained'")
    if answers is not None and answers.tower == "trained" and IMAGE in student.freeze:
        raise ValueError("student.freeze holds image, and answers.tower = 'trained' would train it: take one of the two out")
    of_tower = [name for name in optim.rates if name.startswith(IMAGE)]
    if answers is not None and answers.lr.tower is not None and of_tower:
        raise ValueError(
            f"optim.rates.{of_tower[0]}: answers.lr.tower = {answers.lr.tower:g} is the vision tower's rate; give one of the two"
        )


def check_ema(optim: Optim, evaluation: Evaluation, exported: str) -> None:
    """exported: `export.weights`. Raises ValueError naming the key where there is no average to score or to write, or none that moves."""
    ema = optim.ema
    asked = {"evaluation.weights": evaluation.weights, "export.weights": exported}
    wanting = next((f"{key} = {value!r}" for key, value in asked.items() if value != "current"), None)
    if ema is None and wanting is not None:
        raise ValueError(f"{wanting}: there is no average of the weights; give optim.ema a decay, for example 0.9999, or take it out")
    if ema is not None and ema.every > optim.steps:
        raise ValueError(f"optim.ema.every = {ema.every} is more than optim.steps = {optim.steps}: the average would never move")
    if evaluation.weights == "both" and evaluation.vqa:
        raise ValueError("evaluation.weights = 'both': a run keeps one set of answers to evaluation.vqa; set it to 'current' or to 'ema'")


def check_profile(profile: int, steps: int) -> None:
    """Raises ValueError where a run of so many steps ends before those that are to be recorded."""
    if profile and profile + 2 > steps:
        raise ValueError(
            f"log.profile = {profile}: the first two steps are not recorded, and optim.steps = {steps} ends before that many more; set it "
            f"to {max(0, steps - 2)} at most"
        )
