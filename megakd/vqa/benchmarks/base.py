"""A VQA benchmark: how its files are read, how its answers are scored, and what its server takes. A file here for each.

Errors are ValueErrors that name the file, the entry and the remedy; a file that is half right is refused whole. A question that could not
be asked, as its image is damaged, counts as wrong in every number, whatever the benchmark makes of an empty answer: POPE's reads "yes".
"""

from __future__ import annotations

import json
import re
import string
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from megakd.recipe import QuestionSource
from megakd.runtime.files import atomic_file
from megakd.vqa.json_files import Entry, is_id, shown
from megakd.vqa.scores import FULL_SCORE, VQA_ACCURACY

_WIDEST = 250  # characters of a name


@dataclass(frozen=True, slots=True)
class Question:
    """A question as its benchmark asks it, before any prompt.

    question_id: the benchmark's own. image: file name or shard key, None without one. text: "" for a caption.
    answers: all human answers in the file's order, () in a test set; answer: what is trained, the most frequent of them.
    family: a group of the results. meta: the entry's other fields.
    turns: (question, answer) of each turn of a conversation, () for a single question. short: a word or a phrase is asked for.
    """

    question_id: str | int
    image: str | None
    text: str
    answers: tuple[str, ...]
    answer: str
    family: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    turns: tuple[tuple[str, str], ...] = ()
    short: bool = False

    @property
    def conversation(self) -> tuple[tuple[str, str], ...]:
        """The turns, of which a single question is one."""
        return self.turns or ((self.text, self.answer),)


class Answered(NamedTuple):
    """A question and the model's answer: "" where the question could not be asked."""

    question: Question
    prediction: str
    asked: bool = True


@dataclass
class QuestionFile:
    """A benchmark's file while it is read. pattern: of the images' names.

    notes: what was left out or moved, for people. fields: of the first entry that names an image.
    """

    source: QuestionSource
    pattern: str
    notes: list[str] = field(default_factory=list)
    fields: tuple[str, ...] = ()

    @cached_property
    def path(self) -> Path:
        return Path(str(self.source.questions))

    def image_name(self, entry: Entry, where: str) -> str:
        """The image's name by the pattern, in which numbers and texts may stand."""
        scalars = {key: value for key, value in entry.items() if is_id(value)}
        self.fields = self.fields or tuple(sorted(scalars))
        try:
            name = self.pattern.format_map(scalars)
        except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{where}: image_name = {self.pattern!r} cannot be filled in ({error!r}); its fields are {', '.join(sorted(scalars))}"
            ) from error
        if "\0" in name:
            raise ValueError(f"{where}: its image's name {shown(name)} has a NUL in it")
        return name


