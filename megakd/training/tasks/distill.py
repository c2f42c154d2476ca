"""Learning from image-text pairs by the recipe's objectives, with its teachers or without one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from open_clip.transform import PreprocessCfg
from torch import Tensor

from megakd.data import mixture
from megakd.data.caption_survey import captions_told
from megakd.data.mixture import AnyOrder, MixtureOrder
from megakd.data.pairs import Batch, TrainBatches, TrainingPairs, train_batches
from megakd.data.reinforced.pairs import ReinforcedPairs
from megakd.data.reinforced.shards import ReinforcedShards
from megakd.data.shards import ShardSet
from megakd.data.store.reader import Store
from megakd.data.transforms import TowerView, normalise
from megakd.evaluation.diagnostics.compare import Shown, compare
from megakd.evaluation.encoder import Encoder
from megakd.evaluation.suite import Sets, Suite, open_sets
from megakd.export import clip_folder
from megakd.models import clip
from megakd.models.embeddings import Embeddings
from megakd.models.fingerprint import computation, preprocessing
from megakd.models.heads import ModelShape, ObjectiveHead
from megakd.models.image_only import no_words
from megakd.models.student import Student, embeddings
from megakd.objectives.answers import DIVERGENCE
from megakd.objectives.set import ObjectiveSet
from megakd.recipe import Recipe
from megakd.recipe.parts import IMAGE, TEXT
from megakd.recipe.section import MATCHED
from megakd.runtime import collectives, precision, watchdog
from megakd.runtime.checkpoint import Progress
from megakd.runtime.ds_config import DsConfig
from megakd.runtime.gathered import Gathered
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller
from megakd.runtime.run_folder import MODEL, RunLog
from megakd.teachers import build
from megakd.teachers.base import LiveTeacher, Teacher, padded, settings_of
from megakd.teachers.cached import StoredTeacher, TextStoredTeacher
from megakd.training.tasks.base import RowLoss, StepPart, Task, loading

AnyTeacher = Teacher | StoredTeacher | TextStoredTeacher


@dataclass(frozen=True)
class PairData:
    """Image-text pairs in their order, the models' configurations, and the sets that the student's towers are scored on.

    shapes: of the student and of each teacher. heads: what the objectives train beside the towers, in words. texts: whether an objective
    reads the student's. captions: whether a teacher or an objective reads them. of_captions, of_sets: what is to be known of a choice
    of captions and of the sets, in words.
    """

    recipe: Recipe
    student: clip.ModelSpec
    objectives: ObjectiveSet
    shards: ShardSet
    order: AnyOrder
    teachers: dict[str, clip.ModelSpec]
    shapes: list[ModelShape]
    heads: str
    texts: bool
    captions: bool
    of_captions: list[str]
    store: Store | ReinforcedShards | None
    sets: Sets
    of_sets: list[str]

    result = MODEL

    @property
    def key(self) -> str:
        return self.recipe.data.train_in_words

    def signature(self, *, of_names: bool = False) -> int:
        return self.shards.signature_of_names if of_names else self.shards.signature_of_order

    def describe(self) -> list[str]:
        teacher = ", ".join(map(_called, self.teachers.values())) or "none"
        objectives = ", ".join(f"{weight:g} {name}" for name, weight in self.objectives.weights.items())
        if blind := [role for role, model in self.teachers.items() if not model.has_text]:
            teacher += f"; {', '.join(blind)}: images alone, without a part in {', '.join(self.objectives.of_texts) or 'texts'}"
        heads = [f"heads: {self.heads}"] if self.heads else []
        first = f"data: {len(self.shards)} pairs; teacher: {teacher}; objectives: {objectives}"
        return [first, *self._of_sources(), *heads, *self.of_captions, *self._of_texts(), *self._of_teachers(), *self.of_sets]

    def _of_sources(self) -> list[str]:
        """Of a mixture, the share and the epochs of each source."""
        return mixture.outline(self.order, "data.train", "pairs", self.recipe.optim.steps)

    def _of_texts(self) -> list[str]:
        """Whose texts are cut; whether captions are left unread, and the student's text tower without a gradient."""
        lines = clip.of_padding({"student": self.student, **self.teachers}) if self.captions else []
        if self.texts:
            return lines
        unread = "" if self.captions else " and captions are not read"
        frozen = self.recipe.student is not None and TEXT in self.recipe.student.freeze
        still = "its text tower is frozen" if frozen else "nothing but weight decay moves its text tower"
        return [*lines, f"no objective reads the student's texts: {still}{unread}"]

    def outline_heads(self) -> dict[str, ObjectiveHead]:
        """What the objectives train beside the towers, by name; its weights are drawn where torch makes new tensors."""
        student, *teachers = self.shapes
        return self.objectives.heads(student, teachers)

    def views(self, preprocess: Mapping[str, PreprocessCfg], models: Mapping[str, clip.ModelSpec]) -> dict[str, TowerView]:
        """What the loader makes of a sample for each model."""
        return {role: TowerView(preprocess[role], padded(model) if self.captions else no_words) for role, model in models.items()}

    def _of_teachers(self) -> list[str]:
        """Which teachers are left out, what those count for that are not, how transformers' give embeddings, and scales not their own."""
        weights = dict(zip(self.recipe.weighted_teachers(), self.recipe.teacher_weights(0), strict=True))
        left_out = [role for role in self.recipe.teachers() if role not in weights]
        lines = [f"not loaded, as their weight is 0: {', '.join(left_out)}"] if left_out and self.teachers else []
        if self.teachers and not self.recipe.weighs_teachers_alike():
            shares = ", ".join(f"{role} {weight / sum(weights.values()):.3g}" for role, weight in weights.items())
            lines.append(f"shares of the teachers in each loss of the first step: {shares}")
        for role in self.teachers:
            settings = self.recipe.teachers()[role]
            reference = "of the student's" if settings.entropy is None else f"of {settings.entropy:g} nats"
            if pooled := self.teachers[role].config["vision_cfg"].get("pooled"):
                lines.append(f"{role}: the embedding of an image is the {pooled}")
            if settings.scale is not None:
                how = (
                    f"where its rows have the entropy {reference}"
                    if settings.scale == MATCHED
                    else f"{settings.scale:g} in place of its own"
                )
                lines.append(f"logit scale of {role}: {how}")
        return lines

    @property
    def pairs(self) -> Callable[..., TrainingPairs] | None:
        """As `train_batches` takes it: where the shards hold embeddings themselves."""
        return functools.partial(ReinforcedPairs, reinforced=self.store) if isinstance(self.store, ReinforcedShards) else None

    def _of_views(self) -> str:
        replays = isinstance(self.store, ReinforcedShards) and self.store.replays
        recorded = "as the shards have it, on images as stored (as data.orientation = 'ignore' and data.transparency = 'drop')"
        made = "".join(f"; {key} {value}" for key, value in self.recipe.data.as_trained().items())
        return f"augmentation: {recorded if replays else f'{self.recipe.views}{made}'}"

    def preview(self, world: World) -> list[str]:
        built = {role: clip.on_meta(description) for role, description in {"student": self.student, **self.teachers}.items()}
        views = self.views({role: model.preprocess for role, model in built.items()}, {"student": self.student, **self.teachers})
        shards, order, of = self.shards, self.order, self.recipe.views
        with train_batches(
            shards,
            order,
            of,
            views,
            captions=self.captions,
            pairs=self.pairs,
            rank=world.rank,
            world=world.size,
            start_position=0,
            workers=0,
            pin_memory=False,
        ) as batches:
            batch = next(batches)
        first = f"first batch of this rank: {len(batch)} pairs, bad: {batch.bad.by_reason() or 'none'}"
        parts = [f"data: {len(shards)} samples in {len(shards.names)} shards; {first}", *self._of_sources(), self._of_views()]
        parts += [*self.of_captions, *self._of_texts(), *self._of_teachers(), *self.of_sets]
        if self.store is not None:
            parts.append(self.store.outline())
        elif "teacher" in self.teachers and (layout := build.patch_store(self.recipe, self.teachers["teacher"], len(shards))) is not None:
            parts.append(f"a store of the teacher by `megakd embed`, for each of its --views: {layout}")
        return parts + [_shapes(role, model, batch.pixels[role][:2], batch.tokens[role][:2]) for role, model in built.items()]

    def start(self, config: DsConfig, world: World, log: RunLog) -> Distill:
        recipe, piece = self.recipe, config.micro_batch
        if recipe.teachers() and not self.teachers:
            log.say("the teacher is not loaded: no objective with a positive weight uses it")
        if self.store is not None:
            log.say(self.store.outline())
        teachers: dict[str, AnyTeacher] = {}
        how: Any = {"piece": piece, "say": log.say, "reads": self.objectives.teacher_blocks}
        for role, description in self.teachers.items():
            watchdog.beat(f"loading {role}")
            if self.store is None:
                teachers[role] = build.live_teacher(recipe, description, world, self.shards, **how)
            else:
                teachers[role] = build.stored_teacher(self.store, recipe, description, self.shards, world, **how)
        shown: dict[str, Shown] = {}
        student: Any = clip.on_meta(self.student).clip
        for role, teacher in teachers.items() if self.sets.diagnostics else ():
            if isinstance(teacher, StoredTeacher):
                log.say(f"evaluation.diagnostics: {role} is loaded beside its store, which has no embeddings of these sets")
                teacher = teacher.live()
            assert isinstance(teacher, LiveTeacher | TextStoredTeacher)
            shown[role] = Shown.beside(student.visual, self.teachers[role], teacher, piece, log.say)
        return Distill(self, teachers, shown, config, world)


