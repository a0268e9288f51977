"""The losses' primitives on the CPU: plain functions of tensors in blocked PyTorch, without
autograd.

Callers run them under torch.no_grad and with autocast off.  No function ever holds a (b, B) tensor,
and each gives the same bits every time.  Their GPU counterparts have the same names and signatures.
"""

from .distances import distance_sum_gradient, row_moments
from .mining import hardest_pairs, sampled_negatives, semihard_negatives
from .multi_cluster import ranking
from .multi_similarity import similarity_gradient, similarity_statistics
from .nearest import k_nearest, k_nearest_gradient
from .pairs import pair_distance, pair_gradient
from .proxy_anchor import proxy_gradient, proxy_sums

__all__ = [
    "distance_sum_gradient",
    "hardest_pairs",
    "k_nearest",
    "k_nearest_gradient",
    "pair_distance",
    "pair_gradient",
    "proxy_gradient",
    "proxy_sums",
    "ranking",
    "row_moments",
    "sampled_negatives",
    "semihard_negatives",
    "similarity_gradient",
    "similarity_statistics",
]
