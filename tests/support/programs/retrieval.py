"""One of several ranks that score a retrieval set of numbered pictures: PATTERN, and the number BROKEN whose picture gives NaN, or ""."""

from __future__ import annotations

import sys

from megakd.runtime import launch
from support.numbered_pictures import Reader, recipe, results

if __name__ == "__main__":
    pattern, broken = sys.argv[1:]
    world = launch.start()
    try:
        print("FOUND", results(recipe(retrieval={"mine": pattern}), Reader(broken=int(broken) if broken else None), world)["retrieval"])
    except ValueError as error:
        print("ERROR", error)
    finally:
        launch.stop()
