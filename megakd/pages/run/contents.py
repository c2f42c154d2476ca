"""The tables of a run's page, and the facts of how it was made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from megakd.pages.names import data_name
from megakd.pages.records import record_of
from megakd.pages.run import models
from megakd.pages.run.health import time_shares
from megakd.pages.run.reading import KINDS, RunFiles
from megakd.pages.scores import known_scores
from megakd.pages.tables import Cell, Column, Table, count, name, shown
from megakd.recipe import Recipe, texts
from megakd.recipe.optim import Optim
from megakd.runtime import checkpoint

LONGEST_VALUE = 300  # characters


def scores(run: RunFiles) -> Table | None:
    """A row for each score: at the end, where it was highest, and that of teachers whose own runs have it."""
    rows, of_models = [], [model for model in models.rows(run) if model.scores]
    for one in known_scores({**run.scores, **run.history}):
        points = run.history.get(one.path, ())
        last = run.scores.get(one.path, points[-1][1] if points else None)
        step, best = max(points, key=lambda point: point[1], default=(None, None))
        cells = [Cell("–") if value is None else Cell(shown(value), value) for value in (last, best)]
        rows.append((name(one.title), *cells, *models.beside(of_models, one.path), count(step), count(len(points)), name(one.path)))
    columns = [Column(title, numeric=title not in ("score", "in evaluation.json")) for title in ("score", "last, %", "highest, %")]
    columns += [Column(f"{model.role}, %") for model in of_models]
    columns += [Column("highest at step"), Column("evaluations"), Column("in evaluation.json", numeric=False)]
    caption = "Of the student as evaluation.json has it, or else its newest evaluation; all evaluations during the run count as highest."
    return Table("scores", "Scores", caption, tuple(columns), tuple(rows))


def every_number(run: RunFiles) -> Table | None:
    """All that evaluation.json counts."""
    rows = tuple((name(path), Cell(f"{value:.4f}", value)) for path, value in run.scores.items())
    columns = (Column("path", numeric=False), Column("value"))
    return Table("numbers", "Every number of evaluation.json", "Scores are fractions of 1.", columns, rows, folded=True)


def split(run: RunFiles) -> Table:
    """Shares of the training time."""
    shares = sorted(time_shares(run).items(), key=lambda item: -item[1])
    rows = tuple((name(part), Cell(f"{100 * share:.1f}", share)) for part, share in shares)
    caption = "Of the steps that rows of metrics.jsonl are about; waits on a GPU are counted where they happen."
    return Table("split", "Where the time went", caption, (Column("part", numeric=False), Column("share, %")), rows)


def dropped(run: RunFiles) -> Table:
    """Samples that could not be used, by reason."""
    rows = tuple((name(reason), count(found)) for reason, found in sorted(run.dropped.items(), key=lambda item: -item[1]))
    caption = "Samples of training that could not be used, over all starts; the run's console has an example of each reason."
    return Table("dropped", "What was dropped", caption, (Column("reason", numeric=False), Column("samples")), rows)


def starts(run: RunFiles) -> Table:
    """Each start of the run, and how it ended."""
    rows = []
    for number, start in enumerate(run.starts, 1):
        ended = _table(start.get("ended"))
        words = _text(ended.get("words"))
        how = ": ".join(
            filter(None, (_text(ended.get("how")) or ("under way, or no word" if number == len(run.starts) else "no word"), words))
        )
        texts_of = (_time(start.get("started")), start.get("from_step"), start.get("ranks"), start.get("nodes"), start.get("slurm_job_id"))
        rows.append((count(number), *(name(_text(value)) for value in texts_of), name(_time(ended.get("time"))), name(how)))
    columns = (
        *(Column("start"), Column("began", numeric=False), Column("from step"), Column("ranks"), Column("nodes", numeric=False)),
        *(Column("SLURM job", numeric=False), Column("ended", numeric=False), Column("how", numeric=False)),
    )
    return Table("starts", "Starts", "A start without a word of its end was killed, or is of an earlier version.", columns, tuple(rows))


def checkpoints(run: RunFiles) -> Table:
    """Those that are there."""
    rows = []
    for folder in checkpoint.available(run.folder):
        try:
            files = [path.stat() for path in folder.iterdir()]
        except OSError:  # pruned meanwhile
            continue
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(max((file.st_mtime for file in files), default=0)))
        step = int(folder.name.removeprefix("step_"))
        rows.append((count(step), _size(sum(file.st_size for file in files)), Cell(written, written)))
    columns = (Column("step"), Column("size"), Column("written", numeric=False))
    return Table("checkpoints", "Checkpoints", "The newest ones; checkpoint.keep says how many stay.", columns, tuple(rows))


def recipe(run: RunFiles) -> tuple[Table, str]:
    """(every setting that differs from its default, what is wrong with the recipe or "")."""
    columns = tuple(Column(title, numeric=False) for title in ("setting", "this run", "default"))
    if isinstance(run.recipe, str):
        given = texts.flat(run.settings)
        rows = tuple((name(key), name(_value(value)), Cell("?")) for key, value in given.items())
        table = Table("recipe", "Recipe", "Every setting, as run.json has it.", columns, rows, folded=True)
        return table, f"This version of megakd does not read the recipe, so that defaults are not known: {run.recipe}" if given else ""
    defaults = _defaults()
    given = texts.flat(run.recipe.model_dump(mode="json", exclude_defaults=True))
    rows = tuple((name(key), name(_value(value)), name(_value(defaults[key]) if key in defaults else None)) for key, value in given.items())
    caption = "Settings that differ from their defaults; RUN/run.json has all of them, and --recipe takes it."
    return Table("recipe", "Recipe", caption, columns, rows), ""


def _defaults() -> dict[str, Any]:
    """By key; what every recipe has to give is not among them, nor what a section has that recipes may go without."""
    recipe: Callable[..., Recipe] = Recipe.model_construct
    optim: Callable[..., Optim] = Optim.model_construct
    whole = recipe(name="", optim=optim()).model_dump(mode="json", exclude={"name"}, warnings=False)
    return texts.flat(whole)


def facts(run: RunFiles) -> tuple[tuple[str, str], ...]:
    """Command, commit, versions, machine, data."""
    record = record_of(run.folder)
    evaluation = run.section("evaluation")
    sets = [f"{kind}.{one} {_value(where)}" for kind in KINDS for one, where in _named(evaluation.get(kind))]
    found = (
        ("command", record.command),
        ("commit", record.commit),
        ("versions", ", ".join(f"{key} {value}" for key, value in record.versions.items() if value != "None")),
        ("device", f"{_text(run.about.get('ranks')) or '?'} × {record.device}" if record.device else ""),
        ("training data", data_name(run.section("data").get("train")) or ""),
        (
            "questions to learn",
            "; ".join(f"{key} {_value(value)}" for key, value in _named(_table(run.settings.get("answers")).get("train"))),
        ),
        ("evaluated on", "; ".join(sets)),
        ("checksum of these sets", _text(run.final.get("sets")) or ""),
        ("folder", str(run.folder)),
    )
    return tuple((term, said) for term, said in found if said)


def counted(run: RunFiles) -> tuple[tuple[str, str], ...]:
    """Numbers at the head of the page."""
    record, parameters = record_of(run.folder), run.final.get("parameters")
    found = [(f"{run.step:,} of {run.steps or '?'}", "steps")]
    if record.hours is not None:
        hours = record.hours * min(1.0, run.step / run.steps) if run.steps else record.hours
        found.append((f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min", "of training"))
    if isinstance(parameters, int):
        found.append((f"{parameters:,}", "parameters"))
    if isinstance(speed := run.final.get("images_per_second"), int | float):
        found.append((f"{speed:,.0f}", "images/s when evaluated"))
    if len(run.starts) > 1:
        found.append((str(len(run.starts)), "starts"))
    return tuple(found)


def _named(value: Any) -> list[tuple[str, Any]]:
    return list(_table(value).items())


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _time(value: Any) -> str | None:
    """ISO's, which a narrow column may break between day and time."""
    return None if value is None else str(value).replace("T", " ")


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def _size(size: int) -> Cell:
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    factor, unit = next(((factor, unit) for factor, unit in units if size >= factor), (1.0, "bytes"))
    return Cell(f"{size / factor:.3g} {unit}", float(size))
