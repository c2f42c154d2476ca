"""`--set` overrides as shells, scripts and tired people write them."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path

from faults.campaign import Mutant
from faults.tiny_commands import recipe_in, tried
from megakd.recipe import Recipe
from support.recipe_keys import is_table, leaves

NAME, COUNT, LIMIT, FEW = "sets", 330, 90.0, 16

TEXTS = (
    *("0", "1", "-1", "2", "7", "1.5", "-0.0", "1e-3", "1e400", "nan", "inf", "-inf", "true", "false", "True", "none", "null", "auto"),
    *("", " ", '""', "''", '"', "[]", "[1]", "[1, 2]", "[[[]]]", "{}", "{ a = 1 }", "{ a = { b = [1] } }"),
    *("[0.1, 0.9]", "[nan, 1.0]", "[0.9, 0.1]", "1.2.3", "1,2", "1;2", "0 ", "+1", "--1", "0o17", "1_000", "0x10", "1e308", "5e-324"),
    *(str(10**20), str(-(10**20)), str(2**63), str(2**63 - 1), str(2**31), "9" * 5000),
    *("1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "[1979-05-27]"),
    *("\x00", "a\x00b", "a\x1b[31mred", "a\nb", "1\nseed = 2", "caf\u00e9", "\udcff", "\u202eevil", "3 # comment", "3#b", "a#b", "\ufeff1"),
    *("..", "../..", "/", "~", "/dev/null", "/proc/self/mem", "x" * 300, "a/" * 3000),
    *("$(id)", "`id`", "; rm -rf x", "%s %d", "{x}", "{", "}"),
    *("[" * 60 + "]" * 60, "[" * 3000 + "]" * 3000, "{ a = " * 50 + "1" + " }" * 50),
    *("ViT-B-32", "hf-hub:a/b", "local-dir:", "local-dir:/nope", "random", "s3://b/{0..3}.tar", "http://127.0.0.1:1/x.tar", "*.tar", "**"),
)
KEYS = (
    *("", ".", "..", "a..b", ".seed", "seed.", "seed.x", "SEED", "optim", "optim.lr.x.y", "data.train.0", "teacher", "ensemble.a"),
    *('"seed"', "'seed'", 'optim."lr"', 'evaluation.retrieval."my.set"', 'evaluation.retrieval.""', 'a."', 'a."b', "no.such.key"),
    *("\x00", "a\nb", " seed ", "\u00e9", "a." * 3000 + "b", "x" * 5000, "evaluation.retrieval." + "y" * 300),
    *("objectives", "student.architecture.x.y.z", "student.architecture", "evaluation.vqa.a.format", "answers.train.a.fromat"),
    *("decoder.lora.rank", "answers.batch", "views", "recipe", "__class__", "model_config"),
)
NUMBERS = (
    *("seed", "data.workers", "data.block", "data.window", "data.max_bad_fraction", "data.max_pixels", "views.flip"),
    *("optim.warmup", "optim.batch", "optim.lr", "optim.final_lr", "optim.eps", "optim.weight_decay", "optim.clip"),
    *("student.max_scale", "student.activation_checkpointing", "teacher.outlier_threshold", "similarity.temperature"),
    *("checkpoint.every", "checkpoint.keep", "log.every", "evaluation.every", "evaluation.batch", "kernels.ring"),
    *("objectives.contrastive", "objectives.feature", "objectives.sigmoid_contrastive"),
)
PLAUSIBLE = (
    *("0", "1", "2", "3", "5", "16", "64", "1000", "1000000", "1000000000"),
    *("0.5", "1.0", "1e-3", "1e-30", "1e30", "1e300", "true", "false"),
)
WHOLE = ("", "=", "==", "seed", "seed 1", "--set", "seed=1=2", "=1", "seed==1", "seed=1,optim.steps=2", "\udcff=1", "seed:1")


def _known() -> list[str]:
    found = dict(leaves(Recipe))
    tables = [f"{key}.mine" for key, field in found.items() if is_table(field)]
    del found["watchdog.limit"]  # a small one would end this process
    return [key.replace("NAME", "mine") for key in (*found, *tables, *Recipe.model_fields)]


def mutants(count: int, draw: random.Random, folder: Path) -> Iterator[Mutant]:
    recipe = recipe_in(folder)
    known = _known()
    for number in range(count):
        sets = tuple(_override(known, draw) for _ in range(draw.choice([1, 1, 1, 2, 3])))
        name = f"{number}: {[text if len(text) < 120 else text[:120] + '...' for text in sets]}"
        yield Mutant(name, functools.partial(tried, recipe, sets=sets, out=folder / f"run{number}"))


def _override(known: list[str], draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.06:
        return draw.choice(WHOLE)
    if kind > 0.6:  # of the kind that the key wants, so that more than the schema is asked
        return f"{draw.choice(NUMBERS)}={draw.choice(PLAUSIBLE)}"
    key = draw.choice(KEYS) if kind < 0.2 else draw.choice(known)
    return f"{key}={draw.choice(TEXTS)}"
