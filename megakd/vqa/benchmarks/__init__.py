"""The VQA benchmarks, one file each: found by the name of their module, which is their format in the recipe."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from megakd.recipe import QuestionSource
from megakd.recipe.vqa import BENCHMARKS
from megakd.vqa.benchmarks.base import Benchmark, Question, QuestionFile, check_pattern
from megakd.vqa.json_files import Misfit


def benchmark(name: str) -> Benchmark:
    """The benchmark whose format in the recipe is `name`, one of recipe.vqa.BENCHMARKS."""
    instance: Benchmark = importlib.import_module(f"{__name__}.{name}").BENCHMARK
    return instance


def parse(source: QuestionSource) -> tuple[Iterator[Question], QuestionFile]:
    """The questions of every format but captions, in the file's order, made one by one, and the file with what is noted meanwhile.

    Raises ValueError, before the first question or at any, for a file that is missing, or is not what `format` says; it then names the
    format that the file looks like.
    """
    here = benchmark(source.format)
    every = [benchmark(name) for name in BENCHMARKS]
    if source.questions is None:
        raise ValueError(f"questions is not set: format = {source.format!r} reads the questions from a file")
    if source.annotations is not None and not here.annotations:
        takers = " or ".join(repr(one.name) for one in every if one.annotations)
        raise ValueError(
            f"annotations = {source.annotations!r} is for format = {takers}; {source.format} has its answers beside its questions"
        )
    if (source.split is None) == here.split:
        takers = " and ".join(one.name for one in every if one.split)
        raise ValueError(f"split = {source.split!r}: {takers} needs train, val or test, and no other format takes it")
    for key in ("questions", "annotations"):
        if "\0" in (getattr(source, key) or ""):
            raise ValueError(f"{key} = {getattr(source, key)!r}: a path has no NUL in it")
    if source.plain and not here.plain:
        takers = " or ".join(repr(one.name) for one in every if one.plain)
        raise ValueError(
            f"plain = true is for format = {takers}, whose replies can stand alone; {source.format} needs its questions: take it out"
        )
    file = QuestionFile(source, source.image_name or here.image_name)
    check_pattern(file.pattern)
    return _hinted(here, file), file


def _hinted(here: Benchmark, file: QuestionFile) -> Iterator[Question]:
    try:
        yield from here.questions(file)
    except Misfit as error:
        hint = f"format = {here.name!r} does not fit it"
        for one in map(benchmark, BENCHMARKS):
            if one.looks_like(error.value):
                hint = hint if one is here else f"it looks like {one.name}: set format = {one.name!r} instead of {here.name!r}"
                break
            if other := one.other_file(error.value):
                hint = other
                break
        raise ValueError(f"{error}: {hint}") from error
