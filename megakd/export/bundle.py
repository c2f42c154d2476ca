"""A trained decoder as one folder that loads whole or refuses: projector, adapter, vision tower, tokenizer, and the prompt's words.

    bundle.json             format, versions, decoder settings, references, and every file's size and SHA-256
    projector.safetensors   absent for a decoder without a vision tower
    adapter/                peft's own format, where there are adapters
    language/               a transformers folder, where the language model is not known by reference: trained, or made by the recipe
    tower/                  open_clip's `local-dir:` form, where the vision tower is not known by reference
    tokenizer/              a transformers folder

A language model or tower that the run did not change is known by reference, see `references`; another one is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from megakd.data.bad_samples import BadSample
from megakd.data.image_fit import fitted_pixels
from megakd.data.transforms import as_rgb, normalise
from megakd.export import clip_folder
from megakd.export import manifest as manifests
from megakd.export.manifest import ADAPTER, LANGUAGE, PROJECTOR, TOKENIZER, TOWER
from megakd.export.references import language_reference, referenced_language, resolve_tower, tower_reference, validated
from megakd.models import clip
from megakd.models.casts import pixel_dtype
from megakd.models.clip import ClipModel
from megakd.models.patches import evaluating, image_size, patch_tokens
from megakd.models.vlm import decoder_tokenizer, lora
from megakd.models.vlm.decoder import DecoderModel, DecoderSpec, build, resolve
from megakd.recipe import Data, Decoder
from megakd.runtime import precision
from megakd.runtime.files import json_sha256
from megakd.runtime.precision import Precision
from megakd.version import __version__
from megakd.vqa.prompts import RULES, PromptEncoder, Stacked, stack

# Legend: B questions, V patches of the tower, C its width.

# Asked of a bundle that was just written, besides texts of its run: short, so that they fit any length.
_QUESTIONS = ("what colour is it?", "is there a red circle?", "how many?")
_ANSWER_TOKENS = 5


@dataclass(frozen=True)
class BundleSpec:
    """A bundle without its weights, which are on this machine and those that it was written with. tower: None where it reads none.

    max_length, rules, data: as `Bundle` has them. sha256: of the manifest, and so of every file and reference.
    """

    folder: Path
    decoder: DecoderSpec
    tower: clip.ModelSpec | None
    max_length: int
    rules: int
    data: Data
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """A decoder with the vision tower it reads, None where it reads none. max_length: tokens of a conversation (answers.max_length).

    rules: how its prompts become ids, see `prompts.RULES`. data: how images became RGB in training, and do for answers.
    """

    decoder: DecoderModel
    towers: ClipModel | None
    max_length: int
    rules: int = RULES
    data: Data = field(default_factory=Data)

    @cached_property
    def prompts(self) -> PromptEncoder:
        return PromptEncoder(self.decoder.tokenizer, self.decoder.settings, self.decoder.image_tokens, self.max_length, self.rules)

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    def save(self, folder: Path, *, tower_inside: bool, language_inside: bool = False, samples: Sequence[str] = ()) -> None:
        """Write the bundle, of a model that ZeRO-3 does not partition; then read it back once and compare.

        tower_inside: False for a tower that was loaded and not trained, which is then known by reference. language_inside: the language
        model comes in even if it was only loaded; one that the run has made or trained always does.
        samples: texts of the run's own that tokenizers are compared on. Raises ValueError when `folder` holds something else, when there
        is no file that a reference could name, and when another decoder is read back than was written; an earlier bundle is kept then.
        """
        texts = (*decoder_tokenizer.SAMPLES, *_QUESTIONS, *samples)
        manifests.write(
            folder,
            lambda partial: self._fill(partial, tower_inside, language_inside),
            lambda partial: self._check_written(partial, folder, texts),
        )

    def _fill(self, partial: Path, tower_inside: bool, language_inside: bool) -> dict[str, Any]:
        decoder, settings, towers = self.decoder, self.decoder.settings, self.towers
        language_inside |= settings.model is None or settings.adapt == "full"
        if decoder.projector is not None:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in decoder.projector.state_dict().items()}, partial / PROJECTOR
            )
        if decoder.adapted:
            decoder.language.save_pretrained(partial / ADAPTER, save_embedding_layers=False)
        if language_inside:
            decoder.write_language(partial / LANGUAGE)
        decoder_tokenizer.write(decoder.tokenizer, partial / TOKENIZER)
        tower: dict[str, Any] | None = None
        if towers is not None and tower_inside:
            weights = {f"clip.{name}": value.detach().cpu().contiguous() for name, value in towers.clip.state_dict().items()}
            clip_folder.write_model(partial / TOWER, weights, towers)
            tower = {"inside": True}
        elif towers is not None:
            tower = {"inside": False, **tower_reference(towers.description)}
        return {
            "versions": {"megakd": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
            "decoder": settings.model_dump(mode="json"),
            "max_length": self.max_length,
            "prompt": self.rules,
            **({"images": seen} if (seen := self.data.as_seen()) else {}),
            "language": None if language_inside else language_reference(settings.model or ""),
            "tower": tower,
        }

    def _check_written(self, partial: Path, folder: Path, texts: Sequence[str]) -> None:
        """Load what was written and compare tokenizer, weights, and answers to questions with and without an image."""
        quantised = self.decoder.settings.quantise != "none"  # bitsandbytes' layers differ from device to device
        device = self.device if quantised else torch.device("cpu")
        read = Bundle.load(partial, device, self.decoder.plain.get_input_embeddings().weight.dtype)
        differences = decoder_tokenizer.differences(self.decoder.tokenizer, read.decoder.tokenizer, texts) + _other_weights(self, read)
        if not differences and self.device.type == "cpu":  # where sums have one order
            differences = self._other_answers(read)
        if differences:
            raise ValueError(
                f"{folder}: the bundle that was written is read back as another decoder ({differences[0]}), and was removed; the "
                f"checkpoints are untouched, from which the same command writes it once decoder.model and decoder.tokenizer fit each other"
            )

    def _other_answers(self, read: Bundle) -> list[str]:
        """Differences of logits and answers between this bundle and the one that was read back, for the questions that fit."""
        picture = Image.linear_gradient("L").convert("RGB")
        questions = [text for text in _QUESTIONS if self._fits(text)]
        if not questions:
            return []
        images = [picture if number % 2 == 0 else None for number in range(len(questions))]
        # Both decoders get the same tower's output: in training its weights may be bf16, which `_other_weights` allows for.
        batch, visual_BVC = self._batch(images, questions, short=False), read.look(images)
        if self.decoder.settings.quantise == "none":  # bitsandbytes repacks other weights at their first forward
            logits = [_logits(bundle.decoder, visual_BVC, batch) for bundle in (self, read)]
            if not bool(((logits[0] - logits[1]).abs() <= 1e-3 * logits[0].std() + 1e-6).all()):
                return ["its logits differ"]
        answers = [bundle.decoder.generate(visual_BVC, *batch[:3], _ANSWER_TOKENS) for bundle in (self, read)]
        return [] if answers[0] == answers[1] else [f"it answered {answers[0]}, then {answers[1]}"]

    def _fits(self, text: str) -> bool:
        positions = self.decoder.description.positions
        try:
            length = len(self.prompts.prompt(text, False, image=self.towers is not None).ids)
        except BadSample:
            return False
        return positions is None or length + _ANSWER_TOKENS <= positions

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype = torch.float32, *, quantise: str | None = None) -> Bundle:
        """The bundle with all its weights on `device`, ready to answer. dtype: of the language model. quantise: other than it was trained.

        Raises ValueError naming the file or the key: no bundle, a file missing or changed, a reference that leads nowhere or to another
        model.
        """
        return cls.build(resolve_bundle(folder, quantise=quantise), device, dtype)

    @classmethod
    def build(cls, spec: BundleSpec, device: torch.device, dtype: torch.dtype, towers: Precision = "fp32") -> Bundle:
        """As `load`, of a bundle that was resolved. towers: the type of the vision tower, see `clip.build`."""
        folder, tower = spec.folder, None
        if spec.tower is not None:
            tower = clip.build(spec.tower, device, towers)
            tower.clip.eval().requires_grad_(False)
        decoder = build(spec.decoder, None if tower is None else tower.clip.visual, device, dtype)  # type: ignore[arg-type]
        if decoder.adapted:
            lora.load_adapter(decoder.language, folder / ADAPTER)
        load_projector(folder, decoder, str(folder))
        return cls(decoder.eval(), tower, spec.max_length, spec.rules, spec.data)

    def answer(
        self, images: Sequence[Image.Image | None], prompts: Sequence[str], max_new_tokens: int = 10, *, short: bool = False
    ) -> list[str]:
        """One greedy answer for each question. images: None, or an image of any size, fitted as in training (`image_fit`).

        short: the recipe's `decoder.instruction` follows each question, as in training on sets with short answers. A decoder without a
        vision tower is asked without the images. Raises ValueError for a question that does not fit `max_length`, naming it.
        """
        if not prompts:
            return []
        batch = self._batch(images, prompts, short=short)
        answers = self.decoder.generate(self.look(images), *batch[:3], max_new_tokens)
        return [str(self.decoder.tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]

    def _batch(self, images: Sequence[Image.Image | None], questions: Sequence[str], *, short: bool) -> Stacked:
        """The prompts as a batch that is padded on the left, on the decoder's device."""
        encoded = []
        for number, (image, text) in enumerate(zip(images, questions, strict=True)):
            try:
                encoded.append(self.prompts.prompt(text, short, image is not None and self.towers is not None))
            except BadSample as bad:
                raise ValueError(f"question {number}, {text[:80]!r}: {bad}") from bad
        return Stacked(*(tensor.to(self.device) for tensor in stack(encoded, self.prompts.padding, left=True)))

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image | None]) -> Tensor | None:
        """(B, V, C), the patch tokens of each image; of a blank one where there is none. None without a vision tower."""
        if self.towers is None:
            return None
        visual: Any = self.towers.clip.visual
        blank = torch.zeros(3, *image_size(visual), dtype=torch.uint8)
        rows = [blank if image is None else torch.from_numpy(self.pixels(image).copy()) for image in images]
        return self.see(normalise(torch.stack(rows).to(self.device), self.towers.preprocess, pixel_dtype(visual)))

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """(3, H, W) uint8 of an image, as the tower is shown it."""
        assert self.towers is not None, "a decoder with a vision tower"
        return fitted_pixels(as_rgb(image, self.data), self.towers.preprocess, self.decoder.settings.image_fit)

    @torch.no_grad()
    def see(self, pixels: Tensor) -> Tensor:
        """(B, V, C), the patch tokens of normalised pixels (B, 3, H, W) of the tower's size and type, on its device."""
        assert self.towers is not None, "a decoder with a vision tower"
        visual: Any = self.towers.clip.visual
        with evaluating(visual):
            return patch_tokens(visual, pixels, self.decoder.settings.layer)


