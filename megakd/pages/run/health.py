"""Whether a run is well, and how good its student is: what stands at the head of its page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from megakd.pages.names import data_name, model_name
from megakd.pages.page import BAD, GOOD, LOOK, Check
from megakd.pages.run.reading import RunFiles, State
from megakd.pages.scores import known_scores
from megakd.pages.tables import shown

# Beyond these a check asks to be looked at. They are rules of thumb, of which each check says its number.
WAITING = 0.1  # share of the time in which the student waits for data
DROPPED = 0.001  # share of the samples
SPIKE = 20.0  # a gradient norm over the median
SLOWER = 0.7  # images/s of the last fifth over the median
FALLEN = 0.01  # of the main score since its highest evaluation
CEILING = 0.999  # of student.max_scale
MOST_SCORES = 6

_TONES = {State.FINISHED: GOOD, State.FAILED: BAD, State.HUNG: BAD, State.STOPPED: LOOK, State.SAVED: LOOK, State.RUNNING: ""}


def verdict(run: RunFiles) -> tuple[str, str]:
    """(what became of the run, its tone)."""
    at = f"step {run.step} of {run.steps or '?'}"
    if run.problem and not run.about:
        return "Unreadable", BAD
    if run.state is State.FINISHED:
        return f"Finished: {run.steps or run.step} steps", _TONES[run.state]
    if run.state is State.FAILED and run.has_results:
        return f"Trained to {at}, and then failed", BAD
    return f"{run.state.value} at {at}", _TONES[run.state]


def sentences(run: RunFiles) -> tuple[str, ...]:
    """What the verdict rests on: last words, and how a run that has not ended goes on."""
    found = [run.problem, run.final_problem, run.last_words]
    if run.state is State.SAVED:
        found.append("It was saved there, and the same command goes on.")
    elif run.state is State.HUNG:
        found.append(f"Its ranks made no progress; their stacks are in {run.folder / 'hung'}, and the rank without a file hung.")
    elif run.state is State.STOPPED:
        quiet = "" if run.last_words else ": it was killed, or an earlier version ran it"
        found.append(f"It left no word of why{quiet}. The same command goes on from the newest checkpoint.")
    return tuple(filter(None, found))


def about(run: RunFiles) -> str:
    """What the run learns, from whom and on what, in a sentence."""
    if not run.settings:
        return ""
    losses = {name: weight for name, weight in run.section("objectives").items() if isinstance(weight, int | float) and weight}
    answers, pairs = run.settings.get("answers"), data_name(run.section("data").get("train"))
    learned = [" + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in losses.items())]
    learned += ["answers to questions"] if answers else []
    sections = [run.section("teacher"), *(one for one in run.section("ensemble").values() if isinstance(one, dict))]
    teachers = " and ".join(model_name(section) for section in sections if section)
    into = f"into {model_name(run.section('student'))}" if run.section("student") else "into a decoder alone"
    parts = [" and ".join(filter(None, learned)), f"from {teachers}" if teachers and losses else "", into]
    parts += [f"on {pairs}" if losses and pairs else "", f"in {run.steps or '?'} steps of {run.section('optim').get('batch')}"]
    return f"Recipe {run.settings.get('name')}: {', '.join(filter(None, parts))}."


def scores(run: RunFiles) -> tuple[tuple[str, str], ...]:
    """(percent, title) of the student's scores, the main ones first: of evaluation.json, else of the newest evaluation."""
    newest = {path: points[-1] for path, points in run.history.items() if points}
    if run.scores:
        known = known_scores(run.scores)[:MOST_SCORES]
        step = run.final.get("step")
        at = f" at step {step}" if type(step) is int and run.steps is not None and step < run.steps else ""
        return tuple((f"{shown(run.scores[one.path])} %", f"{one.title}{at}") for one in known)
    known = known_scores(newest)[:MOST_SCORES]
    return tuple((f"{shown(newest[one.path][1])} %", f"{one.title} at step {newest[one.path][0]}") for one in known)


def checks(run: RunFiles) -> tuple[Check, ...]:
    """Each thing that tells whether a run is well, as far as its rows say something of it."""
    found = (_loss(run), _gradients(run), *_scale(run), _evaluations(run), _data(run), _dropped(run), _speed(run))
    return tuple(check for check in found if check is not None)


