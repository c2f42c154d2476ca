"""Damaged files and mistaken settings by the hundred; see `faults.campaign`."""
