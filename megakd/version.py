"""The version: apart from the public names in `megakd/__init__.py`, so that every layer may read it."""

__version__ = "0.2.0"
