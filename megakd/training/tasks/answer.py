"""Learning to answer questions: a decoder that reads the student's vision tower, or a blind one, and is judged by its answers."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megakd.data import mixture
from megakd.data.mixture import AnyOrder, MixtureOrder
from megakd.data.transforms import normalise
from megakd.export import manifest
from megakd.export.bundle import Bundle
from megakd.export.warm_start import check_same_grid, warm_start
from megakd.models import clip
from megakd.models.fingerprint import preprocessing
from megakd.models.pretrained import weights_file
from megakd.models.student import Student
from megakd.models.vlm import IGNORED, decoder, decoder_check, decoder_tokenizer, lora
from megakd.models.vlm.decoder import DecoderModel, DecoderSpec
from megakd.models.vlm.student import QuestionInputs, VisionLanguageStudent
from megakd.objectives.answer_divergence import TokenDivergence
from megakd.objectives.answers import DIVERGENCE, NAME, AnswerLoss
from megakd.recipe import Answers, Recipe, chain
from megakd.recipe import Decoder as Settings
from megakd.runtime import collectives, precision, watchdog
from megakd.runtime.checkpoint import Progress
from megakd.runtime.ds_config import DsConfig
from megakd.runtime.launch import World
from megakd.runtime.module_state import load_weights
from megakd.runtime.preemption import StopPoller
from megakd.runtime.run_folder import BUNDLE, RunLog
from megakd.training.tasks import answer_teacher
from megakd.training.tasks.answer_teacher import AnswerTeacherData, LanguageTeacher
from megakd.training.tasks.base import RowLoss, StepPart, Task, loading
from megakd.vqa import check, evaluate
from megakd.vqa.loader import ImageProcessor, QuestionBatch, QuestionBatches, TeacherReader, TeacherRows, question_batches
from megakd.vqa.prompts import PromptEncoder
from megakd.vqa.sets import Mixture, open_mixture, question_order

_COMPARED = 20  # questions on which the bundle's tokenizer is compared with the run's
_PARTS = {"tower": "clip.visual.", "projector": "decoder.projector.", "decoder": "decoder.language."}  # of which `answers.lr` gives rates
_FITTED = {"tower": "", "pad": ", padded and whole,", "squash": ", squashed,"}
_ADAPTED = {"lora": "LoRA", "none": "frozen", "full": "all weights"}


@dataclass(frozen=True)
class AnswerData:
    """What answers are learned from and judged by. student, image_processor: None for a decoder that sees nothing.

    outline: the decoder on torch's meta device, for the student's tower. encoder: how a question becomes a prompt, in training, in
    evaluation and from the bundle alike. notes: what the user should know of decoder and questions before the run: what is not covered,
    cut or left out.
    """

    recipe: Recipe
    settings: Answers
    student: clip.ModelSpec | None
    image_processor: ImageProcessor | None
    decoder: DecoderSpec
    outline: DecoderModel
    encoder: PromptEncoder
    teacher: AnswerTeacherData | None
    train: Mixture
    order: AnyOrder
    sets: dict[str, evaluate.Opened]
    notes: tuple[str, ...]

    key, result = "answers.train", BUNDLE

    def signature(self, *, of_names: bool = False) -> int:
        if not isinstance(self.order, MixtureOrder):
            return self.train.signature
        return zlib.crc32(repr(self.order.sources).encode(), self.train.signature)

    def _of_sources(self) -> list[str]:
        """Of a mixture, the share and the epochs of each source."""
        return mixture.outline(self.order, self.key, "questions", self.recipe.optim.steps)

    def describe(self) -> list[str]:
        tower = "no tower" if self.student is None else f"{self.settings.tower} tower"
        batch, adapted = self.recipe.questions_in_a_step(), _ADAPTED[self.decoder.settings.adapt]
        weight = f"weight {self.settings.weight:g}"
        taught = [] if self.teacher is None else [self.teacher.describe()]
        first = f"questions: {len(self.train)}, batch {batch}, {weight}; {tower}; decoder: {adapted}"
        return [first, *self._of_sources(), *taught, *self.notes]

    def preview(self, world: World) -> list[str]:
        first, outline, longest = self.train[0], self.outline, self.settings.max_length
        fit, chat = self.decoder.settings.image_fit, self.encoder.chat
        asked = self.encoder.prompt_text(first.text, first.short)
        learned = sum(parameter.numel() for parameter in outline.parameters() if parameter.requires_grad)
        return [
            f"decoder: {self.decoder.settings.model or 'own architecture'}, {clip.parameters_in(outline.language):,} parameters with its "
            f"adapters, {learned:,} trained with the projector; an image{_FITTED[fit]} becomes {outline.image_tokens} tokens, which "
            f"leaves {longest - outline.image_tokens} of {longest} to question and answer",
            *([] if chat is None else [f"prompts: the tokenizer's chat template, whose answers end with {chat.end_token}: {asked!r}"]),
            *([] if self.teacher is None else [self.teacher.describe()]),
            *self.notes,
            f"questions to learn: {len(self.train)}, for example {first.text!r} -> {first.answer!r}",
            *self._of_sources(),
            *(f"questions to be judged by: {name}, {len(opened.questions)}" for name, opened in self.sets.items()),
        ]

    def start(self, config: DsConfig, world: World, log: RunLog) -> Answering:
        return Answering(self, config, world)


def prepare(
    recipe: Recipe,
    answers: Answers,
    settings: Settings,
    config: DsConfig,
    world: World,
    student: clip.ModelSpec | None,
    to_come: frozenset[str],
) -> AnswerData:
    """answers, settings: `[answers]` and `[decoder]` of the recipe. to_come: of "decoder" and "answers.teacher" those that another recipe
    is about to train.

    Raises ValueError, on every rank, for a decoder, a tower, questions and a DeepSpeed configuration that do not fit each other.
    """
    check_batch(recipe, settings, config, world)
    awaited = "decoder" in to_come
    description = decoder.resolve(chain.decoder(settings) if awaited else settings)
    visual: Any = None
    images = None
    if student is not None:
        visual = clip.on_meta(student).clip.visual
        images = ImageProcessor(preprocessing(student), recipe.data, settings.image_fit)
    outline = decoder.build(description, visual, torch.device("meta"))
    encoder = PromptEncoder(description.tokenizer, description.settings, outline.image_tokens, answers.max_length)
    _check_length(recipe, answers, description)
    collectives.by_main(lambda: decoder_tokenizer.check_export(description.tokenizer, description.config), world)
    notes = [decoder_check.check(description, outline.plain)]
    if outline.adapted:
        notes.append(lora.coverage(outline.language))
    teacher = None
    if answers.teacher is not None and "answers.teacher" in to_come:
        notes.append(answer_teacher.check_to_come(answers.teacher, description))
    elif answers.teacher is not None:
        teacher = answer_teacher.prepare(answers, answers.teacher, outline, recipe.data)
        notes += teacher.notes
    if settings.start is not None and student is not None:
        before = chain.before(settings).model_dump() if awaited else manifest.read(Path(settings.start))["decoder"]
        check_same_grid(before, settings, f"decoder.start = {settings.start!r}")
    train = open_mixture(answers.train, "answers.train", recipe.data, world.rank, world.size, lambda: collectives.barrier(world))
    weights = {name: source.weight for name, source in answers.train.items()}
    order = question_order(train, recipe.questions_in_a_step(), recipe.seed, weights)
    sets = evaluate.open_sets(recipe, world, sees=recipe.student is not None)
    reader = None if teacher is None else teacher.reader
    notes += collectives.by_main(lambda: _tried_questions(recipe, encoder, reader, bool(images), train, sets), world)
    said = tuple(filter(None, notes))
    return AnswerData(recipe, answers, student, images, description, outline, encoder, teacher, train, order, sets, said)


def check_batch(recipe: Recipe, settings: Settings, config: DsConfig, world: World) -> None:
    """Raises ValueError for questions that do not divide by ranks and accumulation steps, and quantised weights that ZeRO would part."""
    if settings.quantise != "none" and config.stage == 3:
        raise ValueError(
            f"decoder.quantise = {settings.quantise!r}: ZeRO-3 would part what bitsandbytes reads as a whole; use stage 1 or 2"
        )
    batch, rounds = recipe.questions_in_a_step(), config.micro_batches
    if batch % world.size:
        raise ValueError(f"answers.batch = {batch} does not divide by {world.size} ranks: make it a multiple of the number of ranks")
    if batch < world.size * rounds:
        raise ValueError(
            f"answers.batch = {batch}: less than one question for each of {world.size} ranks x {rounds} accumulation steps; raise it to "
            f"{world.size * rounds} at least, or raise train_micro_batch_size_per_gpu"
        )


def _check_length(recipe: Recipe, answers: Answers, description: DecoderSpec) -> None:
    """A model with learned positions fails beyond its last; others only become worse."""
    generated = recipe.evaluation.answer_tokens if recipe.evaluation.vqa else 0
    if description.positions is not None and answers.max_length + generated > description.positions:
        raise ValueError(
            f"answers.max_length = {answers.max_length}{f' + evaluation.answer_tokens = {generated}' if generated else ''}: the language "
            f"model takes {description.positions} tokens (max_position_embeddings); set answers.max_length to "
            f"{description.positions - generated} at most"
        )


def _tried_questions(
    recipe: Recipe,
    encoder: PromptEncoder,
    teacher: TeacherReader | None,
    has_images: bool,
    train: Mixture,
    sets: dict[str, evaluate.Opened],
) -> list[str]:
    """What the user should know of the questions' lengths and answers. Raises ValueError for sets of which too much is unusable."""
    most, notes = recipe.data.max_bad_fraction, list[str]()
    for name, part in train.sets.items():
        key = f"answers.train.{name}"
        notes += check.try_training(part, encoder, has_images, key, most).sentences(key, learned=True)
        if teacher is not None:
            notes += check.try_teacher(part, encoder, teacher, has_images, key, most)
    for name, opened in sets.items():
        key = f"evaluation.vqa.{name}"
        notes += check.try_prompts(opened.questions, encoder, has_images, key, most).sentences(key, learned=False)
    return notes


