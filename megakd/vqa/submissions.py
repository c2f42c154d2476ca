"""Answers in the file that a benchmark's server or program takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megakd.runtime.files import write_text
from megakd.vqa.normalise import trimmed
from megakd.vqa.scores import Answered, gqa_answer

Entry = dict[str, Any]


def _vqav2(pair: Answered) -> Entry:
    """Every question of the split must be there, once. Source: https://visualqa.org/evaluation.html ("Results Format")"""
    return {"question_id": pair.question.question_id, "answer": trimmed(pair.prediction)}


def _vizwiz(pair: Answered) -> Entry:
    """Source: https://vizwiz.org/tasks-and-datasets/vqa/ ("Submission"); the image is the question's id."""
    return {"image": pair.question.question_id, "answer": trimmed(pair.prediction)}


def _gqa(pair: Answered) -> Entry:
    """Source: eval.py of https://cs.stanford.edu/people/dorarad/gqa/evaluate.html"""
    return {"questionId": pair.question.question_id, "prediction": gqa_answer(pair.prediction)}


def _pope(pair: Answered) -> Entry:
    """In the order of the label file, which POPE's program goes by. Source: https://github.com/RUCAIBox/POPE"""
    return {"question_id": pair.question.question_id, "question": pair.question.text, "answer": pair.prediction}


def _scienceqa(pair: Answered) -> Entry:
    """As LLaVA's model_vqa_science.py writes them and its eval_science_qa.py reads them, which knows a picture by "<image>"."""
    prompt = f"<image>\n{pair.question.text}" if pair.question.image is not None else pair.question.text
    return {"question_id": pair.question.question_id, "prompt": prompt, "text": pair.prediction}


# A list in one JSON file, or a line for each. TextVQA's EvalAI challenge takes VQAv2's entries.
_LISTS: dict[str, Callable[[Answered], Entry]] = {"vqav2": _vqav2, "textvqa": _vqav2, "vizwiz": _vizwiz, "gqa": _gqa}
_LINES: dict[str, Callable[[Answered], Entry]] = {"pope": _pope, "scienceqa": _scienceqa}


def write(kind: str, pairs: Sequence[Answered], folder: Path, name: str) -> Path | None:
    """FOLDER/NAME.submission.json or .jsonl, in the questions' order; None for a format that has no server (llava)."""
    if kind in _LISTS:
        path, text = folder / f"{name}.submission.json", json.dumps([_LISTS[kind](pair) for pair in pairs])
    elif kind in _LINES:
        path, text = folder / f"{name}.submission.jsonl", "".join(json.dumps(_LINES[kind](pair)) + "\n" for pair in pairs)
    else:
        return None
    write_text(path, text)
    return path
