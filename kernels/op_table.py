"""Every public op: what it is made of, and the cases it is measured in. Plain values, and nothing
is imported for them.

An op's name is that of its function in this package, of its definition in reference/, and of its
operator `namr::NAME`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A case of bench/: an op with some options, the data it is given, its necessary products
    (bench/cases.py)."""

    name: str
    options: Mapping[str, str | int | float] = field(default_factory=dict)
    """Of the op and of its definition, where they are not the defaults."""
    unit: bool
    """Rows have length 1."""
    second: str = ""
    """The leaf beside the rows: "weights" (B, D), "beta" (1,), "proxies" (C, D), or none."""
    kinked: bool = True
    """A comparison (mining, a hinge, the sign of |D - η|) decides a pair's slope, so rounding may
    decide a near tie."""
    sampled: bool = False
    """Negatives are drawn at random; only this project's draws repeat those of the reference."""
    forward_products: int = 2
    backward_products: int = 0


@dataclass(frozen=True, kw_only=True)
class Op:
    """One op. Its parameters without a default are its rows, `labels_B` if it reads labels, and its
    second leaf."""

    name: str
    primitives: tuple[str, ...]
    """Functions of cpu/, all of them, and of gpu/, where those that are missing are done by cpu/
    too (dispatch.py)."""
    benchmarks: tuple[Benchmark, ...] = ()


CLUSTERS = 2
"""Of multi-cluster ranking, where it is measured."""

OPS = {op.name: op for op in (
    Op(name="mean_pairwise_distance", primitives=("row_moments", "distance_sum_gradient")),
    Op(name="multi_cluster_ranking", primitives=("row_moments", "ranking"), benchmarks=(
        Benchmark(name="multi-cluster-ranking", options={"clusters": CLUSTERS}, unit=False, second="weights",
                  forward_products=6, backward_products=8),
    )),
    Op(name="nearest_centres", primitives=("k_nearest", "k_nearest_gradient")),
    Op(name="triplet_loss", primitives=(
        "hardest_pairs", "semihard_negatives", "sampled_negatives", "pair_distance", "pair_gradient",
    ), benchmarks=(
        Benchmark(name="triplet-hardest", options={"mining": "hardest"}, unit=False),
        Benchmark(name="triplet-semihard", options={"mining": "semihard"}, unit=False),
        Benchmark(name="triplet-distance-weighted", options={"mining": "distance_weighted"}, unit=False, sampled=True),
    )),
    Op(name="margin_loss", primitives=("sampled_negatives", "pair_distance", "pair_gradient"), benchmarks=(
        Benchmark(name="margin", unit=True, second="beta", sampled=True),
    )),
    Op(name="multi_similarity_loss", primitives=("similarity_statistics", "similarity_gradient"), benchmarks=(
        Benchmark(name="multi-similarity", unit=True, backward_products=4),
    )),
    Op(name="proxy_anchor_loss", primitives=("proxy_sums", "proxy_gradient"), benchmarks=(
        Benchmark(name="proxy-anchor", unit=True, second="proxies", kinked=False, backward_products=4),
    )),
)}  # fmt: skip
