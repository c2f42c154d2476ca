"""One rank of an embedding job: recipe, folder, views, samples a part, overrides. Prints what `megakd embed` prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megakd.recipe import load as recipes
from megakd.runtime import launch
from megakd.teachers.embed import EmbedJob, EmbedRequest

if __name__ == "__main__":
    recipe, out, views, part, overrides = sys.argv[1:]
    world = launch.start()
    try:
        EmbedJob(recipes.load(recipe, json.loads(overrides))[0], EmbedRequest(Path(out), int(views)), world, part=int(part)).embed()
    except ValueError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)
    finally:
        launch.stop()
