"""`megakd answer`: one question about one image, answered by a bundle."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from megakd.data.bad_samples import BadSample
from megakd.data.transforms import rgb_image
from megakd.export.bundle import Bundle
from megakd.recipe import Data, Evaluation
from megakd.runtime import precision

_MAX_PIXELS: int = Data.model_fields["max_pixels"].default
_MAX_NEW_TOKENS: int = Evaluation.model_fields["answer_tokens"].default


def run(bundle: Path, image: Path | None, question: str, max_new_tokens: int = _MAX_NEW_TOKENS) -> None:
    """Print the answer to `question`, asked as sets with short answers are. image None: a question about no image.

    Raises ValueError naming the folder or the file: no bundle or a damaged one, an image that is missing or unreadable, an image for a
    decoder without eyes, a question that is empty or too long.
    """
    if not question.strip():
        raise ValueError("the question is empty: write it in quotes, as the last argument")
    picture = None if image is None else read_image(image)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = Bundle.load(bundle, device, precision.dtype(precision.of(device)))
    if picture is not None and loaded.towers is None:
        raise ValueError(f"{bundle}: this decoder was trained without a vision tower and sees no image: ask without {image}")
    print(loaded.answer([picture], [question], max_new_tokens, short=True)[0])


def is_file(text: str) -> bool:
    """Whether it names a file; a question may be longer than names may be."""
    try:
        return Path(text).is_file()
    except OSError:
        return False


def read_image(path: Path) -> Image.Image:
    """The image, decoded. Raises ValueError naming the file: missing, no image, damaged, larger than data.max_pixels' default."""
    try:
        return rgb_image(path.read_bytes(), _MAX_PIXELS)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except BadSample as bad:
        raise ValueError(f"{path}: {bad.reason}: {bad}") from bad
