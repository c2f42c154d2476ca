"""Recipes of a study's runs, derived from shipped ones: a run's recipe names those of the runs that come before it."""

from __future__ import annotations

from pathlib import Path

from megakd.recipe.chain import LANGUAGE
from megakd.recipe.load import load_recipe
from megakd.runtime.run_folder import BUNDLE, MODEL
from megakd.study import launcher


class Recipes:
    """Writes the recipes of all runs under `out` to OUT/recipes/; each is named by its run's folder. data: the shapes world."""

    def __init__(self, out: Path, data: Path) -> None:
        self.out, self._data = out, data

    def derive(self, shipped: str, folder: str, *overrides: str) -> str:
        """The path of the recipe for the run OUT/folder."""
        recipe = load_recipe(shipped, [*launcher.moved(shipped, self._data), *overrides])
        return str(launcher.write_recipe(recipe, self.out / "recipes" / f"{folder}.json"))

    def trained(self, role: str, folder: str, recipe: str) -> tuple[str, ...]:
        """Overrides that make the CLIP which `recipe` trains in OUT/folder the "student" or "teacher" of another recipe."""
        return f"{role}.model=local-dir:{self.out}/{folder}/{MODEL}", f"{role}.recipe={recipe}"

    def decoder(self) -> str:
        """The recipe of the decoder that can read and sees nothing, in OUT/decoder."""
        return self.derive("smoke_decoder", "decoder")

    def blind(self, name: str, seed: int) -> str:
        """The recipe of a decoder that answers questions without a tower, in OUT/name."""
        return self.derive("vqa_blind", name, *self._language(seed), f"decoder.recipe={self.decoder()}")

    def readout(self, name: str, seed: int, tower: tuple[str, ...]) -> str:
        """The recipe of a decoder that answers questions from a frozen tower, in OUT/name; its projector is aligned in OUT/name_align.

        tower: overrides of `[student]`, such as those of `trained`.
        """
        shared = (*self._language(seed), *tower)
        align = self.derive("vqa_align", f"{name}_align", *shared, f"decoder.recipe={self.decoder()}")
        start = f"decoder.start={self.out}/{name}_align/{BUNDLE}"
        return self.derive("vqa_lora", name, *shared, start, f"decoder.recipe={align}")

    def _language(self, seed: int) -> tuple[str, ...]:
        return f"seed={seed}", f"decoder.model={self.out}/decoder{LANGUAGE}"
