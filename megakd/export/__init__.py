"""What leaves a run: open_clip folders and bundles of a decoder."""
