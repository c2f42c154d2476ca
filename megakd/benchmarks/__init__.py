"""Side-by-side benchmarks: this program and open_clip's, in one run, on the same shards and models, alternated.

Numbers of two different moments on a shared machine do not compare; what is printed is always the pair of one run.
"""
