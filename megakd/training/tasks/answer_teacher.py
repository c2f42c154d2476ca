"""`[answers.teacher]`: a decoder that was trained before reads the same questions and images, and its probabilities are learned, too.

It keeps its own prompts, vision tower, image size and number of image tokens. What it shares with the student is the vocabulary and, token
by token, the answers: the k-th answer token of a question is the same for both, in columns of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megakd.data.transforms import normalise
from megakd.export.bundle import Bundle, BundleSpec, resolve_bundle
from megakd.models import clip
from megakd.models.fingerprint import preprocessing
from megakd.models.patches import patch_tokens
from megakd.models.vlm import decoder, decoder_tokenizer
from megakd.models.vlm.decoder import DecoderModel, DecoderSpec
from megakd.objectives.answer_divergence import TokenDivergence
from megakd.objectives.answers import DIVERGENCE
from megakd.recipe import Answers, AnswerTeacher, Data, chain
from megakd.runtime import precision
from megakd.vqa.loader import ImageProcessor, TeacherReader, TeacherRows
from megakd.vqa.prompts import PromptEncoder

# In a checkpoint: SHA-256 of the teacher's manifest, as bytes.
FINGERPRINT = f"{DIVERGENCE}.teacher"
_DIVERGENCES = {"forward": "KL(teacher, student)", "reverse": "KL(student, teacher)", "js": "Jensen-Shannon divergence"}
_UNLIMITED = 10**7  # tokens: of a model that names no longest sequence; the student's answers.max_length limits the words


@dataclass(frozen=True)
class AnswerTeacherData:
    """The teacher without its weights. words: of the tokenizer that both share, which the divergence is over.

    outline: on torch's meta device. notes: what the user should know.
    """

    settings: AnswerTeacher
    spec: BundleSpec
    outline: DecoderModel
    reader: TeacherReader
    words: int
    notes: tuple[str, ...]

    def describe(self) -> str:
        settings, seen = self.settings, self.outline.image_tokens
        count = clip.parameters_in(self.outline.language)
        sees = f"an image becomes {seen} tokens of it" if seen else "it sees no image"
        held = "" if self.spec.decoder.settings.quantise == "none" else f" in {self.spec.decoder.settings.quantise}"
        return (
            f"teacher of answers: {settings.bundle}, {count:,} parameters{held}, {sees}; {_DIVERGENCES[settings.divergence]}, "
            f"temperature {settings.temperature:g}, weight {settings.weight:g}"
        )


def prepare(answers: Answers, settings: AnswerTeacher, student: DecoderModel, data: Data) -> AnswerTeacherData:
    """answers: with `settings` as its teacher. student: the decoder that learns, on torch's meta device. data: how images are read.

    Reads the bundle's files once, for their checksums. Raises ValueError for a folder that is no bundle, or one that is not whole; for a
    vocabulary that is not the student's, but for padding; and for conversations longer than the teacher takes.
    """
    key = f"answers.teacher.bundle = {settings.bundle!r}"
    try:
        spec = resolve_bundle(Path(settings.bundle), quantise=settings.quantise)
        visual: Any = None if spec.tower is None else clip.on_meta(spec.tower).clip.visual
        outline = decoder.build(spec.decoder, visual, torch.device("meta"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{key}: {error}") from error
    words, notes = _shared_words(student.description, spec.decoder, key)
    positions, longest = spec.decoder.positions, answers.max_length - student.image_tokens + outline.image_tokens
    if positions is not None and longest > positions:
        raise ValueError(
            f"answers.max_length = {answers.max_length}: with the teacher's {outline.image_tokens} tokens for an image in place of "
            f"{student.image_tokens} a conversation has {longest}, and the teacher takes {positions} (max_position_embeddings); set "
            f"answers.max_length to {positions - outline.image_tokens + student.image_tokens} at most"
        )
    limit = "max_position_embeddings of answers.teacher"
    encoder = PromptEncoder(spec.decoder.tokenizer, spec.decoder.settings, outline.image_tokens, positions or _UNLIMITED, spec.rules, limit)
    eyes = None if spec.tower is None else ImageProcessor(preprocessing(spec.tower), data, spec.decoder.settings.image_fit)
    return AnswerTeacherData(settings, spec, outline, TeacherReader(encoder, eyes), words, notes)


def check_to_come(settings: AnswerTeacher, student: DecoderSpec) -> str:
    """What is known of a teacher whose recipe is about to train it, for people. Raises ValueError for a vocabulary that will not be the
    student's, and for a recipe that trains no decoder."""
    key = f"answers.teacher.recipe = {settings.recipe!r}"
    _shared_words(student, decoder.resolve(chain.decoder(chain.before(settings, "answers.teacher"))), key)
    return f"teacher of answers: {settings.bundle}, which recipe {settings.recipe!r} trains first"


