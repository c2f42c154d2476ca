"""A run: its flags, its checks, its parts, the fit loop and the evaluations during it."""
