"""What the YAML files beside this one call, in lmms-eval's own process: its VQAv2 score over our documents."""

from typing import Any

from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val
from PIL import Image


def visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(doc["image"]).convert("RGB")]


def text(doc: dict[str, Any]) -> str:
    return str(doc["question"])


def results(doc: dict[str, Any], said: list[str]) -> dict[str, Any]:
    return dict(vqav2_process_results_val(doc, said))


def choices(doc: dict[str, Any]) -> list[str]:
    return list(doc["choices"])


def target(doc: dict[str, Any]) -> int:
    return int(doc["right"])