def _shared_words(student: DecoderSpec, teacher: DecoderSpec, key: str) -> tuple[int, tuple[str, ...]]:
    """(words that both output layers have logits of, what is left out of them). Raises ValueError where a token is not the same word."""
    mine, theirs = student.tokenizer, teacher.tokenizer
    own, other = mine.get_vocab(), theirs.get_vocab()
    words, rows = student.words, (student.rows, teacher.rows)
    if differing := {word for word in own.keys() | other.keys() if own.get(word) != other.get(word)}:
        first = min(differing, key=lambda word: (own.get(word, other.get(word)), word))
        problem = (
            f"{len(differing)} words differ, for example {first!r} is {own.get(first)} for decoder and {other.get(first)} for the teacher"
        )
    elif student.ends[0] != teacher.ends[0]:
        problem = f"answers end with token {student.ends[0]} for decoder and with {teacher.ends[0]} for the teacher"
    elif text := next((text for text in decoder_tokenizer.SAMPLES if _ids(mine, text) != _ids(theirs, text)), None):
        problem = (
            f"the words are the same, but {text[:40]!r} is {_ids(mine, text)[:8]} for decoder and {_ids(theirs, text)[:8]} for the teacher"
        )
    elif words > min(rows):
        problem = f"the tokenizer has words up to {words - 1}, the output layers {rows[0]} and {rows[1]} rows"
    elif words == max(rows):
        return words, ()
    else:
        padding = f"{rows[0] - words} of the decoder's {rows[0]} rows, {rows[1] - words} of the teacher's {rows[1]}"
        return words, (
            f"answers.teacher: compared over the tokenizer's {words} words; what is past them is padding and left out: {padding}",
        )
    raise ValueError(
        f"{key}: its vocabulary is not the decoder's ({problem}), and logits are compared word by word: name one of the same tokenizer"
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


class LanguageTeacher:
    """The teacher with its weights on the device, frozen and in evaluation mode, as wide as all models there (`runtime.precision`)."""

    def __init__(self, data: AnswerTeacherData, device: torch.device) -> None:
        """Raises ValueError when weights do not fit."""
        self._data, kind = data, precision.of(device)
        try:
            bundle = Bundle.build(data.spec, device, precision.dtype(kind), kind)
        except ValueError as error:
            raise ValueError(f"answers.teacher.bundle = {data.settings.bundle!r}: {error}") from error
        self._decoder = bundle.decoder.requires_grad_(False)
        # its text tower is not kept: nothing here reads captions
        self._visual: Any = None if bundle.towers is None else bundle.towers.clip.visual
        self._dtype, self._device = precision.dtype(kind), device

    def read(self, rows: TeacherRows, temperature: float) -> TokenDivergence:
        """What the student's logits of these questions' answer tokens are compared with. It holds the logits of answer tokens alone.

        temperature: of this step, in place of the settings'.
        """
        eyes, visual_BVC = self._data.reader.image_processor, None
        with torch.no_grad(), precision.of_towers(self._device):
            if eyes is not None and rows.pixels is not None:
                pixels = normalise(rows.pixels, eyes.preprocess, self._dtype)
                visual_BVC = patch_tokens(self._visual, pixels, self._decoder.settings.layer)
            logits_NU = self._decoder.answer_logits(visual_BVC, *rows[1:])
        return TokenDivergence(self._data.settings.model_copy(update={"temperature": temperature}), logits_NU, self._data.words)

    def state(self) -> dict[str, Tensor]:
        """Which teacher it is, for a checkpoint."""
        return {FINGERPRINT: torch.tensor(list(bytes.fromhex(self._data.spec.sha256)), dtype=torch.uint8)}

    def check_same(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError when `state` is another teacher's."""
        if FINGERPRINT in state and not torch.equal(state[FINGERPRINT], self.state()[FINGERPRINT]):
            raise ValueError(
                f"answers.teacher.bundle = {self._data.settings.bundle!r}: is another bundle now than the one that this run has learned "
                f"from; put that one back, or start over with --resume none or another --out"
            )
