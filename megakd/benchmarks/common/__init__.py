"""What the benchmarks share: children, their logs, material, the environment of open_clip, the comparison of two sides."""
