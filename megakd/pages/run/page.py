"""The page of one run, finished or not: RUN/report.html, RUN/report.md and RUN/figures/."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from megakd.pages import page
from megakd.pages.page import Page, Section, section
from megakd.pages.run import contents, curves, health, models, neighbours, questions, reading
from megakd.pages.run.reading import RunFiles

# In figures/.
OURS = re.compile(
    r"((loss|weighted|rate|norm|scale|time|throughput|memory)|(raw|logged|score)_\d+)\.svg"
    r"|(question_\d+_\d+|(image|caption)_(even|missed)_\d+(_\d)?)\.jpg"
)


def make(run: Path, out: Path, command: Sequence[str], *, examples: bool) -> Page:
    """Write the page of the run folder `run` to the folder `out`. command: what is noted as the way to make it again.

    examples: with questions and neighbours, which need the run's data, and neighbours its weights. Raises ValueError as `page.check_out`.
    """
    page.check_out(out, OURS)
    composed = compose(reading.read(run), command, examples=examples)
    page.write(composed, out, kinds=("svg",))
    return composed


def compose(run: RunFiles, command: Sequence[str], *, examples: bool) -> Page:
    """The page's contents, in order."""
    verdict, tone = health.verdict(run)
    recipe, unread = contents.recipe(run)
    sections = (
        section(
            "scores",
            "Scores",
            contents.scores(run),
            models.table(run),
            curves.scores(run),
            contents.every_number(run),
            texts=(_without_scores(run),),
        ),
        section("losses", "Losses", *curves.losses(run)),
        section("speed", "Speed", curves.speed(run), contents.split(run)),
        *(_examples(run) if examples else ()),
        section("data", "Data", contents.dropped(run)),
        section("run", "The run", recipe, contents.starts(run), contents.checkpoints(run), texts=(unread,), facts=contents.facts(run)),
    )
    return Page(
        title=run.name,
        question=health.about(run),
        verdict=verdict,
        tone=tone,
        sentences=health.sentences(run),
        scores=health.scores(run),
        checks=health.checks(run),
        facts=contents.counted(run),
        sections=tuple(one for one in sections if one is not None),
        command=shlex.join(command),
    )


def _examples(run: RunFiles) -> tuple[Section | None, ...]:
    asked, of_questions = questions.examples(run)
    near, of_neighbours = neighbours.examples(run)
    return (
        section("questions", "Questions and answers", *asked, texts=tuple(of_questions)),
        section("neighbours", "Nearest neighbours", *near, texts=tuple(of_neighbours)),
    )


def _without_scores(run: RunFiles) -> str:
    if run.scores or run.history:
        return ""
    return "It has not been evaluated yet." if run.has_sets else "Its recipe names no evaluation sets; megakd evaluate scores it on others."
