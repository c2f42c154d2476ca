"""Libraries that an extra of pyproject.toml brings, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def library(module: str, needing: str, extra: str, package: str | None = None) -> Any:
    """The module. needing: what needs it, for people. package: that it is installed by, where that is called otherwise.

    Raises ValueError, with the way to install it, where it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module.partition(".")[0]
        raise ValueError(
            f"{needing} {name}, which is not there ({error}); `pip install {name}` (or -e '.[{extra}]' in the repository)"
        ) from error
