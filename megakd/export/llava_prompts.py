"""How a bundle's prompts become a LlavaProcessor with a chat template, and the questions on which both are compared.

Legend: P image tokens, L tokens of a prompt.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import PreprocessCfg
from PIL import Image
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import LlavaImageProcessor, LlavaProcessor

from megakd.data.bad_samples import BadSample
from megakd.data.shapes.pixels import draw_picture
from megakd.data.shapes.questions import questions
from megakd.data.shapes.scene import scene_of
from megakd.data.transforms import input_size
from megakd.export import transformers_folder
from megakd.export.bundle import Bundle
from megakd.export.transformers_layers import NotMapped, Part
from megakd.recipe.vqa import ImageFit
from megakd.vqa.prompts import stack

ANSWER_TOKENS = 8
OTHERWISE = "transformers' LlavaForConditionalGeneration has no place for it"
_SCENES = 6


@dataclass(frozen=True)
class Trial:
    """What the bundle says: `prompts` about `images`, of the tower's own size; ids, where the image's begin (`starts`), logits of each
    prompt's last token, answers.
    """

    images: list[Image.Image]
    prompts: list[str]
    ids: list[list[int]]
    starts: list[int]
    logits: list[Tensor]
    answers: list[str]


@torch.no_grad()
def trial_of(bundle: Bundle) -> Trial:
    """Questions of the shapes world about its pictures at the tower's size, which no processor resamples."""
    assert bundle.towers is not None
    _, width = input_size(bundle.towers.preprocess)
    images, prompts = [], []
    for number in range(_SCENES):
        scene = scene_of(0, "test", number)
        picture = Image.fromarray(draw_picture(scene, random.Random(number), width))
        for question in questions(scene, random.Random(number))[:2]:
            images.append(picture)
            prompts.append(question.text)
    fitting = [number for number, text in enumerate(prompts) if _fits(bundle, text)]
    if not fitting:
        raise ValueError(
            f"no question fits the bundle's {bundle.max_length} tokens (answers.max_length), so that nothing could be compared"
        )
    images, prompts = [images[number] for number in fitting], [prompts[number] for number in fitting]
    encoded = [bundle.prompts.prompt(text, False, True) for text in prompts]
    logits = []
    for image, one in zip(images, encoded, strict=True):
        batch = stack([one], bundle.prompts.padding, left=True)
        embeddings = bundle.decoder.embed(bundle.look([image]), batch.ids_BL, batch.image_mask_BL)
        output = bundle.decoder.language(inputs_embeds=embeddings, attention_mask=batch.attend_BL.long(), use_cache=False)
        logits.append(output.logits[0, -1])
    return Trial(
        images,
        prompts,
        [one.ids for one in encoded],
        [one.image_start for one in encoded],
        logits,
        bundle.answer(images, prompts, ANSWER_TOKENS),
    )


def _fits(bundle: Bundle, text: str) -> bool:
    positions = bundle.decoder.description.positions
    try:
        length = len(bundle.prompts.prompt(text, False, True).ids)
    except BadSample:
        return False
    return positions is None or length + ANSWER_TOKENS <= positions


