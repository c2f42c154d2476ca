"""Evaluations of a run: its student on image-text sets, its decoder on questions. During the run and at its end, on every rank."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megakd.evaluation.encoder import Encoder
from megakd.evaluation.sets import sets_of
from megakd.evaluation.suite import Suite
from megakd.export import clip_folder
from megakd.models.vlm.student import VisionLanguageStudent
from megakd.runtime.engine import Engine, load_weights
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller
from megakd.training.build import Learners, image_processor, prompt_encoder
from megakd.training.prepare import PreparedRun
from megakd.vqa import evaluate


class Evaluator:
    """Holds the plain replicas that evaluation works on, made before the engine takes the student in parts.

    A ZeRO-3 module has its weights only inside the engine's forward, so a replica of it waits on the CPU and is on the device only while it
    answers; below stage 3 the decoder answers where it is, without a copy of its weights, which may be a large language model's.
    """

    def __init__(self, plan: PreparedRun, world: World, learners: Learners, interruptions: StopPoller) -> None:
        """Before the engine is made of `learners.module`."""
        self._interruptions = interruptions
        self._plan, self._world, self._learners, self._student = plan, world, learners, learners.student
        self._clip = copy.deepcopy(self._student.clip) if plan.sets and self._student is not None else None
        if self._clip is not None and hasattr(self._clip, "set_grad_checkpointing"):
            self._clip.set_grad_checkpointing(False)  # type: ignore[operator]
        self._has_questions = bool(plan.questions and plan.questions.sets)
        self._replica = copy.deepcopy(learners.module) if plan.questions is not None and plan.config.stage == 3 else None

    def __bool__(self) -> bool:
        return self._clip is not None or self._has_questions

    def results(self, engine: Engine, step: int, folder: Path) -> dict[str, Any]:
        """What `evaluation.json` holds, the same on every rank. Answers are written to `folder`. A collective.

        Raises Interrupted, on every rank, when a signal comes to one; answers given before it are kept.
        """
        weights = engine.export(moments=False, everywhere=True).weights
        results: dict[str, Any] = {"step": step, "sets": sets_of(self._plan.request.recipe)}
        if self._clip is not None:
            results |= self._image_text(weights)
        if self._has_questions:
            identity = {"step": step, "weights": _digest(weights)}
            results["vqa"] = self._questions(engine, weights, identity, folder)
        return results

    def answering(self, engine: Engine, weights: dict[str, Tensor]) -> VisionLanguageStudent:
        """Student and decoder with whole weights: the engine's own, or a replica on the CPU. weights: what the engine exported."""
        module = engine.module
        if self._replica is not None:
            module = self._replica
            load_weights(module, weights)
        assert isinstance(module, VisionLanguageStudent)
        return module

    @contextlib.contextmanager
    def learned(self, engine: Engine, weights: dict[str, Tensor]) -> Iterator[VisionLanguageStudent]:
        """`answering` with the optimizer's float32 weights in towers, projector and adapters, where the engine's module has them rounded to
        bf16; it gets its own back at the end of the block."""
        module = self.answering(engine, weights)
        rounded = {name: parameter.data for name, parameter in module.named_parameters()}
        try:
            yield self._in_float32(module, weights)
        finally:
            for name, parameter in module.named_parameters():
                parameter.data = rounded[name]

    def _in_float32(self, module: VisionLanguageStudent, weights: dict[str, Tensor]) -> VisionLanguageStudent:
        for name, parameter in module.named_parameters():
            if name in weights and (not name.startswith("decoder.language.") or "lora_" in name):
                parameter.data = weights[name]
            elif hasattr(parameter, "in_float32"):  # a frozen logit scale
                parameter.data = parameter.in_float32.reshape(parameter.shape)
        return module

    def _questions(self, engine: Engine, weights: dict[str, Tensor], identity: dict[str, Any], folder: Path) -> dict[str, Any]:
        module = self.answering(engine, weights)
        plan, recipe, student = self._plan, self._plan.request.recipe, self._learners.student
        assert plan.questions is not None
        dtype = torch.float32 if self._replica is not None else engine.dtype  # of the towers: a replica has them in float32
        if self._replica is not None:
            module.to(self._world.device)
        answerer = evaluate.Answerer(
            module.decoder,
            None if student is None else module.look,
            prompt_encoder(plan, module),
            image_processor(plan, student),
            self._world.device,
            dtype,
            recipe.evaluation.vqa_batch,
            recipe.evaluation.answer_tokens,
            identity,
        )
        module.eval()
        try:
            return evaluate.evaluate(plan.questions.sets, answerer, self._world, folder, recipe.data, self._interruptions)
        finally:
            module.train()
            if self._replica is not None:
                module.to("cpu")

    def _image_text(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        assert self._clip is not None
        assert self._student is not None
        recipe, device = self._plan.request.recipe, self._world.device
        clip_folder.load_clip(self._clip, weights)
        clip = self._clip.to(device).eval()
        description = self._student.description
        encoder = Encoder(clip, self._student.preprocess, description.tokenize, device, recipe.evaluation.batch)
        results = Suite(self._plan.sets, encoder, self._world, recipe.data.workers, self._interruptions).run()
        self._clip.to("cpu")
        return results


def _digest(weights: dict[str, Tensor]) -> str:
    """Of the trained weights: answers of others are not gone on with."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
