"""The world's closed vocabulary and its word-level tokenizer, in the files that Hugging Face and open_clip read."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from megakd.data.shapes.captions import NUMBER_WORDS, SYNONYMS
from megakd.data.shapes.questions import ANSWERS
from megakd.data.shapes.scene import CELLS, COLOURS, RELATIONS, SHAPES, SIZES

CONTEXT_LENGTH = 32  # the longest caption, three things in full, takes 29 with the start and the end
PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<start>", "<end>"
_FRAME = "a the only and at thing things what colour shape size is where how many are there ?"
# LLaVA's request for a short answer, so that a decoder with this tokenizer can be asked as the large ones are.
_PROMPT = "answer the question using a single word or phrase . ,"


def world_words() -> tuple[str, ...]:
    """Every word of captions, questions and answers, once, in a fixed order."""
    plurals = [f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES]
    texts = [_FRAME, *NUMBER_WORDS, *SHAPES, *plurals, *COLOURS, *SIZES, *CELLS, *RELATIONS, *SYNONYMS.values()]
    texts += [answer for answers in ANSWERS.values() for answer in answers] + [_PROMPT]
    return tuple(dict.fromkeys(word for text in texts for word in text.split(" ")))


def vocabulary() -> tuple[str, ...]:
    """Tokens by id: padding is 0, and the end token is the last, since open_clip's "argmax" pooling takes the highest id."""
    return (PAD, UNKNOWN, START, *world_words(), END)


def build_tokenizer() -> Tokenizer:
    """Lower-cased words between <start> and <end>; everything else is <unk>."""
    ids = {token: number for number, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([PAD, UNKNOWN, START, END])
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    # A mark is a token of its own, so that "circle?" is no unknown word.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", pair=f"{START} $A $B {END}", special_tokens=[(START, ids[START]), (END, ids[END])]
    )
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Write what `AutoTokenizer.from_pretrained(folder)` and `open_clip.tokenizer.HFTokenizer(folder)` load offline."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    names = {"bos_token": START, "eos_token": END, "unk_token": UNKNOWN, "pad_token": PAD}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT_LENGTH, "padding_side": "right"}
    config = {**settings, "truncation_side": "right", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")