class Answering(Task):
    """The questions of a run.

    Evaluations and the bundle need whole weights. Below ZeRO-3 the decoder answers where it is, without a copy of its weights, which may
    be a large language model's. A ZeRO-3 module has them only inside the engine's forward, so a replica waits on the CPU and is on the
    device only while it answers.
    """

    adds_up = True
    items = "questions"

    def __init__(self, data: AnswerData, config: DsConfig, world: World) -> None:
        self._data, self._config, self._world, self._dtype = data, config, world, precision.dtype(config.precision)
        self._loss, self._teacher = AnswerLoss(world), None
        self.weights, self.in_a_step = {NAME: data.recipe.peak("answers.weight")}, data.recipe.questions_in_a_step()
        if data.teacher is not None:
            watchdog.beat("loading answers.teacher")
            self._teacher, self.roles = LanguageTeacher(data.teacher, world.device), ("answers.teacher",)
            self.weights |= {DIVERGENCE: data.recipe.peak("answers.teacher.weight")}
        if isinstance(data.order, MixtureOrder):
            self.mixture, self.of_rows = data.order, tuple(self.weights)
        self.rates = {_PARTS[name]: rate for name, rate in data.settings.lr.model_dump(exclude_none=True).items()}
        self._tower_learns = data.settings.tower == "trained"
        self.learns = ("decoder.", "clip.visual.") if self._tower_learns else ("decoder.",)

    def weights_at(self, step: int) -> dict[str, float]:
        keys = {NAME: "answers.weight", DIVERGENCE: "answers.teacher.weight"}
        return {name: self._data.recipe.value_at(keys[name], step) for name in self.weights}

    def extend(self, module: Student, device: torch.device) -> VisionLanguageStudent:
        description, settings = self._data.decoder, self._data.decoder.settings
        # Quantised weights are made where they stay; others go to the device with the engine, after evaluations have made their copies.
        where = device if settings.quantise != "none" else torch.device("cpu")
        visual: Any = None if self._data.student is None else module.clip.visual
        reader = decoder.build(description, visual, where, self._dtype)
        if settings.start is not None:
            warm_start(Path(settings.start), reader, self._data.student)
        self._module = VisionLanguageStudent(module, reader, settings.layer, tower_learns=self._tower_learns)
        return self._module

    def keep_replica(self) -> None:
        if self._config.stage == 3:
            self._replica = copy.deepcopy(self._module)

    def open(self, progress: Progress) -> QuestionBatches:
        data, self._watch = self._data, lora.Watch(self._module)
        position = loading(data.recipe, self._world, progress.step * self.in_a_step)
        teacher = None if data.teacher is None else data.teacher.reader
        return question_batches(data.train, data.order, data.encoder, data.image_processor, teacher, **position)

    def teach(self, batch: QuestionBatch, role: str, step: int) -> list[TokenDivergence]:
        """Of each micro-batch, what the teacher says of its answers."""
        assert self._teacher is not None, role
        assert batch.teacher is not None, "the loader was given its reader"
        pieces = self._config.micro_batches
        columns = [[None] * pieces if one is None else one.tensor_split(pieces) for one in batch.teacher]
        temperature = self._data.recipe.value_at("answers.teacher.temperature", step)
        return [self._teacher.read(TeacherRows(*rows), temperature) for rows in zip(*columns, strict=True)]

    def part(self, batch: QuestionBatch, taught: Mapping[str, list[TokenDivergence]], step: int) -> StepPart:
        pixels = batch.pixels
        if pixels is not None and self._data.image_processor is not None:
            pixels = normalise(pixels, self._data.image_processor.preprocess, self._dtype)
        questions = QuestionInputs(pixels, batch.ids_BL, batch.attend_BL, batch.image_mask_BL, batch.labels_BL)
        answer_tokens = self._loss.answer_tokens(batch.labels_BL)
        micro_batches = questions.split(self._config.micro_batches)
        for read in taught.values():
            micro_batches = [asked._replace(divergence=one) for asked, one in zip(micro_batches, read, strict=True)]

        def by_question(outputs: list[dict[str, Tensor]]) -> dict[str, RowLoss]:
            tokens_B = (batch.labels_BL != IGNORED).sum(1)
            names = {NAME: "answer_nll", DIVERGENCE: DIVERGENCE}
            return {name: RowLoss(torch.cat([one[names[name]] for one in outputs]).detach(), tokens_B) for name in self.of_rows}

        inputs = [{"questions": asked} for asked in micro_batches]
        return StepPart(inputs, lambda outputs: self._loss.losses(outputs, answer_tokens), by_question)

    def state(self) -> dict[str, Tensor]:
        return {} if self._teacher is None else self._teacher.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if self._teacher is not None:
            self._teacher.check_same(state)

    def stepped(self) -> None:
        """Refuse adapters that no gradient reached on any rank: they would be trained in name alone."""
        if reached := self._watch.close():
            flags = torch.tensor([float(was) for was in reached.values()], device=self._world.device)
            sums = collectives.start_sum(flags, self._world).read()
            lora.refuse_unreached(dict(zip(reached, map(bool, sums), strict=True)), self._module.decoder.language)

    def evaluate(self, weights: dict[str, Tensor], step: int, folder: Path, interruptions: StopPoller) -> dict[str, Any]:
        """The answers to the recipe's questions, which are also written to `folder`. Those given before an interruption are kept."""
        data, recipe = self._data, self._data.recipe
        if not data.sets:
            return {}
        module, is_replica = self._whole(weights), self._config.stage == 3
        if is_replica:
            module.to(self._world.device)
        answerer = evaluate.Answerer(
            module.decoder,
            None if data.student is None else module.look,
            data.encoder,
            data.image_processor,
            self._world.device,
            torch.float32 if is_replica else self._dtype,  # of the towers
            recipe.evaluation.vqa_batch,
            recipe.evaluation.answer_tokens,
            {"step": step, "weights": _digest(weights)},
        )
        module.eval()
        try:
            return {"vqa": evaluate.evaluate(data.sets, answerer, self._world, folder, recipe.data, interruptions)}
        finally:
            module.train()
            if is_replica:
                module.to("cpu")

    def _whole(self, weights: dict[str, Tensor]) -> VisionLanguageStudent:
        """Student and decoder with whole weights: the engine's own, or the replica on the CPU."""
        if self._config.stage < 3:
            return self._module
        load_weights(self._replica, weights)
        return self._replica

    def write(self, weights: dict[str, Tensor], folder: Path) -> None:
        recipe, student = self._data.recipe, self._data.student
        trained = bool(recipe.active()) or self._tower_learns
        towers, loaded = None, False
        texts = [text for one in check.examples(self._data.train, _COMPARED) for text in (one.text, one.answer)]
        with self._in_float32(weights) as module:
            if student is not None:
                towers = clip.ClipModel(module.clip, student, preprocessing(student))
                loaded = weights_file(student.settings, download=False) is not None
            made = Bundle(module.decoder, towers, self._data.settings.max_length, data=recipe.data)
            made.save(folder / self._data.result, tower_inside=trained or not loaded, samples=texts)

    @contextlib.contextmanager
    def _in_float32(self, weights: dict[str, Tensor]) -> Iterator[VisionLanguageStudent]:
        """`_whole` with the optimizer's float32 weights in towers, projector and adapters, where the engine's module has them rounded to
        bf16; it gets its own back at the end of the block."""
        module = self._whole(weights)
        rounded = {name: parameter.data for name, parameter in module.named_parameters()}
        try:
            for name, parameter in module.named_parameters():
                if name in weights and (not name.startswith("decoder.language.") or "lora_" in name):
                    parameter.data = weights[name]
                elif hasattr(parameter, "in_float32"):  # a frozen logit scale
                    parameter.data = parameter.in_float32.reshape(parameter.shape)
            yield module
        finally:
            for name, parameter in module.named_parameters():
                parameter.data = rounded[name]


def _digest(weights: dict[str, Tensor]) -> str:
    """Of the trained weights: answers of others are not gone on with."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
