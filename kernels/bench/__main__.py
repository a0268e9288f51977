"""Forward and backward of each loss beside pytorch-metric-learning's, in one process, on this machine.

Providers take turns sample by sample, so that whatever else the machine does meets all of them. A pair is timed
only after both have given the same loss. Figures: milliseconds, median [p20–p80].
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference

PER_CLASS = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One loss: ours, and another library's form of it, where there is one."""

    name: str
    ours: Callable[[Tensor], Tensor]
    other: Callable[[Tensor], Tensor] | None = None


def cases(rows: int, width: int) -> list[Case]:
    """The losses on `rows` embeddings, four a class."""
    from pytorch_metric_learning import losses, miners

    labels = torch.arange(rows // PER_CLASS).repeat_interleave(PER_CLASS)
    weights = 0.5 + torch.rand(rows, width, generator=torch.Generator().manual_seed(1))
    similarity, miner = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5), miners.MultiSimilarityMiner(epsilon=0.1)
    anchors = losses.ProxyAnchorLoss(rows // PER_CLASS, width, margin=0.1, alpha=32)
    proxies = reference.unit_rows(anchors.proxies.detach())
    return [
        Case(name="multi-cluster ranking", ours=lambda z: reference.multi_cluster_ranking(z, weights)),
        Case(name="triplet, semi-hard", ours=lambda z: reference.triplet_loss(z, labels)),
        Case(name="margin", ours=lambda z: reference.margin_loss(reference.unit_rows(z), labels,
                                                                 beta=torch.tensor(1.2))),
        Case(name="multi-similarity", ours=lambda z: reference.multi_similarity_loss(reference.unit_rows(z), labels),
             other=lambda z: similarity(z, labels, miner(z, labels))),
        Case(name="proxy-anchor", ours=lambda z: reference.proxy_anchor_loss(reference.unit_rows(z), labels, proxies),
             other=lambda z: anchors(z, labels)),
    ]


def sample_ms(loss: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    """One forward and backward in milliseconds."""
    z = rows.clone().requires_grad_()
    began = time.perf_counter()
    loss(z).backward()
    return 1000 * (time.perf_counter() - began)


def spread(samples_ms: list[float]) -> str:
    """Median [p20–p80]."""
    low, middle, high = torch.tensor(samples_ms).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return f"{middle:8.2f} [{low:.2f}–{high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m namr_dist.kernels.bench", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 512], help="batch sizes (128 512)")
    parser.add_argument("--width", type=int, default=128, help="embedding width (128)")
    parser.add_argument("--samples", type=int, default=30, help="timed runs of each provider (30)")
    options = parser.parse_args()
    print(f"CPU {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"forward + backward, ms, median [p20–p80] of {options.samples}")
    for rows in options.rows:
        z = torch.randn(rows, options.width, generator=torch.Generator().manual_seed(0))
        for case in cases(rows, options.width):
            if case.other:
                torch.testing.assert_close(case.ours(z), case.other(z), rtol=1e-4, atol=1e-5)
            ours, others = [], []
            for _ in range(options.samples):
                ours.append(sample_ms(case.ours, z))
                if case.other:
                    others.append(sample_ms(case.other, z))
            beside = f"   pytorch-metric-learning {spread(others)}" if others else ""
            print(f"B {rows:5}  D {options.width}  {case.name:22} reference {spread(ours)}{beside}", flush=True)


if __name__ == "__main__":
    main()
