"""Answers as the VQA metrics compare them: punctuation, number words, articles and contractions undone, by the official rules.

They are kept with their oddities, as another rule is another score:
- A punctuation mark becomes a space, but vanishes everywhere if one of its kind touches a space, or if the answer has a comma
  between digits: "red/blue" ends as "red blue", "red/blue /" as "redblue", "2,000" as "2000", "1,5-7" as "157".
- Full stops vanish unless a digit follows ("3." is "3", "1.5" and ".5" stay): the look-behind for a digit before them is misspelt and
  without effect. Of one answer 32 vanish at most: the flag re.UNICODE stands where `sub` takes its count.
- Contractions are looked up in lower case, so that the four entries with a capital (Im, Ive, Id've, I'dve) never apply; "somebody'd"
  loses its apostrophe where all others gain one; "shes", "lets" and "im" are not in the table.
- "none" is a number word and becomes "0".
Source: PythonEvaluationTools/vqaEvaluation/vqaEval.py of https://github.com/GT-Vision-Lab/VQA
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = ("a", "an", "the")
NUMBER_WORDS = {"none": "0"} | {
    word: str(number) for number, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
_DIGITS_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_STOPS_AT_MOST = 32

# Written without any of their apostrophes, these gain it.
_SINGLE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd it'll ma'am
    might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd
    someone'll someone's something'd something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've
    wouldn't y'all you'd you'll you're you've
"""
# Written without one of their apostrophes, any one, these gain it.
_SEVERAL = """
    couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've something'd've there'd've
    they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
"""


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _SINGLE.split()}
    for word in _SEVERAL.split():
        table |= {word[:place] + word[place + 1 :]: word for place, sign in enumerate(word) if sign == "'"}
    return table | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()
# VizWiz's program has the same words with a typographic apostrophe on both sides, but for eight meanings and two spellings.
_APOSTROPHE, _STRAIGHT = "’", ("aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove")
_STRAIGHT_WRITTEN = ("couldn'tve", "hadn'tve")


VIZWIZ_CONTRACTIONS = {
    (written if written in _STRAIGHT_WRITTEN else written.replace("'", _APOSTROPHE)): (
        meant if written in _STRAIGHT else meant.replace("'", _APOSTROPHE)
    )
    for written, meant in CONTRACTIONS.items()
}


def trimmed(answer: str) -> str:
    """Line breaks and tabs as spaces, none at the ends: all that is done to unanimous answers."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def without_punctuation(answer: str) -> str:
    """The first half of the official processing."""
    joined = _DIGITS_COMMA.search(answer) is not None
    result = answer
    for mark in PUNCTUATION:
        touches = f"{mark} " in answer or f" {mark}" in answer
        result = result.replace(mark, "" if touches or joined else " ")
    return _FULL_STOP.sub("", result, count=_STOPS_AT_MOST)


def without_articles(answer: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """The second half: lower case, number words as digits, articles dropped, contractions with their apostrophe."""
    words = [NUMBER_WORDS.get(word, word) for word in answer.lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


@functools.lru_cache(maxsize=1 << 16)  # ten people to a question say the same few words
def normalised(answer: str) -> str:
    """VQAv2's processing, of a trimmed answer, where the people disagree."""
    return without_articles(without_punctuation(answer))


def vizwiz_normalised(answer: str) -> str:
    """VizWiz's processing: VQAv2's with its own table, by which "dont" becomes "don’t", and "don't" stays as it is.

    Source: vqaEvaluation/vqaEval.py of VizWiz's Python API, https://vizwiz.org/tasks-and-datasets/vqa/ ("Code")
    """
    return without_articles(without_punctuation(answer), VIZWIZ_CONTRACTIONS)


def textvqa_normalised(answer: str) -> str:
    """TextVQA's processing: VQAv2's after lower case, no commas and question marks at all, and a space before every "'s".

    The lone "'s" keeps "dog's" and "dog" apart, but then makes "it's" and "its" different as well, and no comma is left to join digits.
    Source: EvalAIAnswerProcessor, pythia/tasks/processors.py of https://github.com/facebookresearch/mmf, LLaVA llava/eval/m4c_evaluator.py
    """
    return normalised(trimmed(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()))
