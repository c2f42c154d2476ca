"""`megakd answer`: one question about one image, answered by a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def answer(
    bundle: Annotated[Path, typer.Argument(help="RUN/bundle of a run that trained a decoder")],
    image: Annotated[str | None, typer.Argument(help="image file; none: a question about no image")] = None,
    question: Annotated[str | None, typer.Argument(help="in quotes")] = None,
    merge: Annotated[Path | None, typer.Option(metavar="OUT", help="write the bundle to OUT, its adapter merged, and ask nothing")] = None,
) -> None:
    """Answer a question about an image, or about none: megakd answer RUN/bundle image.jpg "How many red squares?"."""
    from megakd.export import bundle as bundles
    from megakd.runtime.console import quiet_libraries

    quiet_libraries()
    if merge is not None:
        bundles.merge(bundle, merge)
        print(f"{merge}: {bundle} with its adapter merged")
    elif image is None or (question is None and is_file(image)):
        raise ValueError("give an image and a question: megakd answer RUN/bundle image.jpg 'How many red squares?'")
    elif question is None:
        run(bundle, None, image)  # the only argument is what is asked
    else:
        run(bundle, Path(image), question)


def run(bundle: Path, image: Path | None, question: str, max_new_tokens: int | None = None) -> None:
    """Print the answer to `question`, asked as sets with short answers are. image None: a question about no image.

    max_new_tokens: default evaluation.answer_tokens. Raises ValueError naming the folder or the file: no bundle or a damaged one, an image
    that is missing or unreadable, an image for a decoder without a vision tower, a question that is empty or too long.
    """
    from megakd.evaluation.encoder import read_image
    from megakd.export.bundle import load_bundle
    from megakd.recipe import Evaluation

    if not question.strip():
        raise ValueError("the question is empty: write it in quotes, as the last argument")
    picture = None if image is None else read_image(image)
    loaded = load_bundle(bundle)
    if picture is not None and loaded.towers is None:
        raise ValueError(f"{bundle}: this decoder was trained without a vision tower and sees no image: ask without {image}")
    longest = max_new_tokens or Evaluation.model_fields["answer_tokens"].default
    print(loaded.answer([picture], [question], longest, short=True)[0])


def is_file(text: str) -> bool:
    """Whether it names a file; a question may be longer than names may be."""
    try:
        return Path(text).is_file()
    except OSError:
        return False
