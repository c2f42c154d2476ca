"""`--to llava`: a decoder's bundle as transformers' `LlavaForConditionalGeneration` with its processor, one folder without adapters.

The bundle's ids are [BOS] [P image tokens] prompt, and so are the processor's of "<image>" and the prompt's words. What transformers' class
has not is refused by name: patches that are averaged to fewer image tokens, towers without transformers' ViT, output layers with a bias.
Whether the rest is the same model is not derived but tried: ids, logits and greedy answers of the folder, as transformers loads it, are
compared with the bundle's.

Legend: B questions, L tokens of a prompt, P image tokens, H x W the tower's size, H the decoder's width.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from megakd.data.transforms import normalise
from megakd.export.bundle import Bundle, resolve_bundle
from megakd.export.llava_prompts import ANSWER_TOKENS, OTHERWISE, Trial, asked, processor_of, strategy, trial_of
from megakd.export.transformers_layers import NotMapped, Part
from megakd.export.transformers_towers import vision_part
from megakd.export.trial_inputs import pictures
from megakd.runtime.console import LongWork

CLOSE = 1e-4  # of logits in float32
_SAME_PIXELS = 1e-6
_STAGES = ("load", "answer", "write", "compare")


def write(source: Path, folder: Path) -> list[str]:
    """Write the bundle in `source` to an empty folder, load it with transformers and compare. Gives lines for people.

    Takes twice the memory of the model in float32. Raises ValueError for a part that transformers' class has not, and where the folder
    gives other ids, logits or answers than the bundle, with the first that differs.
    """
    spec = resolve_bundle(source)
    if spec.tower is None:
        raise ValueError(
            f"{source}: its decoder has no vision tower, and LLaVA has one: `megakd answer {source} --merge OUT` writes the language model "
            f"as a transformers folder, OUT/language"
        )
    if (kind := spec.decoder.settings.quantise) != "none":
        raise ValueError(
            f"{source}: its language model is quantised (decoder.quantise = {kind!r}), and a folder's weights are not: "
            f"`megakd answer {source} --merge OUT` writes it in full precision, then export OUT"
        )
    with LongWork("exporting", len(_STAGES), "stages (" + ", ".join(_STAGES) + ")", coarse=True) as work:
        bundle = Bundle.build(spec, torch.device("cpu"), torch.float32)
        assert bundle.towers is not None
        tower = _tower(source, bundle)
        work.advance()
        trial = trial_of(bundle)
        processor = processor_of(source, bundle, tower, trial)
        work.advance()
        model = _model(source, bundle, tower, processor)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        work.advance()
        lines = compare(folder, bundle, trial)
    return [
        f"LlavaForConditionalGeneration: {type(model.model.vision_tower).__name__}, {type(model.model.language_model).__name__}",
        *lines,
    ]


def use(folder: Path, name: str) -> str:
    """Python that asks a folder that was written here. The bundle's words for short answers are not in it: a question may end with them."""
    return f"""
from transformers import AutoProcessor, LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
question = {{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "what colour is it?"}}]}}
text = processor.apply_chat_template([question], add_generation_prompt=True)
inputs = processor(images=image, text=text, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
"""


def _tower(source: Path, bundle: Bundle) -> Part:
    """Raises ValueError for a tower, or image tokens, that transformers' class has not."""
    assert bundle.towers is not None
    projector = bundle.decoder.projector
    assert projector is not None
    count = projector.patches.count
    if projector.image_tokens != count:
        raise ValueError(
            f"{source}: its {count} patches are averaged to {projector.image_tokens} image tokens (decoder.image_tokens), and "
            f"{OTHERWISE}: train with decoder.image_tokens = 0, for every patch"
        )
    try:
        part = vision_part(bundle.towers.clip.visual)
    except NotMapped as error:
        raise ValueError(f"{source}: {error}; {OTHERWISE}") from error
    if count != (part.settings["image_size"] // part.settings["patch_size"]) ** 2:
        raise ValueError(f"{source}: {count} patches are read of its tower, and transformers' has another number; {OTHERWISE}")
    return part


def _model(source: Path, bundle: Bundle, tower: Part, processor: Any) -> Any:
    """The model with the bundle's weights, adapters added. Raises ValueError for a language model that transformers' class cannot hold."""
    decoder = bundle.decoder
    language = decoder.language.merge_and_unload() if decoder.adapted else decoder.language
    base, head, name = language.base_model, language.get_output_embeddings(), type(language).__name__
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"{source}: the output layer of {name} has a bias or is no matrix; {OTHERWISE}")
    text: Any = copy.deepcopy(language.config)
    with torch.device("meta"):
        made = type(AutoModel.from_config(text))
    if type(base) is not made or head.in_features != text.hidden_size or decoder.description.width != text.hidden_size:
        raise ValueError(
            f"{source}: {name} is {type(base).__name__} of width {decoder.description.width} and an output layer, where LLaVA would make "
            f"{made.__name__} of width {text.hidden_size}; {OTHERWISE}"
        )
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    state, tied = _language_state(language, image + 1)
    text.vocab_size, text.tie_word_embeddings = len(state["lm_head.weight"]), tied
    kind: Any = CLIPVisionConfig if tower.kind == "clip" else SiglipVisionConfig
    projected = {} if tower.head is None else {"projection_dim": len(tower.head)}
    config = LlavaConfig(
        vision_config=kind(**tower.settings, **projected),
        text_config=text,
        image_token_index=image,
        image_seq_length=decoder.image_tokens,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=strategy(tower),  # type: ignore[arg-type]
        vision_feature_layer=_layer(decoder.settings.layer, tower.settings["num_hidden_layers"]),
        tie_word_embeddings=tied,
    )
    projector: Any = decoder.projector
    state |= {f"model.vision_tower.{key}": value for key, value in tower.state.items()}
    for ours, theirs in (("first", "linear_1"), ("last", "linear_2")):
        layer = getattr(projector, ours)
        state |= {f"model.multi_modal_projector.{theirs}.{key}": value for key, value in layer.state_dict().items()}
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    model.load_state_dict(state, assign=True)
    ends = list(decoder.description.ends)
    model.generation_config = GenerationConfig(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends,
        pad_token_id=processor.tokenizer.pad_token_id,
        suppress_tokens=[image],  # no answer; its row of the output layer is empty, and all other logits may be below 0
    )
    return model


