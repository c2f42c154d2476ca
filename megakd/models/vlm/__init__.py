"""A language decoder that sees an image tower's patches through a projector, with or without LoRA."""

IGNORED = -100  # a label that is not learned: torch's and transformers' convention
