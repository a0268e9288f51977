"""Time and memory of an epoch's plan: for each way of sampling, the plan of one epoch cut for 64
ranks (least of five wall times; memory as tracemalloc sees it, in a pass of its own), and the first
batch of a run that resumes at a random step (longest of five).

    python tools/plan_time.py FOLDER > docs/results/plan-time.txt
"""

from __future__ import annotations

import random
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

from namr_dist.data.read.plan import Sampling, epoch_plan, rank_part, steps_per_epoch
from namr_dist.data.read.stream import TrainPlan
from namr_dist.data.shardset.manifest import Manifest, SplitIndex
from namr_dist.provenance import provenance

RANKS, REPEATS = 64, 5
BASE = Sampling(classes_per_batch=128, images_per_class=4)
WAYS = (
    BASE,
    replace(BASE, shuffle="shards"),
    replace(BASE, sampling="proportional"),
    replace(BASE, sampling="category", categories_per_batch=4),
)


def measure(index: SplitIndex, sampling: Sampling) -> str:
    """A line of the table, for one way of sampling."""
    plan_s = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        whole_plan(index, sampling)
        plan_s.append(time.perf_counter() - began)
    tracemalloc.start()
    whole_plan(index, sampling)
    mib = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    draw, resume_s = random.Random(0), []
    for _ in range(REPEATS):
        plan = TrainPlan(
            index=index,
            sampling=sampling,
            seed=0,
            rank=RANKS // 2,
            world_size=RANKS,
            steps=10**7,
            first_step=draw.randrange(10**7),
        )
        began = time.perf_counter()
        next(iter(plan))
        resume_s.append(time.perf_counter() - began)
    return (
        f"{sampling.sampling:<14}{sampling.shuffle:<10}{steps_per_epoch(index, sampling):>6}"
        f"{min(plan_s):>10.3f}{mib:>8.1f}{max(resume_s):>11.3f}"
    )


def whole_plan(index: SplitIndex, sampling: Sampling) -> None:
    """Draw one epoch's batches and cut each for every rank; nothing is kept."""
    for batch_PK in epoch_plan(index, sampling, seed=0, epoch=1):
        for rank in range(RANKS):
            rank_part(batch_PK, rank=rank, world_size=RANKS)


def main() -> None:
    """Print what was measured on, and the table."""
    here = provenance()
    began = time.perf_counter()
    manifest = Manifest.load(Path(sys.argv[1]))
    index = manifest.index("train")
    print(f"{here['machine']}; {here['versions']}; commit {here['commit']}")
    print(
        f"{manifest.name}: {len(index):,} training images; manifest read in {time.perf_counter() - began:.2f} s"
    )
    print(
        f"plan of one epoch for {RANKS} ranks, P = {BASE.classes_per_batch}, K = {BASE.images_per_class}\n"
    )
    print(f"{'sampling':<14}{'shuffle':<10}{'steps':>6}{'plan, s':>10}{'MiB':>8}{'resume, s':>11}")
    for sampling in WAYS:
        print(measure(index, sampling))


if __name__ == "__main__":
    main()
