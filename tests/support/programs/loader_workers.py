"""A loader with two workers, `loader_workers.py PATTERN HOW`: prints their process ids.

HOW: signals sends each of them what SLURM sends to all processes of a step, reads on and ends without closing; ctrl_c reads until it comes.
"""

import itertools
import multiprocessing
import os
import signal
import sys

from support.loaders import stream
from support.shards import open_shards

if __name__ == "__main__":
    batches = stream(open_shards(sys.argv[1]), workers=2)
    next(batches)
    workers = [child.pid for child in multiprocessing.active_children()]
    print(*workers, flush=True)
    if sys.argv[2] == "signals":
        for pid in workers:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(pid, number)
        for _ in itertools.islice(batches, 20):
            pass
        print("alive", flush=True)
    elif sys.argv[2] == "ctrl_c":
        print("ready", flush=True)
        for _ in batches:
            pass
