"""Questions encoded before a run, as they will be asked or learned: what is too long, encodes to nothing, or is dropped."""

from __future__ import annotations

from dataclasses import dataclass, field

from megakd.data.bad_samples import BadCounter, BadSample
from megakd.vqa.benchmarks.base import Question
from megakd.vqa.loader import TeacherReader
from megakd.vqa.prompts import PromptEncoder, SilentAnswer
from megakd.vqa.sets import CaptionSet, Questions, QuestionSet

_MOST = 5000  # questions of a set that are tried: a few seconds
_MOST_CAPTIONS = 50  # each is read from its shard
_MUTE = ", so that the decoder would learn to say nothing: is decoder.tokenizer the language model's own? Otherwise take such questions out"


@dataclass
class TrialEncoding:
    """The result of encoding a part of one set.

    cut: conversations that lose turns, and how many turns. unseen: questions that name an image and are asked without, as the source has no
    `images`. unknown: answers of unknown words alone, and the first of their questions.
    """

    bad: BadCounter = field(default_factory=BadCounter)
    cut: tuple[int, int] = (0, 0)
    unseen: int = 0
    unknown: tuple[int, str] = (0, "")

    @property
    def looked_at(self) -> int:
        return self.bad.seen

    def sentences(self, name: str, learned: bool) -> list[str]:
        """Sentences for people; none where all is well."""
        lines, of = [], f"of {self.looked_at} questions looked at"
        if self.unseen:
            lines.append(f"{name}: {self.unseen} {of} name an image, and none is shown: images is not set")
        if self.unknown[0]:
            lines.append(
                f"{name}: {self.unknown[0]} {of} have an answer of unknown words alone, which is decoded to nothing ({self.unknown[1]})"
            )
        if self.bad.total:
            what = "are replaced by others" if learned else "count as wrong"
            lines.append(f"{name}: {self.bad.total} {of} {what}: {self.bad.by_reason()}; {self.bad.example}")
        if self.cut[0]:
            lines.append(f"{name}: {self.cut[0]} {of} are conversations longer than answers.max_length; {self.cut[1]} turns are dropped")
        return lines


def try_training(questions: Questions, encoder: PromptEncoder, sees_images: bool, key: str, max_bad_fraction: float) -> TrialEncoding:
    """Encode a part of what is to be learned, without reading its images. sees_images: whether the decoder is shown images.

    Raises ValueError naming the question for an answer that encodes to nothing, and when more than `max_bad_fraction` cannot be learned
    or have answers that the tokenizer does not know.
    """
    trial = TrialEncoding()
    for question in _spread(questions):
        trial.bad.seen += 1
        try:
            encoded = encoder.training(question, _shown(questions, question, sees_images, trial))
        except SilentAnswer as bad:
            raise ValueError(f"{key}: question {question.question_id!r}: {bad.detail}{_MUTE}") from bad
        except BadSample as bad:
            trial.bad.add(bad.reason, f"question {question.question_id!r} ({bad.detail})")
            continue
        if not encoder.says([label for label in encoded.learned if label != encoder.end]):
            trial.unknown = (trial.unknown[0] + 1, trial.unknown[1] or f"question {question.question_id!r}, {question.answer[:80]!r}")
        turns, kept = len(question.conversation), encoded.turns
        if kept < turns:
            trial.cut = (trial.cut[0] + 1, trial.cut[1] + turns - kept)
    trial.bad.check(max_bad_fraction, at_least=1, what="questions", key=key)
    if trial.unknown[0] > max_bad_fraction * trial.looked_at:
        raise ValueError(
            f"{key}: {trial.unknown[0]} of {trial.looked_at} answers looked at encode to nothing but unknown words "
            f"({trial.unknown[1]}){_MUTE}"
        )
    return trial


def try_teacher(
    questions: Questions, encoder: PromptEncoder, teacher: TeacherReader, sees_images: bool, key: str, most: float
) -> list[str]:
    """Encode a part of what is to be learned as its teacher will read it. sees_images: whether the student is shown images.

    Gives sentences for people. Raises ValueError when the teacher cannot be given more than `most` of what the student can.
    """
    bad, ignored = BadCounter(), TrialEncoding()
    for question in _spread(questions):
        try:
            learned = encoder.training(question, _shown(questions, question, sees_images, ignored))
        except BadSample:
            continue
        bad.seen += 1
        try:
            teacher.encoder.taught(question, learned, _shown(questions, question, teacher.image_processor is not None, ignored))
        except BadSample as unlike:
            bad.add(unlike.reason, f"question {question.question_id!r}: {unlike.detail}")
    if not bad.total:
        return []
    found = f"{key}: {bad.total} of {bad.seen} questions looked at cannot be put to answers.teacher: {bad.by_reason()}; {bad.example}"
    if bad.fraction > most:
        raise ValueError(
            f"{found}. That is more than data.max_bad_fraction = {most}: let decoder.template end as the teacher's does, "
            f"{teacher.encoder.settings.template!r}; or lower answers.max_length where the teacher takes too few tokens"
        )
    return [f"{found}; they are replaced by others"]


def try_prompts(questions: Questions, encoder: PromptEncoder, sees_images: bool, key: str, max_bad_fraction: float) -> TrialEncoding:
    """Encode a part of what is to be asked. Raises ValueError when more than `max_bad_fraction` cannot be."""
    trial = TrialEncoding()
    for question in _spread(questions):
        trial.bad.seen += 1
        try:
            encoder.prompt(question.text, question.short, _shown(questions, question, sees_images, trial))
        except BadSample as bad:
            trial.bad.add(bad.reason, f"question {question.question_id!r} ({bad.detail})")
    trial.bad.check(max_bad_fraction, at_least=1, what="questions", key=key)
    return trial


def _shown(questions: Questions, question: Question, sees_images: bool, trial: TrialEncoding) -> bool:
    if not sees_images or question.image is None:
        return False
    shown = not isinstance(questions, QuestionSet) or questions.images is not None
    trial.unseen += not shown
    return shown


def _spread(questions: Questions) -> list[Question]:
    return examples(questions, _MOST_CAPTIONS if isinstance(questions, CaptionSet) else _MOST)


def examples(questions: Questions, most: int) -> list[Question]:
    """At most so many, evenly spread, without captions that cannot be read, which count where they are met."""
    step = max(1, -(-len(questions) // most))
    questions_read = []
    for index in range(0, len(questions), step):
        try:
            questions_read.append(questions[index])
        except BadSample:
            continue
    return questions_read
