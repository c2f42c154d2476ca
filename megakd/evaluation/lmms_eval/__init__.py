"""The entry point that lmms-eval reads at every start. The model itself is in `model`.

    [project.entry-points."lmms_eval.models"]
    megakd = "megakd.evaluation.lmms_eval:manifest"

    python -m lmms_eval --model megakd --model_args bundle=RUN/bundle --tasks pope --batch_size 64

Nothing heavy is imported here: lmms-eval calls `manifest` also when another model is scored. lmms-eval 0.7.3 is installed by hand beside
megakd; it is no extra, because it brings dozens of packages, none of whose requirements contradicts ours.
"""

from __future__ import annotations

from typing import Any

NAME = "megakd"


def manifest() -> Any:
    """lmms-eval's ModelManifest of the model `megakd`."""
    from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]

    return ModelManifest(model_id=NAME, simple_class_path="megakd.evaluation.lmms_eval.model.MegakdBundle")
