"""Comparisons of several runs in one command."""