def prepare(recipe: Recipe, world: World, student: clip.ModelSpec, *, to_come: bool) -> PairData:
    """to_come: another recipe is about to train the teacher.

    Raises ValueError, on every rank, for objectives, models, shards, a store or sets that do not fit each other or this machine.
    """
    objectives = ObjectiveSet(recipe, world.device, dist.group.WORLD if world.size > 1 else None)
    use_teacher = objectives.needs_teacher and not to_come
    teachers = {role: clip.resolve(settings, role) for role, settings in recipe.weighted_teachers().items() if use_teacher}
    if recipe.evaluation.diagnostics and not objectives.needs_teacher:
        missing = "no objective with a weight uses it, so it is not loaded" if recipe.teacher else "there is none"
        raise ValueError(
            f"evaluation.diagnostics.{next(iter(recipe.evaluation.diagnostics))}: compares the student with its [teacher], and {missing}: "
            "take it out; after the run `megakd diagnose RUN --teacher MODEL` compares it with any"
        )
    for model in (student, *teachers.values()):
        if model.has_text:
            objectives.check_bias(model.role, model.has_bias)
    for description in teachers.values():
        computation(description, world.device)  # a product of int8 that this machine lacks
    own, *others = shapes = objectives.shapes(student, list(teachers.values()))
    heads = objectives.outline(own, others)
    if recipe.export.heads and teachers and not heads:
        raise ValueError(f"export.heads = true: none of objectives.{', objectives.'.join(objectives.weights)} has a head; take it out")
    texts = to_come or objectives.reads_texts(others)
    captions = to_come or objectives.reads_captions(others)
    if not texts and recipe.student is not None and IMAGE in recipe.student.freeze:
        named = ", ".join(objectives.weights)
        raise ValueError(f"student.freeze holds image, and objectives.{{{named}}} read no text of the student's: it would not learn at all")
    further = build.members_beside(recipe)
    shards = ShardSet.open(recipe.data, world.rank, world.size, lambda: collectives.barrier(world), captions=captions, further=further)
    of_captions = captions_told(shards, world, read=captions)
    order = mixture.order_of_pairs(len(shards), shards.sources, recipe.optim.batch, recipe.seed, recipe.data.block, recipe.data.window)
    store = build.open_stores(recipe, teachers, shards, world)
    collectives.by_main(lambda: clip_folder.rehearse(student), world)
    sets = open_sets(recipe, world)
    of_sets = sets.check_tower(clip.on_meta(student).clip) if sets.at_end else []
    return PairData(recipe, student, objectives, shards, order, teachers, shapes, heads, texts, captions, of_captions, store, sets, of_sets)