def processor_of(source: Path, bundle: Bundle, tower: Part, trial: Trial) -> Any:
    """LlavaProcessor with the bundle's tokenizer, and a chat template that writes its prompts.

    Raises ValueError where no text that begins with an image token has the bundle's ids.
    """
    assert bundle.towers is not None
    tokenizer: Any = copy.deepcopy(bundle.decoder.tokenizer)
    known = tokenizer.get_vocab()
    image = next(name for name in ("<image>", *(f"<image_{number}>" for number in range(len(known) + 1))) if name not in known)
    tokenizer.add_tokens([AddedToken(image, special=True, normalized=False)], special_tokens=True)
    tokenizer.padding_side, tokenizer.model_max_length = "left", bundle.max_length
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    class_token = tower.kind == "clip"
    try:
        images = _image_processor(bundle.towers.preprocess, bundle.decoder.settings.image_fit)
    except NotMapped as error:
        raise ValueError(f"{source}: {error}; {OTHERWISE}") from error
    processor: Any = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=tower.settings["patch_size"],
        vision_feature_select_strategy=strategy(tower),
        image_token=image,
        num_additional_image_tokens=int(class_token),
    )
    number, places = tokenizer.convert_tokens_to_ids(image), bundle.decoder.image_tokens
    expected = [[*ids[:start], *[number] * places, *ids[start + places :]] for ids, start in zip(trial.ids, trial.starts, strict=True)]
    for alone in (False, True):
        if alone:  # the chat template writes the begin token, and no end token follows a prompt
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        for written in _ways(bundle, image):
            processor.chat_template = written
            texts = [asked(processor, text).replace(image, image * places) for text in trial.prompts]
            found = [tokenizer(text).input_ids for text in texts]
            if found == expected:
                return processor
    first = next(pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1])
    raise ValueError(
        f"{source}: its tokenizer makes other ids of a prompt behind an image token than the bundle's [begin] [image] prompt "
        f"({_after(first[0], number)[:8]} for {_after(first[1], number)[:8]}), so that no text of a processor would be what was trained: "
        f"train with a decoder.template that begins with a line break or a special token"
    )


def _image_processor(preprocess: PreprocessCfg, fit: ImageFit) -> Any:
    """transformers' class of a preprocessing with `decoder.image_fit`. Raises NotMapped for one that it has not."""
    if fit == "squash":
        return transformers_folder.image_processor(dataclasses.replace(preprocess, resize_mode="squash"))
    processor = transformers_folder.image_processor(
        preprocess if fit == "tower" else dataclasses.replace(preprocess, resize_mode="shortest")
    )
    if fit == "tower":
        return processor
    if processor.crop_size["height"] != processor.crop_size["width"]:
        raise NotMapped("its pictures are padded to a tower that takes no squares (decoder.image_fit = 'pad')")
    names = ("size", "crop_size", "image_mean", "image_std", "resample")
    return LlavaImageProcessor(do_pad=True, **{name: getattr(processor, name) for name in names})


def _after(ids: list[int], image: int) -> list[int]:
    return [number for number in ids if number != image]


def _ways(bundle: Bundle, image: str) -> list[str]:
    """Chat templates in the bundle's words, which differ in who writes the begin token and in white space at image and answer."""
    tokenizer, template = bundle.decoder.tokenizer, bundle.decoder.settings.template
    if bundle.prompts.chat is not None:
        return [bundle.prompts.chat.with_images(image)]
    begin = tokenizer.bos_token or ""
    bare = template.removeprefix(begin) if begin else template
    return [
        _chat_template(before, image + gap, words, last, tokenizer.eos_token or "")
        for words, before in ((template, ""), (bare, begin))
        for gap in ("", " ")
        for last in (words.rstrip(), words)
    ]


def _chat_template(begin: str, image: str, words: str, last: str, end: str) -> str:
    """Jinja, as transformers keeps it. words: of a question whose answer follows; last: of the one that is to be answered."""
    turn, open_turn = (" + ".join(_written(text)) for text in (words, last))
    return (
        "{{ " + ascii(begin) + " }}{% for message in messages %}{% set turn = namespace(question='') %}"
        "{% if message['content'] is string %}{% set turn.question = message['content'] %}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ " + ascii(image) + " }}{% elif part['type'] == 'text' %}"
        "{% set turn.question = turn.question + part['text'] %}{% endif %}{% endfor %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ " + open_turn + " if loop.last else " + turn + " }}"
        "{% elif message['role'] == 'assistant' %}{{ turn.question + " + ascii(end) + " }}"
        "{% else %}{{ raise_exception('this model knows the roles user and assistant') }}{% endif %}{% endfor %}"
    )


def _written(words: str) -> list[str]:
    """Jinja's terms of a prompt: the template's own text, and between each two pieces the question."""
    pieces = [ascii(piece) for piece in words.split("{question}")]
    return [term for piece in pieces for term in (piece, "turn.question")][:-1]


def asked(processor: Any, question: str) -> str:
    """A question about one image as the folder's chat template writes it."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def strategy(tower: Part) -> str:
    """Whether transformers leaves out a class token in front."""
    return "default" if tower.kind == "clip" else "full"
