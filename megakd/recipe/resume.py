"""What becomes of a resumed run whose recipe has changed; a test holds that every key of a recipe is in this table.

free      nothing that is learned depends on it
told      the run goes on with the new value, and says so: what its messages ask people to change is among these
refused   what was trained so far would not be what the new recipe says

`*` is a name of the recipe's own. The keys below one in the table, those of an architecture, are classed as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from megakd.recipe import objectives
from megakd.recipe.schedules import Schedule
from megakd.recipe.start import Inherit

Change = Literal["free", "told", "refused"]

_PREPROCESS = tuple(f"preprocess.{key}" for key in ("mean", "std", "interpolation", "resize_mode"))
_TEACHER_FREE = ("offload", "ds_config", "recipe", "int8_agreement", "compile", "text_padding")
_TEACHER_REFUSED = (
    *("model", "architecture", "pretrained", "tokenizer", *_PREPROCESS),
    *("scale", "entropy", "weight", "mode", "outlier_threshold", "int8_product", "calibration", "image_size", "patch_grid"),
    "store_of",
)
_FROM_HERE = "from the step that is gone on from; what was learned before stays"
_SAME_DATA = "it has to hold the same data, which is checked by names and counts"

_SOURCE = ("format", "questions", "annotations", "images", "image_name", "split", "plain")
_VIEWS = (
    *("crop_scale", "crop_ratio", "flip", "seed", "grayscale", *(f"blur.{key}" for key in ("probability", "sigma"))),
    *(f"rand_augment.{key}" for key in ("magnitude", "layers", "std", "probability", "interpolation", "fill")),
    *(f"color_jitter.{key}" for key in ("brightness", "contrast", "saturation", "hue", "probability")),
    *(f"erase.{key}" for key in ("probability", "scale", "ratio", "value")),
)
_FREE = (
    "views.preset",  # whose values are compared
    *("name", "data.workers", "data.prefetch", "data.cache", "data.max_bad_fraction", "kernels.backend", "kernels.ring"),
    *(
        "student.recipe",
        "student.activation_checkpointing",
        "student.compile",
        "student.text_padding",
        "decoder.recipe",
        "answers.teacher.recipe",
    ),
    *(f"{role}.{key}" for role in ("teacher", "ensemble.*") for key in _TEACHER_FREE),
    *(
        f"evaluation.{key}"
        for key in ("every", "weights", "batch", "zero_shot", "retrieval", "hard_negatives", "diagnostics", "vqa_batch", "answer_tokens")
    ),
    *(f"evaluation.vqa.*.{key}" for key in _SOURCE),
    *(f"evaluation.reader.*.{part}.{key}" for part in ("train", "test") for key in _SOURCE),
    *(f"evaluation.probe.*.{key}" for key in ("train", "test", "layer", "neighbours", "temperature")),
    *(f"evaluation.reader.*.{key}" for key in ("answers", "layer", "image_tokens", "width", "steps", "batch", "lr", "blind", "seed")),
    *("checkpoint.every", "checkpoint.keep", "checkpoint.best", "export.heads", "log.every", "log.profile", "watchdog.limit"),
)
# With what the run says about it.
TOLD = {
    "data.train": _SAME_DATA,
    "data.train.*.shards": _SAME_DATA,
    "data.max_pixels": f"other images may be refused, {_FROM_HERE}",
    "teacher.store": "its embeddings are of the same teacher and data, or it would have been refused",
    "ensemble.*.store": "its embeddings are of the same teacher and data, or it would have been refused",
    "teacher.store_miss": _FROM_HERE,
    "ensemble.*.store_miss": _FROM_HERE,
    "optim.lr": _FROM_HERE,
    "optim.clip": _FROM_HERE,
    "optim.rates": _FROM_HERE,
    "optim.layer_decay": _FROM_HERE,
    "optim.cooldown": _FROM_HERE,
    "optim.cooldown_shape": _FROM_HERE,
    "export.weights": "what the run writes at its end; `megakd export RUN` and `megakd evaluate RUN` read the recipe of its last start",
    "optim.steps": "with a constant schedule, and before a cooldown, every step is what it would have been with this number from the start",
    "answers.max_length": f"other conversations fit, {_FROM_HERE}",
    "answers.teacher.bundle": "it has to be the same teacher, which is checked by its SHA-256",
    "answers.lr.tower": _FROM_HERE,
    "answers.lr.projector": _FROM_HERE,
    "answers.lr.decoder": _FROM_HERE,
    **{f"answers.train.*.{key}": _SAME_DATA for key in ("questions", "annotations", "images", "image_name")},
}
_REFUSED = (
    *("seed", "data.caption", "data.captions", "data.clean", "data.block", "data.window", "data.orientation", "data.transparency"),
    *("data.decode", "data.resampling"),
    *(f"views.{key}" for key in _VIEWS),
    *(f"student.{key}" for key in ("model", "architecture", "pretrained", "tokenizer", "max_scale", *_PREPROCESS)),
    *("student.image_weights", "student.text_weights", "student.text_from"),
    *(f"student.inherit.{key}" for key in Inherit.model_fields),
    "student.freeze",
    *(f"{role}.{key}" for role in ("teacher", "ensemble.*") for key in _TEACHER_REFUSED),
    "student.image_size",
    *objectives.keys(),
    *(f"schedules.*.{key}" for key in Schedule.model_fields),
    *(f"decoder.{key}" for key in ("model", "architecture", "tokenizer", "adapt", "quantise", "image_tokens", "layer", "template")),
    *(
        "decoder.image_fit",
        "decoder.instruction",
        "decoder.start",
        *(f"decoder.lora.{key}" for key in ("rank", "alpha", "dropout", "targets")),
    ),
    "data.train.*.weight",
    *("answers.train.*.format", "answers.train.*.weight", "answers.train.*.split", "answers.train.*.plain"),
    *("answers.weight", "answers.batch", "answers.tower"),
    *(f"answers.teacher.{key}" for key in ("weight", "divergence", "temperature", "quantise")),
    *(f"optim.{key}" for key in ("batch", "warmup", "schedule", "final_lr", "betas", "eps", "weight_decay", "decays")),
    *(f"optim.ema.{key}" for key in ("decay", "every", "warmup")),
)
ON_RESUME: dict[str, Change] = {
    **dict.fromkeys(_FREE, "free"),
    **dict.fromkeys(TOLD, "told"),
    **dict.fromkeys(_REFUSED, "refused"),
}


def entry(key: str) -> str | None:
    """The table's entry for a key of a recipe, such as `evaluation.vqa.mine.images`; None without one."""
    parts = key.split(".")
    return next((name for end in range(len(parts), 0, -1) for name in _spelled(parts[:end]) if name in ON_RESUME), None)


def _spelled(parts: list[str]) -> Iterable[str]:
    yield ".".join(parts)
    for place in range(1, len(parts)):
        yield ".".join([*parts[:place], "*", *parts[place + 1 :]])


def change(key: str) -> Change:
    """The class of this key; refused where the table lacks it, as for a section that comes or goes."""
    # a set that is added is named by its own keys, the last one that is taken out by its section's
    tables = {"evaluation.vqa": "format", "evaluation.reader": "seed", "evaluation.probe": "layer"}
    name = f"{key}.*.{tables[key]}" if key in tables else entry(key)
    return "refused" if name is None else ON_RESUME[name]
