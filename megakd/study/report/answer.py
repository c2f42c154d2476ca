"""The answer to a study's question, in two sentences with numbers, or what is missing for one."""

from __future__ import annotations

from dataclasses import dataclass

from megakd.pages.tables import shown, signed
from megakd.study.report.summary import ESCAPES, LEVEL, Followed, Summary, labels
from megakd.study.results import DONE


@dataclass(frozen=True)
class Answer:
    """verdict: a word or three; sentences: what it rests on."""

    verdict: str
    sentences: tuple[str, str]

    @property
    def shown(self) -> tuple[str, str]:
        """The sentences, each with a capital."""
        first, second = (text[:1].upper() + text[1:] for text in self.sentences)
        return first, second

    @property
    def text(self) -> str:
        """In one line."""
        return " ".join((f"{self.verdict}:", *filter(None, (self.sentences[0], self.shown[1]))))


def answer(summary: Summary) -> Answer:
    """By Spearman's correlation of the main score of teachers and of their students under plain KD, in the setting with most cells; where
    the question is whether students gain from a teacher, by the largest gain over the method without one."""
    main, setting = summary.results.main, summary.main_setting
    done = sum(row.status == DONE for row in summary.cells)
    if main is None or setting is None or not done:
        return Answer("No answer yet", (f"{done} of {len(summary.cells)} cells are finished, and none has a score.", ""))
    if summary.results.of_gain:
        return _by_gain(summary)
    here = [found for found in summary.followed if found.setting == setting and found.score == main]
    plain = next((found for found in here if found.method == summary.plain_kd), None)
    if plain is None or plain.order.spearman.value is None:
        reason = plain.order.spearman.reason if plain is not None else _why_no_order(summary)
        first = f"how students follow their teachers in {main.title} cannot be said: {reason}."
        return Answer("Too little data", (first, _best_gain(summary)))
    spearman, wrong = plain.order.spearman, plain.order.wrong_pairs
    varied = ", ".join(f"{axis} {value}" for axis, value in labels(setting, summary.settings).items())
    counted = f"{spearman.n} teachers, {plain.order.students} students{f'; {varied}' if varied else ''}"
    correlation = f"under {plain.method}, {main.title} of students and teachers has a Spearman correlation of {_number(spearman.value)}"
    share = f"{_percent(wrong.value)} of the pairs of teachers"
    if spearman.low is None or spearman.high is None:
        first = f"{correlation} ({counted}), and {share} are in the wrong order; {spearman.reason}."
        return Answer("Too little data", (first, _best_other(here, plain)))
    verdict = "Yes" if spearman.low > 0 else "No, the reverse" if spearman.high < 0 else "Undecided"
    if verdict != "Undecided" and (spearman.p is None or spearman.p >= LEVEL):
        verdict += f", for these {spearman.n} teachers; they are too few to speak of others"
    interval = f"95% interval {_number(spearman.low)} to {_number(spearman.high)}"
    first = f"{correlation} ({interval}; {counted}), and {share} ({_percent(wrong.low)} to {_percent(wrong.high)}) are in the wrong order."
    return Answer(verdict, (first, _best_other(here, plain)))


def escaping(summary: Summary) -> str:
    """Whether there is a method under which stronger teachers make better students; empty where none could be told from plain KD."""
    main = summary.results.main
    compared = [of for of in summary.followed if of.setting == summary.main_setting and of.score == main and of.over_plain is not None]
    if main is None or not any(of.over_plain is not None and of.over_plain.low is not None for of in compared):
        return ""
    rule = (
        f"a Spearman in {main.title} above {ESCAPES:g}, and its difference from that of {summary.plain_kd} above 0 with the whole interval"
    )
    if found := summary.escaping():
        return f"Stronger teachers make better students under {', '.join(of.method for of in found)}, by this rule: {rule}."
    others = f"{len(compared)} other methods" if len(compared) > 1 else "1 other method"
    return f"Of {others} none makes students follow their teachers more than {summary.plain_kd} does, by this rule: {rule}."


def _by_gain(summary: Summary) -> Answer:
    """In the main score and setting; a gain counts that is significant after the main table's correction."""
    main, plain = summary.results.main, summary.results.plain
    of_setting = [compared for compared in summary.by_method if compared.group.setting == summary.main_setting]
    found = [(gain, compared) for compared in of_setting if main and (gain := compared.gains.get(main.path)) and gain.value is not None]
    if main is None or not found:
        return Answer("Too little data", (f"no seed has a finished cell with a teacher and one of {plain or 'a method without'}.", ""))
    gain, best = max(found, key=lambda of: of[0].value or 0.0)
    if gain.p is None:
        verdict, why = "Too little data", f"{gain.reason}."
    elif best.differs(main.path):
        verdict, why = ("Yes" if (gain.value or 0.0) > 0 else "No, the reverse"), ""
    else:
        verdict, why = "Undecided", f"no gain over {plain} is significant at 5% after Holm's correction over the table of methods."
    return Answer(verdict, (_best_gain(summary), why))


def _best_other(here: list[Followed], plain: Followed) -> str:
    others = [found for found in here if found is not plain and found.order.spearman.value is not None]
    if not others:
        return "no other method has enough cells to be compared in this."
    best = max(others, key=lambda found: found.order.spearman.value or -1.0)
    spearman, over = best.order.spearman, best.over_plain
    interval = f" ({_number(spearman.low)} to {_number(spearman.high)})" if spearman.low is not None and spearman.high is not None else ""
    if over is None or over.value is None or over.low is None or over.high is None:
        than = "which has no interval against it"
    else:
        clear = "more" if over.low > 0 else "less" if over.high < 0 else "which is no clear difference"
        than = f"{_number(over.value)} {clear}" if clear in ("more", "less") else clear
        than += f" ({_number(over.low)} to {_number(over.high)})"
    said = f"of {len(others)} other methods, {best.method} has the highest:" if len(others) > 1 else f"under {best.method} it is"
    return f"{said} {_number(spearman.value)}{interval}, {than}."


def _best_gain(summary: Summary) -> str:
    main, setting = summary.results.main, summary.main_setting
    found = [of for of in summary.by_method if of.group.setting == setting and main is not None and of.group.mean(main.path) is not None]
    if main is None or not found:
        return "No finished cell has that score."
    best = max(found, key=lambda of: of.group.mean(main.path) or 0.0)
    gain, seeds = best.gains.get(main.path), len(best.group.by_seed[main.path])
    over = ""
    if gain is not None and gain.value is not None:
        interval = f", interval {signed(gain.low)} to {signed(gain.high)}" if gain.low is not None and gain.high is not None else ""
        over = f", {signed(gain.value)} points over {summary.results.plain} ({gain.n} seed{'s' * (gain.n != 1)}{interval})"
    value = shown(best.group.mean(main.path) or 0.0)
    return f"The highest mean is that of {best.group.method}: {value}% of {seeds} seed{'s' * (seeds != 1)}{over}."


def _why_no_order(summary: Summary) -> str:
    main, setting = summary.results.main, summary.main_setting
    if main is None or setting is None or summary.plain_kd is None:
        return "no finished cell has a teacher"
    taught = summary.students(setting, summary.plain_kd, main.path)
    own = summary.teacher_means(main.path).keys() & taught.keys()
    if len(taught) < 2:
        return f"under {summary.plain_kd} there are students of {len(taught)} teacher{'s' * (len(taught) != 1)}"
    return f"of the {len(taught)} teachers that have students under {summary.plain_kd}, {len(own)} have that score themselves"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:.0f}%"
