"""The Triton backend. Its modules import the library `triton` and are imported only where that backend is asked for."""
