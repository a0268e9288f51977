"""Every public op and the primitives that it is made of: plain values, and nothing is imported for them.

An op's name is that of its function in this package, of its definition in reference/, and of its operator `namr::NAME`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Op:
    """One op."""

    name: str
    primitives: tuple[str, ...]
    """Functions of cpu/, all of them, and of gpu/, where those that are missing are done by cpu/ too (dispatch.py)."""


OPS = {op.name: op for op in (
    Op(name="mean_pairwise_distance", primitives=("row_moments", "distance_sum_gradient")),
    Op(name="multi_cluster_ranking", primitives=("row_moments", "ranking")),
    Op(name="triplet_loss", primitives=(
        "hardest_pairs", "semihard_negatives", "sampled_negatives", "pair_distance", "pair_gradient")),
    Op(name="margin_loss", primitives=("sampled_negatives", "pair_distance", "pair_gradient")),
    Op(name="multi_similarity_loss", primitives=("similarity_statistics", "similarity_gradient")),
    Op(name="proxy_anchor_loss", primitives=("proxy_sums", "proxy_gradient")),
)}  # fmt: skip