def _layer(layer: int, blocks: int) -> int:
    """The bundle's block as transformers counts hidden states, of which the first is the blocks' input."""
    return layer if layer < 0 else layer - blocks


def _language_state(language: Any, rows: int) -> tuple[dict[str, Tensor], bool]:
    """The language model's weights by the names inside LLaVA, its tables of words with `rows` rows at least, and whether they are one."""
    words, head = language.get_input_embeddings().weight, language.get_output_embeddings().weight
    state = {f"model.language_model.{key}": value.detach() for key, value in language.base_model.state_dict().items()}
    (table,) = [key for key, value in state.items() if value.data_ptr() == words.data_ptr()]
    tied = words.data_ptr() == head.data_ptr() and table == "model.language_model.embed_tokens.weight"
    state[table] = _with_rows(state[table], rows)
    state["lm_head.weight"] = state[table] if tied else _with_rows(head.detach(), rows)
    return state, tied


def _with_rows(table: Tensor, rows: int) -> Tensor:
    missing = rows - len(table)
    return table if missing <= 0 else torch.cat([table, table.new_zeros(missing, table.shape[1])])


@torch.no_grad()
def compare(folder: Path, bundle: Bundle, trial: Trial) -> list[str]:
    """Raises ValueError with the first question of which the folder, as a user loads it, makes other ids, pixels, logits or an answer."""
    found: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, report = found
    if any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ValueError(f"{folder.name}: transformers does not find all weights of the folder again: {report}")
    processor: Any = AutoProcessor.from_pretrained(folder)
    model.eval()
    texts = [asked(processor, text) for text in trial.prompts]
    worst = 0.0
    for number, (image, text, expected) in enumerate(zip(trial.images, texts, trial.logits, strict=True)):
        inputs = _quietly(processor, images=image, text=text)
        places = int((inputs["input_ids"] == model.config.image_token_id).sum())
        if inputs["input_ids"].shape[1] != len(trial.ids[number]) or places != model.config.image_seq_length:
            raise ValueError(f"the folder's processor makes {inputs['input_ids'].shape[1]} ids of {text!r}, not {len(trial.ids[number])}")
        gap = float((inputs["pixel_values"] - _pixels(bundle, [image])).abs().max())
        if not gap <= _SAME_PIXELS * 100:
            raise ValueError(f"the folder's processor makes other pixels of an image that needs no resizing: they differ by {gap:.2g}")
        logits = model(**inputs).logits[0, -1, : len(expected)]
        apart = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not apart <= CLOSE:
            raise ValueError(
                f"loaded by transformers, the logits of {trial.prompts[number]!r} differ by {apart:.2g} of the largest from the bundle's: "
                f"something in its language model or tower is other there"
            )
        worst = max(worst, apart)
    inputs = _quietly(processor, images=trial.images, text=texts, padding=True)
    generated = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = [answer.strip() for answer in processor.batch_decode(generated, skip_special_tokens=True)]
    if answers != trial.answers:
        number = next(place for place, pair in enumerate(zip(answers, trial.answers, strict=True)) if pair[0] != pair[1])
        raise ValueError(
            f"loaded by transformers, {trial.prompts[number]!r} is answered {answers[number]!r}, and by the bundle "
            f"{trial.answers[number]!r}"
        )
    return [
        f"ids and {len(answers)} greedy answers are the bundle's; logits differ by {worst:.1g} of the largest at most",
        _of_other_sizes(bundle, processor),
    ]


def _quietly(processor: Any, **given: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return processor(**given, return_tensors="pt")


def _pixels(bundle: Bundle, images: list[Image.Image]) -> Tensor:
    """(B, 3, H, W) by the bundle's own preprocessing."""
    assert bundle.towers is not None
    rows = [torch.from_numpy(bundle.pixels(image).copy()) for image in images]
    return normalise(torch.stack(rows), bundle.towers.preprocess, torch.float32)


def _of_other_sizes(bundle: Bundle, processor: Any) -> str:
    """How far the processor's resizing is from that in training."""
    images = pictures()
    assert bundle.towers is not None
    std = torch.tensor(bundle.towers.preprocess.std).view(3, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    levels = ((theirs - _pixels(bundle, images)) * std * 255).abs()
    return (
        f"pixels of {len(images)} pictures of other sizes differ by {float(levels.mean()):.2f} of 255 levels in the mean, "
        f"{float(levels.max()):.0f} at most"
    )