class Benchmark(ABC):
    """One benchmark. Its module is named like its format in the recipe and holds an instance as `BENCHMARK`.

    metric, caveats: parts of the results. image_name: the default pattern of its images' names, from an entry's fields.
    annotations: the answers are in a second file. split: one file holds several splits, and the recipe says which. plain: the recipe may
    leave the questions out.
    skips_unanswered: questions without an answer are left out of a set to learn.
    submission_suffix: of the file for its server: one JSON list (.json), or a line for each question (.jsonl).
    """

    metric: ClassVar[str]
    caveats: ClassVar[tuple[str, ...]] = ()
    image_name: ClassVar[str]
    annotations: ClassVar[bool] = False
    split: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    skips_unanswered: ClassVar[bool] = False
    submission_suffix: ClassVar[str] = ".json"

    @property
    def name(self) -> str:
        """The format's name in the recipe: the module's."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def questions(self, file: QuestionFile) -> Iterator[Question]:
        """All questions of the file, in its order. Raises ValueError with the entry, and Misfit for a file of another form."""

    @abstractmethod
    def looks_like(self, value: Any) -> bool:
        """Whether `value`, the JSON of a file or of its first line, is this benchmark's, for a hint."""

    def other_file(self, value: Any) -> str | None:
        """The remedy where `value` is another file of this benchmark's than the questions'; else None."""
        return None

    def without_answers(self, source: QuestionSource) -> str:
        """The remedy where a set to learn has questions without an answer."""
        return f"take another split if this is a test set, and these questions out of {source.questions!r} otherwise"

    @abstractmethod
    def score(self, question: Question, prediction: str) -> float:
        """In [0, 1], of a question with answers."""

    def counts(self, question: Question) -> bool:
        """Whether the question enters the benchmark's accuracy."""
        return True

    def groups(self, question: Question) -> Mapping[str, Iterable[str]]:
        """Kind of groups -> the question's groups of this kind; every question gives the same kinds in the same order."""
        return {}

    def totals(self, answered: Sequence[Answered]) -> dict[str, Any]:
        """Further numbers over all questions with answers."""
        return {}

    @abstractmethod
    def submission(self, answered: Answered) -> Entry | None:
        """What the benchmark's server or program takes for a question; None where it has neither."""

    def results(self, answered: Sequence[Answered]) -> dict[str, Any]:
        """{"metric", "accuracy", "questions", "by_family": {family: {"accuracy", "questions"}}, "by_...", ..., "caveats"}

        Questions without an answer are left out; where none has one, in a test set, accuracy is None.
        """
        known = [one for one in answered if one.question.answers]
        scored = [one for one in known if self.counts(one.question)]
        results: dict[str, Any] = {"metric": self.metric, "accuracy": None, "questions": len(scored)}
        if scored:
            scores = [self.score(question, prediction) if asked else 0.0 for question, prediction, asked in scored]
            results["accuracy"] = sum(scores) / len(scores)
            members: dict[str, dict[str, list[float]]] = {}
            for one, points in zip(scored, scores, strict=True):
                for kind, groups in {"family": [one.question.family], **self.groups(one.question)}.items():
                    of_kind = members.setdefault(kind, {})
                    for group in filter(None, groups):
                        of_kind.setdefault(group, []).append(points)
            for kind, of_kind in members.items():
                if of_kind:
                    groups_sorted = sorted(of_kind.items())
                    results[f"by_{kind}"] = {group: {"accuracy": sum(of) / len(of), "questions": len(of)} for group, of in groups_sorted}
            results |= self.totals(known)
        return results | {"caveats": [*self.caveats, *self._caveats_of_set(answered, scored)]}

    def _caveats_of_set(self, answered: Sequence[Answered], scored: Sequence[Answered]) -> list[str]:
        """Caveats of this set's questions."""
        caveats = []
        if not scored:
            return ["no question has an answer to compare with: the benchmark's server scores the submission"]
        if lost := sum(not one.asked for one in scored):
            caveats.append(
                f"{lost} of {len(scored)} questions could not be asked (the image is damaged, or they are too long) and count as wrong"
            )
        if left := len(answered) - len(scored):
            caveats.append(f"{left} of {len(answered)} questions are not scored: they have no answer, or the benchmark leaves them out")
        if self.metric == VQA_ACCURACY:
            sole = sum(len(one.question.answers) == 1 for one in scored)
            few = sum(1 < len(one.question.answers) <= FULL_SCORE for one in scored)
            if sole:
                caveats.append(
                    f"{sole} of {len(scored)} questions have one answer: exact match, as the formula for ten people would give 0"
                )
            if few:
                caveats.append(f"{few} of {len(scored)} questions have two or three answers: by the formula none of them can score 1")
        return caveats

    def write_submission(self, answered: Sequence[Answered], folder: Path, name: str) -> Path | None:
        """FOLDER/NAME.submission.json or .jsonl, in the questions' order; None for a benchmark without a server."""
        entries = [self.submission(one) for one in answered]
        if None in entries:
            return None
        lines = self.submission_suffix == ".jsonl"
        path = folder / f"{name}.submission{self.submission_suffix}"
        with atomic_file(path, alone=True) as partial:
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries) if lines else json.dumps(entries), encoding="utf-8")
        return path


def most_frequent(answers: Iterable[str]) -> str:
    """The answer given most often, the first of them where several are; "" of none."""
    counts = Counter(answers).most_common(1)
    return counts[0][0] if counts else ""


def first_of(value: Any) -> set[str]:
    """The keys of the first entry of a list, or of an object of entries."""
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    first = next(iter(entries), None)
    return set(first) if isinstance(first, dict) else set()


def check_pattern(pattern: str) -> None:
    """Raises ValueError for what is no pattern, and for one that gives all questions one image."""
    try:
        parts = [(name, spec or "", kind) for _, name, spec, kind in string.Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise ValueError(f"image_name = {pattern!r} is no pattern: {error}; write {{field}}, and {{{{ for a brace itself") from error
    if not parts:
        raise ValueError(f"image_name = {pattern!r} names no field, so that all questions would have one image; write one, as {{image_id}}")
    for name, spec, kind in parts:
        wide = any(int(digits) > _WIDEST for digits in re.findall(r"\d{1,20}", spec))
        if not name or not re.fullmatch(r"[^.\[\]{}!:]+", name) or kind or "{" in spec or wide:
            raise ValueError(f"image_name = {pattern!r}: {{{name}}} is to be a field's name alone, or with a width as {{image_id:012d}}")