def resolve_bundle(folder: Path, *, quantise: str | None = None) -> BundleSpec:
    """Everything of the bundle in `folder` but its weights, of which every byte is compared with what was written.

    quantise: how its language model is to be held, other than it was trained. Raises ValueError as `Bundle.load` does.
    """
    manifest = manifests.read(folder)
    changed: dict[str, Any] = {"tokenizer": str(folder / TOKENIZER), "start": None, "recipe": None}
    if manifest["language"] is None:
        changed |= {"model": str(folder / LANGUAGE), "architecture": None}
    else:
        changed |= {"model": referenced_language(folder, manifest["language"])}
    if quantise is not None:
        changed["quantise"] = quantise
        if quantise != "none" and manifest["decoder"].get("adapt") == "full":  # its weights are all written, and frozen from here on
            changed["adapt"] = "none"
    settings = validated(Decoder, {**manifest["decoder"], **changed}, folder, "decoder")
    tower = None if manifest["tower"] is None else resolve_tower(folder, manifest["tower"])
    data = validated(Data, manifest.get("images", {}), folder, "images")
    return BundleSpec(folder, resolve(settings), tower, manifest["max_length"], manifest["prompt"], data, json_sha256(manifest))


def load_bundle(folder: str | Path, device: torch.device | str | None = None) -> Bundle:
    """The decoder that a run on questions has left in RUN/bundle, with its vision tower and tokenizer, ready to answer.

    device: default a GPU where there is one; the language model is in bf16 on a GPU and in float32 on a CPU. `Bundle.answer` takes n
    images of any size (None for a question about no image) and n questions, and gives n greedy answers.

    Raises ValueError naming the file or the key: no bundle, a file missing or changed, a reference that leads nowhere or to another model.

    >>> bundle = megakd.load_bundle("runs/vqa/bundle")
    >>> answers = bundle.answer([Image.new("RGB", (64, 48), "red")], ["what colour is it?"], max_new_tokens=4)
    >>> len(answers)
    1
    """
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    return Bundle.load(Path(folder), where, precision.dtype(precision.of(where)))