class Distill(Task):
    """The pairs of a run. teachers: by role, live or from their store; shown: those that diagnostics compare the student with."""

    adds_up = False
    items = "samples"

    def __init__(
        self, data: PairData, teachers: Mapping[str, AnyTeacher], shown: Mapping[str, Shown], config: DsConfig, world: World
    ) -> None:
        self.weights, self.backends = data.objectives.weights, data.objectives.backends
        self.mixture, self.of_rows = (data.order, data.objectives.of_pairs) if isinstance(data.order, MixtureOrder) else (None, ())
        self.logged, self.in_a_step = ("scale", *data.objectives.logged), data.recipe.optim.batch
        several = data.shards.captions.sources if data.captions and len(data.shards.captions.sources) > 1 else ()
        self._drawn_from = (*(f"captions.{one.name}" for one in several), *(["captions.lacking"] if several else []))
        self._drawn: dict[str, Tensor] = {}
        self.logged = (*self.logged, *self._drawn_from)
        self._data, self._teachers, self._shown, self._config, self._world = data, teachers, shown, config, world
        live = {role: data.teachers[role] for role, teacher in teachers.items() if not isinstance(teacher, StoredTeacher)}
        self._seen_by = {"student": data.student, **live}  # models that are shown the pairs themselves
        self._preprocess = {role: preprocessing(model) for role, model in self._seen_by.items()}
        self.roles = tuple(teachers)
        self.in_step = frozenset(role for role in teachers if build.communicates(settings_of(data.teachers[role]), world))

    def extend(self, module: Student, device: torch.device) -> Student:
        heads = self._data.outline_heads()
        module.heads.update(heads)  # type: ignore[attr-defined]
        self._taught = [name for name, head in heads.items() if head.teacher_width]
        self._heads = {name: head.summary for name, head in heads.items()}
        self.logged = (*self.logged, *(f"{name}.scale" for name, head in heads.items() if head.has_scale))
        self._towers = module.clip
        return module

    def keep_replica(self) -> None:
        if self._data.sets:
            self._replica = copy.deepcopy(self._towers)
            if hasattr(self._replica, "set_grad_checkpointing"):
                self._replica.set_grad_checkpointing(False)  # type: ignore[operator]

    def open(self, progress: Progress) -> TrainBatches:
        data, recipe = self._data, self._data.recipe
        towers = data.views(self._preprocess, self._seen_by)
        replay = all(settings.store_of == "all" for settings in recipe.teachers().values())
        position = loading(recipe, self._world, progress.position)
        shards, order, of = data.shards, data.order, recipe.views
        store = data.store if isinstance(data.store, Store) else None
        return train_batches(shards, order, of, towers, store=store, replay=replay, captions=data.captions, pairs=data.pairs, **position)

    def part(self, batch: Batch, taught: Mapping[str, Embeddings], step: int) -> StepPart:
        if batch.drawn is not None:
            source, lacking = batch.drawn
            counts = torch.cat([torch.bincount(source, minlength=len(self._drawn_from) - 1), lacking.sum()[None]])
            shares = (counts / len(source)).to(self._world.device, non_blocking=True)
            self._drawn = dict(zip(self._drawn_from, shares, strict=True))
        teachers = [taught[role] for role in self.roles]
        whole = self._view(batch, "student", precision.dtype(self._config.precision))
        views = [tensor.tensor_split(self._config.micro_batches) for tensor in whole]
        inputs: list[dict[str, Any]] = [{"pixels": pixels, "tokens": tokens} for pixels, tokens in zip(*views, strict=True)]
        if self._taught:
            by_head, rows = self._data.objectives.by_head(teachers), [len(one["pixels"]) for one in inputs]
            of = {name: by_head[name][1] for name in self._taught}
            parts = {name: zip(one.image.split(rows), one.text.split(rows), strict=True) for name, one in of.items()}
            for given in inputs:
                given["taught"] = {name: next(pairs) for name, pairs in parts.items()}

        def by_pair(outputs: list[dict[str, Tensor]]) -> dict[str, RowLoss]:
            (whole,) = outputs  # losses over pairs do not add up
            found = self._data.objectives.pairs(embeddings(whole), teachers, step)
            return {name: RowLoss(loss_B, torch.ones_like(loss_B)) for name, loss_B in found.items()}

        return StepPart(inputs, lambda outputs: self._data.objectives.losses(embeddings(outputs), teachers, step), by_pair)

    def teach(self, batch: Batch, role: str, step: int) -> Embeddings:
        """The teacher's embeddings of the batch, a micro-batch in a forward."""
        teacher = self._teachers[role]
        if isinstance(teacher, StoredTeacher):
            assert batch.stored is not None, "the loader was given the store"
            assert batch.view is not None
            stored = batch.stored
            return teacher.recall(stored.image, stored.text, stored.known, batch.index, batch.view, stored.damaged, stored.patches)
        size, (pixels, tokens) = self._config.micro_batch, self._view(batch, role, teacher.dtype)
        blocks = self._data.objectives.teacher_blocks
        if isinstance(teacher, TextStoredTeacher):
            assert batch.stored is not None, "the loader was given the store"
            seen = [teacher.see(micro_batch, blocks) for micro_batch in pixels.split(size)]
            return teacher.join(seen, batch.stored.text, batch.stored.known, batch.index, batch.stored.damaged)
        return Embeddings.joined([teacher.embed(*part, blocks) for part in zip(pixels.split(size), tokens.split(size), strict=True)])

    def _view(self, batch: Batch, role: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return normalise(batch.pixels[role], self._preprocess[role], dtype), batch.tokens[role]

    def weights_at(self, step: int) -> dict[str, float]:
        return self._data.objectives.weights_at(step)

    def gathered(self) -> Gathered | None:
        found = [counts for teacher in self._teachers.values() if (counts := teacher.gathered()) is not None]
        return Gathered.of(found) if found else None

    def values(self) -> dict[str, Tensor]:
        return {**self._data.objectives.values(), **self._drawn}

    def state(self) -> dict[str, Tensor]:
        return self._data.objectives.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Without what `[answers]` has of its teacher."""
        self._data.objectives.restore({name: value for name, value in state.items() if not name.startswith(f"{DIVERGENCE}.")})

    def evaluate(self, weights: dict[str, Tensor], step: int, folder: Path, interruptions: StopPoller) -> dict[str, Any]:
        """The student's towers on the recipe's image-text sets, and beside its teachers'."""
        if not self._data.sets:
            return {}
        data, device = self._data, self._world.device
        clip_folder.load_clip(self._replica, weights)
        towers = self._replica.to(device).eval()
        encoder = Encoder(towers, self._preprocess["student"], data.student.tokenize, device, data.recipe.evaluation.batch)
        workers = data.recipe.data.workers
        results = Suite(data.sets, encoder, self._world, workers, interruptions).run(at_end=step == data.recipe.optim.steps)
        if data.sets.diagnostics:
            results["diagnostics"] = compare(data.sets.diagnostics, encoder, self._shown, self._world, workers, interruptions)
        self._replica.to("cpu")
        return results

    def write(self, weights: dict[str, Tensor], folder: Path) -> None:
        built = clip.ClipModel(self._towers, self._data.student, self._preprocess["student"])
        heads = self._heads_in_words() if self._data.recipe.export.heads else None
        clip_folder.write_model(folder / self._data.result, weights, built, heads)

    def _heads_in_words(self) -> dict[str, dict[str, Any]]:
        """What a reader of exported heads must know: for which objective and teacher each is, and its kind with the widths."""
        own, *_ = self._data.shapes
        by_head, known = self._data.objectives.by_head(list(self._data.teachers.values())), dict[str, dict[str, Any]]()
        for name, kind in self._heads.items():
            objective, teacher = by_head[name]
            settings = teacher.settings
            known[name] = {
                "objective": objective, "kind": kind, "student_width": own.width, "teacher_width": teacher.width,
                "teacher": teacher.role, "teacher_model": settings.model, "teacher_pretrained": settings.pretrained,
            }  # fmt: skip
        return known


def _called(description: clip.ModelSpec) -> str:
    """A teacher's name for people, and how it runs."""
    settings = settings_of(description)
    how = f"from {settings.store}" if settings.store else settings.mode
    return f"{settings.model or 'own architecture'} ({how})"


def _shapes(role: str, model: clip.ClipModel, pixels: Tensor, tokens: Tensor) -> str:
    calls = {"pixels": (pixels, model.clip.encode_image, torch.float32)}
    if model.description.has_text and tokens.shape[1]:
        calls["tokens"] = (tokens, model.clip.encode_text, tokens.dtype)
    with torch.no_grad():
        read = {kind: (given, call(given.to("meta", dtype))) for kind, (given, call, dtype) in calls.items()}  # type: ignore[operator]
    shapes = ", ".join(f"{kind} {tuple(given.shape[1:])} -> {tuple(embedded.shape[1:])}" for kind, (given, embedded) in read.items())
    return f"{role}: {clip.parameters_in(model.clip):,} parameters; {shapes}"
