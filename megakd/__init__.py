"""megakd: distil giant CLIP-style teachers into small students.

    recipe = megakd.load_recipe("smoke")
    run = megakd.train(recipe, "runs/mine", ["optim.steps=100"])
    model = megakd.load_model(run)
    megakd.evaluate(run)["retrieval"]

Each name is imported when it is first used: `import megakd` alone takes milliseconds, torch and open_clip take seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megakd.version import __version__

if TYPE_CHECKING:
    from megakd.evaluation.encoder import load_model
    from megakd.evaluation.run import evaluate
    from megakd.export.bundle import load_bundle
    from megakd.recipe import Recipe
    from megakd.recipe.load import load_recipe
    from megakd.study.launcher import train

__all__ = ["Recipe", "__version__", "evaluate", "load_bundle", "load_model", "load_recipe", "train"]

_HOMES = {
    "Recipe": "megakd.recipe",
    "evaluate": "megakd.evaluation.run",
    "load_bundle": "megakd.export.bundle",
    "load_model": "megakd.evaluation.encoder",
    "load_recipe": "megakd.recipe.load",
    "train": "megakd.study.launcher",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'megakd' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
