"""megakd: distil giant CLIP-style teachers into small students."""

__version__ = "0.1.0"