def merge(folder: Path, out: Path) -> None:
    """Write to `out` the bundle in `folder` without references and without an adapter: it is added to the language model's weights.

    `out/language` is a plain transformers folder, in the base's own precision; the sum is taken in float32, also for a quantised base.
    Raises ValueError as `Bundle.load` does, and when `out` is `folder` itself or holds something else.
    """
    if out.resolve() == folder.resolve():
        raise ValueError(f"{out}: is the bundle that is merged; choose another folder")
    bundle = Bundle.load(folder, torch.device("cpu"), quantise="none")
    adapted = bundle.decoder
    language = adapted.language.merge_and_unload() if adapted.adapted else adapted.language
    dtype = adapted.description.config.get_text_config().dtype or torch.float32
    for weight in language.parameters():  # buffers keep theirs: rotary tables are float32 in a bf16 model too
        weight.data = weight.data.to(dtype)
    settings = adapted.settings.model_copy(update={"adapt": "none"})
    plain = DecoderModel(dataclasses.replace(adapted.description, settings=settings), adapted.projector, language)
    dataclasses.replace(bundle, decoder=plain).save(out, tower_inside=True, language_inside=True)


@torch.no_grad()
def _logits(decoder: DecoderModel, visual_BVC: Tensor | None, batch: Stacked) -> Tensor:
    """Float32 logits of the prompts, as generation begins with them."""
    with evaluating(decoder):
        embeddings = decoder.embed(visual_BVC, batch.ids_BL, batch.image_mask_BL)
        logits: Tensor = decoder.language(inputs_embeds=embeddings, attention_mask=batch.attend_BL.long(), use_cache=False).logits
    return logits.float()


