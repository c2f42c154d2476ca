"""One of several ranks that score sets of numbered pictures: EVALUATION of a recipe as JSON, and the number BROKEN whose picture gives NaN,
or ""."""

from __future__ import annotations

import json
import sys

from megakd.runtime import launch
from support.numbered_pictures import Reader, recipe, scores

if __name__ == "__main__":
    evaluation, broken = sys.argv[1:]
    world = launch.start()
    try:
        print("FOUND", scores(recipe(**json.loads(evaluation)), Reader(broken=int(broken) if broken else None), world))
    except ValueError as error:
        print("ERROR", error)
    finally:
        launch.stop()
