"""A language decoder that sees an image tower's patches through a projector, with or without LoRA."""
