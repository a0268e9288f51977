"""What keeping freed memory is worth on a CPU: forward and backward of the homeware network, each
way in a process of its own, taking turns. Prints a line a process.

    python tools/step_time.py > docs/results/step-time.txt
"""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
import time

import torch

from namr_dist.parallel.allocator import keep_freed_memory
from namr_dist.recipes.homeware import homeware
from namr_dist.train.checkpoints.network import initial_network

ROUNDS, STEPS = 3, 12


def measure(kept: bool) -> None:
    """Median and spread of a step's seconds, and the process's page faults."""
    if kept:
        keep_freed_memory()
    config = homeware()
    network = initial_network(config, device=torch.device("cpu"), pretrained=True).train()
    side = config.data.image_size
    images = torch.randint(0, 255, (80, side, side, 3), dtype=torch.uint8)
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        z, s = network(images)
        (z.square().mean() + s.mean()).backward()
        seconds.append(time.perf_counter() - began)
    low, middle, high = torch.tensor(seconds[1:]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        f"memory {'kept    ' if kept else 'returned'}  step {middle:.3f} s [{low:.3f}–{high:.3f}]  "
        f"system time {used.ru_stime:.1f} s  page faults {used.ru_minflt:,}  peak {used.ru_maxrss >> 10} MiB",
        flush=True,
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1] == "kept")
    else:
        print(
            f"80 images of 96 px, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"{platform.machine()}; median [p20–p80] of {STEPS - 1} steps",
            flush=True,
        )
        for _ in range(ROUNDS):
            for way in ("returned", "kept"):
                subprocess.run([sys.executable, __file__, way], check=True)