def _loss(run: RunFiles) -> Check | None:
    losses = [value for _, value in run.series("loss")]
    if run.rows and run.rows[-1].get("loss") is None:
        return Check(BAD, "Loss", f"is not finite in the last row, of step {run.rows[-1]['step']}")
    if len(losses) < 2:
        return None
    part = max(1, len(losses) // 10)
    first, last = statistics.median(losses[:part]), statistics.median(losses[-part:])
    moving = any(key.startswith(("objectives.", "answers.")) for key in run.groups("scheduled"))
    scheduled = "; weights of its objectives are scheduled, see each curve" if moving else ""
    if last < first:
        return Check(GOOD, "Loss", f"fell from {first:.3g} to {last:.3g}{scheduled}")
    return Check(LOOK, "Loss", f"did not fall: {first:.3g} at first, {last:.3g} at last{scheduled}")


def _gradients(run: RunFiles) -> Check | None:
    if run.rows and "gradient_norm" in run.rows[-1] and run.rows[-1]["gradient_norm"] is None:
        return Check(BAD, "Gradients", f"the norm is not finite in the last row, of step {run.rows[-1]['step']}")
    norms = run.series("gradient_norm")
    norms = norms[len(norms) // 5 :]  # a run's first steps are of another size
    if len(norms) < 3:
        return None
    middle = statistics.median(value for _, value in norms)
    step, largest = max(norms, key=lambda point: point[1])
    if middle > 0 and largest > SPIKE * middle:
        return Check(LOOK, "Gradients", f"norm {largest:.3g} at step {step}, {largest / middle:.0f} times the median of {middle:.3g}")
    return Check(GOOD, "Gradients", f"norm {middle:.3g} in the median, {largest:.3g} at most after the first fifth")


def _scale(run: RunFiles) -> Iterator[Check]:
    scales, most = run.series("scale"), run.section("student").get("max_scale")
    if scales and isinstance(most, int | float) and scales[-1][1] >= CEILING * most:
        yield Check(LOOK, "Logit scale", f"{scales[-1][1]:.4g}, at its ceiling (student.max_scale = {most:g})")


def _evaluations(run: RunFiles) -> Check | None:
    main = next(iter(known_scores(run.history)), None)
    points = run.history[main.path] if main is not None else ()
    if main is None or len(points) < 2:
        return None
    step, best = max(points, key=lambda point: point[1])
    last_step, last = points[-1]
    if best - last > FALLEN:
        fallen = f"{shown(last)} % at step {last_step}, {100 * (best - last):.1f} points under step {step}"
        return Check(LOOK, "Evaluations", f"{main.title}: {fallen}")
    rose = f"{shown(points[0][1])} % at step {points[0][0]}, {shown(last)} % at step {last_step}"
    mark = GOOD if last > points[0][1] else LOOK
    return Check(mark, "Evaluations", f"{main.title}: {rose}, of {len(points)}")


def _data(run: RunFiles) -> Check | None:
    shares = time_shares(run)
    if "data" not in shares:
        return None
    share = shares["data"]
    said = f"{100 * share:.0f} % of the time is spent waiting for it"
    return Check(GOOD, "Data", said) if share <= WAITING else Check(LOOK, "Data", f"{said}: raise data.workers, or bring it nearer")


def _dropped(run: RunFiles) -> Check | None:
    if not run.rows:
        return None
    dropped, taken = sum(run.dropped.values()), run.step * run.samples_in_a_step
    if not dropped:
        return Check(GOOD, "Dropped", "no sample")
    share = dropped / taken if taken else math.inf
    said = f"{dropped:,} samples" + (f", {100 * share:.2g} % of those that were taken" if taken else "")
    return Check(GOOD if share <= DROPPED else LOOK, "Dropped", said)


def _speed(run: RunFiles) -> Check | None:
    speeds = [value for _, value in run.series("images_per_second")]
    if not speeds:
        return None
    middle = statistics.median(speeds)
    last = statistics.median(speeds[-max(1, len(speeds) // 5) :])
    if last < SLOWER * middle:
        return Check(LOOK, "Speed", f"{last:,.0f} images/s in the last fifth, {middle:,.0f} in the median")
    return Check(GOOD, "Speed", f"{middle:,.0f} images/s in the median")


def time_shares(run: RunFiles) -> dict[str, float]:
    """Shares of the training time, without evaluations, by what it went to; empty where no row says."""
    totals = {name: math.fsum(value for _, value in run.series("seconds", name)) for name in run.groups("seconds")}
    whole = math.fsum(totals.values())
    return {name: seconds / whole for name, seconds in totals.items()} if whole > 0 else {}
