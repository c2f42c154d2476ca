"""`megakd data tokenizer`: a tokenizer for the words of one's own captions, in the files that transformers and open_clip read."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megakd.data.bad_samples import BadCounter, BadLog, BadSample
from megakd.data.caption_tokens import LONGEST_CAPTION, caption
from megakd.runtime.console import LongWork

Kind = Literal["bpe", "words"]
PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<start>", "<end>"
SMALLEST = 300  # every byte, and the four special tokens


def write(texts: list[str], out: Path, kind: Kind, words: int, context: int) -> int:
    """Make a tokenizer of the texts in files (.txt, a line each) and shards (.tar, their .txt members). Returns its number of words.

    Its end token has the largest id, as a text tower that pools by argmax needs. Captions that training could not use are logged and left
    out. Raises ValueError for files without a text, a folder that is not empty, and a size that holds too little.
    """
    if kind == "bpe" and words < SMALLEST:
        raise ValueError(f"--words {words}: byte-level BPE takes {SMALLEST} at least, one for every byte")
    if words < 8 or context < 3:
        raise ValueError(f"--words {words}, --context {context}: at least 8 words and 3 tokens")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out}: is there already; give a new folder")
    files = [Path(text) for text in texts]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ValueError(f"{missing[0]}: no such file; give .txt files with a text a line, or shards (.tar) with .txt members")
    tokenizer = _trained(_read(files), kind, words - 1)  # the end token comes after all
    tokenizer.add_special_tokens([END])
    special = [(word, tokenizer.token_to_id(word)) for word in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=special)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    names = {"bos_token": START, "eos_token": END, "unk_token": UNKNOWN, "pad_token": PAD}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, "clean_up_tokenization_spaces": False}
    (out / "tokenizer_config.json").write_text(json.dumps({**settings, **names}, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()


def _trained(texts: Iterable[str], kind: Kind, words: int) -> Tokenizer:
    special = [PAD, UNKNOWN, START]
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN) if kind == "bpe" else models.WordLevel({}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    if kind == "bpe":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: trainers.Trainer = trainers.BpeTrainer(
            vocab_size=words, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
        trainer = trainers.WordLevelTrainer(vocab_size=words, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _read(files: list[Path]) -> Iterator[str]:
    count, log = 0, BadLog()
    with LongWork("reading captions", sum(file.stat().st_size for file in files), "bytes") as work:
        for file in files:
            for text in _of_shard(file, log, work) if file.suffix == ".tar" else _of_lines(file, work):
                count += 1
                yield text
    log.close()
    if not count:
        raise ValueError(f"{files[0]}: not one text in it; a .txt file has a text a line, a shard has .txt members")


def _of_lines(file: Path, work: LongWork) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as opened:
            for line in opened:
                work.advance(len(line.encode()))
                if text := line.strip():
                    yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _of_shard(file: Path, log: BadLog, work: LongWork) -> Iterator[str]:
    try:
        with tarfile.open(file, "r|") as opened:
            place = 0
            for member in opened:
                work.advance(member.offset_data + member.size - place)
                place = member.offset_data + member.size
                if member.isfile() and member.name.endswith(".txt") and (content := opened.extractfile(member)) is not None:
                    try:
                        yield caption(content.read(LONGEST_CAPTION + 1)).strip()
                    except BadSample as bad:
                        log.report(BadCounter(1, {bad.reason: 1}, {bad.reason: f"{file}: {member.name} ({bad.detail})"}))
    except tarfile.TarError as error:
        raise ValueError(f"{file}: no tar, or a damaged one ({error}); give a whole and uncompressed shard") from None
