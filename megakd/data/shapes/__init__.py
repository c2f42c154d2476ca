"""The procedural shapes world: pictures, captions, hard negatives, questions and a tokenizer from one seed.

Read in this order: scene (what is there), captions, questions, pixels, shards (one tar), world (the whole folder).
"""

from megakd.data.shapes.world import IMAGE_SIZE, ShapesWorld, write_world

__all__ = ["IMAGE_SIZE", "ShapesWorld", "write_world"]