def _other_weights(written: Bundle, read: Bundle) -> list[str]:
    """A weight that differs in a bit of the type that it was trained in, if any; of a quantised language model only the adapters."""
    pairs: list[tuple[Any, Any]] = [(written.decoder, read.decoder)]
    if written.towers is not None and read.towers is not None:
        pairs.append((written.towers.clip.visual, read.towers.clip.visual))
    for one, another in pairs:
        own, other = one.state_dict(), another.state_dict()
        if own.keys() != other.keys():
            return [f"it has no {min(own.keys() ^ other.keys())}"]
        for name, value in own.items():
            if written.decoder.settings.quantise != "none" and name.startswith("language.") and "lora_" not in name:
                continue
            if value.is_floating_point() and not torch.equal(value, other[name].to(value)):
                return [f"{name} differs"]
    return []


def load_projector(folder: Path, decoder: DecoderModel, key: str) -> None:
    """Put the projector of the bundle in `folder` into `decoder`, where it has one. Raises ValueError, with `key`, for another shape."""
    if decoder.projector is None:
        return
    stored, own = lora.finite_weights(folder / PROJECTOR), decoder.projector.state_dict()
    for name in sorted(stored.keys() | own.keys()):
        shapes = [tuple(weights[name].shape) if name in weights else None for weights in (stored, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{key}: its projector's {name} is {shapes[0]}, this tower and language model need {shapes[1]}: take the vision tower and "
                f"decoder that the bundle was trained with"
            )
    decoder.projector.load_state_dict(stored)
