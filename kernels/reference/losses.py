"""The definition of every op of this package, in plain PyTorch.  Faster forms must agree with this
one.

Shapes: B rows of the global batch, N candidates, D embedding width, M clusters, C classes (one
proxy each), R the most positives any anchor has.
Memory rows: Q rows of earlier batches that a loss may be given besides (Wang et al. 2020).  The N =
B + Q candidates are the rows of the batch and, behind them, these, which are constants and never
anchors.
Dtypes: any floating dtype; half types are computed and returned in float32; float64 is the
yardstick. Gradients: autograd, first order.  At distance 0 and at the other kinks the subgradient
taken is 0.
Memory: O(B·N) forward and backward ((B, C) for proxies); never a (B, N, D) tensor.
Batches without any term (one class only, no positives) give 0 with a gradient of zeros.
Formulas: docs/algorithm.md.
"""

import math

import torch
from torch import Tensor

from ..checks import (
    check_centres,
    check_clusters,
    check_labels,
    check_memory,
    check_mining,
    check_proxies,
    check_proxy_labels,
    check_rows,
    check_same_shape,
    check_single,
)
from .mining import distance_weighted_negatives, pairs_of, semihard_negatives
from .pairs import (
    compute_dtype,
    inner_products,
    off_diagonal,
    pairwise_distance,
    pairwise_squared_distance,
    safe_sqrt,
)


def mean_pairwise_distance(z_BD: Tensor) -> Tensor:
    """mean over i != j of ‖z_i - z_j‖: a scalar; training divides z by it.

    Differentiable.  It is 0 when all rows are equal, so a caller that divides must guard against
    that. Raises ValueError unless z is a floating (B, D) with B >= 2.
    """
    check_rows("z", z_BD)
    B = z_BD.shape[0]
    return pairwise_distance(z_BD, z_BD).sum() / (B * (B - 1))


def nearest_centres(z_ND: Tensor, centres_MD: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest ‖z_i - c_m‖² of each row, ascending, and their centres' numbers, int64: (N, k)
    each.

    Ties go to the lowest number; NaN counts as the least, so that it comes out.  Differentiable in
    z and the centres through the distances.  Memory O(N·M).
    Raises ValueError for a wrong shape or dtype, or a k outside 1..M.
    """
    check_centres(z_ND, centres_MD, k)
    squared_NM = pairwise_squared_distance(z_ND, centres_MD)
    key_NM = squared_NM.detach()
    index_NK = key_NM.masked_fill(key_NM.isnan(), -math.inf).sort(dim=1, stable=True).indices[:, :k]
    return squared_NM.gather(1, index_NK), index_NK


def _with_memory(rows_B: Tensor, memory_Q: Tensor | None) -> Tensor:
    """The candidates (N, …): the batch's rows or labels and, behind them, the memory's as
    constants."""
    return rows_B if memory_Q is None else torch.cat([rows_B, memory_Q.detach()])


def _cluster_centres(
    z_BD: Tensor, z_ND: Tensor, *, clusters: int, spread: float, floor: float, statistics: str
) -> Tensor:
    """η_m from far (m = 1) to near (m = M): (M, 1, 1) per batch or (M, B, 1) per anchor, without
    gradient."""
    with torch.no_grad():
        # The zero diagonal takes part in both, as in the published M = 2 formulas.
        d_BN = pairwise_distance(z_BD, z_ND)
        over = (0, 1) if statistics == "batch" else (1,)
        mean = d_BN.mean(over, keepdim=True)
        deviation = d_BN.std(over, correction=1, keepdim=True)
        far = mean
        near = torch.maximum(floor * mean, mean - spread * deviation)
        return torch.stack([far - m / (clusters - 1) * (far - near) for m in range(clusters)])


def multi_cluster_ranking(
    z_BD: Tensor,
    s_BD: Tensor,
    *,
    clusters: int = 2,
    spread: float = 3.0,
    floor: float = 0.2,
    sharpness: float = 10.0,
    statistics: str = "batch",
    memory_QD: Tensor | None = None,
) -> Tensor:
    """L_mcr: pulls every adaptive distance D_ij towards the nearer ones of M ordered centres; no
    labels.

    z_BD: sample embeddings.  s_BD: structure embeddings, positive weights per dimension.  Returns a
    scalar. clusters M >= 2, spread t, floor φ in [0, 1], sharpness a: docs/algorithm.md,
    "Multi-cluster ranking".
    statistics: μ and σ over all B·N distances ("batch") or over each anchor's N distances
        ("anchor").
    memory_QD: memory rows; the mean is then over the B·(N - 1) pairs of an anchor and another row.
    The centres carry no gradient, the soft assignment p does.  M = 2 follows the NASA authors'
    published formulas; M > 2 is this project's reading of NAMR's abstract.
    Memory O(M·B·N).  All rows equal: loss 0, gradient 0.
    Raises ValueError for a wrong shape, dtype, B < 2, clusters < 2, a floor outside [0, 1], other
    statistics.
    """
    check_rows("z", z_BD)
    check_rows("s", s_BD)
    check_same_shape("z", z_BD, "s", s_BD)
    check_clusters(clusters=clusters, floor=floor, statistics=statistics)
    dtype = compute_dtype(z_BD, s_BD)
    z_BD, s_BD = z_BD.to(dtype), s_BD.to(dtype)
    check_memory(z_BD, memory_QD)
    z_ND = _with_memory(z_BD, memory_QD)
    centres = _cluster_centres(
        z_BD, z_ND, clusters=clusters, spread=spread, floor=floor, statistics=statistics
    )
    D_BN = pairwise_distance(z_BD, z_ND, s_BD)
    r_MBN = (D_BN - centres).abs()
    p_MBN = torch.softmax(-sharpness * (clusters - 1) * r_MBN, dim=0)
    loss_BN = (p_MBN * r_MBN).sum(0)
    B, N = loss_BN.shape
    # Masked rather than subtracted: the diagonal's own terms are as large as any other pair's.
    return loss_BN.where(off_diagonal(B, z_BD.device, candidates=N), 0.0).sum() / (B * (N - 1))


def triplet_loss(
    z_BD: Tensor,
    labels_B: Tensor,
    *,
    margin: float = 0.2,
    mining: str = "semihard",
    seed: int = 0,
    memory_QD: Tensor | None = None,
    memory_labels_Q: Tensor | None = None,
) -> Tensor:
    """mean of max(0, ‖z_a - z_p‖ - ‖z_a - z_n‖ + margin) over the mined triplets, zeros included; a
    scalar.

    z_BD: embeddings, taken as they are (training scales them first).  labels_B: integers.
    mining, over anchors with at least one positive and one negative:
      "semihard"           for every (a, p) the nearest n strictly farther than p; without one, the
                           nearest n
      "hardest"            one triplet an anchor: its farthest p, its nearest n
      "distance_weighted"  for every (a, p) one n drawn as in Wu et al. 2017; seed picks the draw
    Ties go to the lowest row number.  seed is read by "distance_weighted" only; equal seeds give
    equal draws.
    memory_QD, memory_labels_Q: memory rows, in which positives and negatives are found as in the
    batch. Raises ValueError for a wrong shape, dtype, B < 2, unknown mining.
    """
    check_rows("z", z_BD)
    check_labels(labels_B, z_BD)
    check_mining(mining)
    check_memory(z_BD, memory_QD, memory_labels_Q)
    z_ND = _with_memory(z_BD, memory_QD)
    squared_BN = pairwise_squared_distance(z_BD, z_ND)
    d_BN = safe_sqrt(squared_BN)
    squared_BN = squared_BN.detach()
    pairs = pairs_of(labels_B, _with_memory(labels_B, memory_labels_Q))
    if mining == "hardest":
        # -1 lies below every squared distance, inf above.
        positive = squared_BN.masked_fill(~pairs.same_BN, -1.0).argmax(1, keepdim=True)
        negative = squared_BN.masked_fill(~pairs.differ_BN, math.inf).argmin(1, keepdim=True)
        valid = (pairs.same_BN.any(1) & pairs.differ_BN.any(1))[:, None]
    else:
        positive, valid = pairs.positive_BR, pairs.valid_BR
        if mining == "semihard":
            negative = semihard_negatives(squared_BN, pairs)
        else:
            negative = distance_weighted_negatives(z_BD, pairs, z_ND, seed=seed)
    violation = torch.relu(d_BN.gather(1, positive) - d_BN.gather(1, negative) + margin)
    return violation.where(valid, 0.0).sum() / valid.sum().clamp_min(1)


def margin_loss(
    x_BD: Tensor,
    labels_B: Tensor,
    *,
    beta: Tensor,
    alpha: float = 0.2,
    seed: int = 0,
    memory_QD: Tensor | None = None,
    memory_labels_Q: Tensor | None = None,
) -> Tensor:
    """Margin loss (Wu et al. 2017): positives within beta - alpha, negatives beyond beta + alpha; a
    scalar.

        Σ [max(0, d_ap - β + α) + max(0, β - d_an + α)] / max(1, number of non-zero summands)

    over every (anchor, positive) pair and its one distance-weighted negative, drawn as in
    `triplet_loss`.
    x_BD: rows of unit length.  labels_B: integers.  beta: one number in a tensor; it receives a
        gradient.
    memory_QD, memory_labels_Q: memory rows of unit length, in which positives and negatives are
    found too. Raises ValueError for a wrong shape, dtype, B < 2, or a beta of more than one
    element.
    """
    check_rows("x", x_BD)
    check_labels(labels_B, x_BD)
    check_single("beta", beta)
    check_memory(x_BD, memory_QD, memory_labels_Q)
    x_ND = _with_memory(x_BD, memory_QD)
    d_BN = pairwise_distance(x_BD, x_ND)
    beta = beta.reshape(()).to(d_BN.dtype)
    pairs = pairs_of(labels_B, _with_memory(labels_B, memory_labels_Q))
    negative_BR = distance_weighted_negatives(x_BD, pairs, x_ND, seed=seed)
    too_far_BR = torch.relu(d_BN.gather(1, pairs.positive_BR) - beta + alpha).where(
        pairs.valid_BR, 0.0
    )
    too_near_BR = torch.relu(beta - d_BN.gather(1, negative_BR) + alpha).where(pairs.valid_BR, 0.0)
    active = (too_far_BR > 0).sum() + (too_near_BR > 0).sum()
    return (too_far_BR + too_near_BR).sum() / active.clamp_min(1)


def _log_one_plus_sum_exp(exponents: Tensor, chosen: Tensor, *, dim: int) -> Tensor:
    """log(1 + Σ exp(e)) along dim over the chosen entries; none chosen gives 0 with gradient 0."""
    kept = exponents.masked_fill(~chosen, -math.inf)
    # The 1 enters as one more exponent 0: exact in any range, and never a row of -inf alone.
    one = torch.zeros_like(kept.narrow(dim, 0, 1))
    return torch.logsumexp(torch.cat([kept, one], dim), dim)


def multi_similarity_loss(
    x_BD: Tensor,
    labels_B: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float = 0.1,
    memory_QD: Tensor | None = None,
    memory_labels_Q: Tensor | None = None,
) -> Tensor:
    """Multi-similarity loss with its pair mining (Wang et al. 2019), a mean over all B anchors; a
    scalar.

        mined positives P_i:  S_ip - ε < max over negatives of S_in
        mined negatives N_i:  S_in + ε > min over positives of S_ip
        L_i = 1/α · log(1 + Σ_{P_i} exp(-α (S_ip - base))) + 1/β · log(1 + Σ_{N_i} exp(β (S_in -
        base)))

    x_BD: rows of unit length, S_ij = x_i · x_j.  labels_B: integers.  `base` is the λ of
        docs/algorithm.md.
    memory_QD, memory_labels_Q: memory rows of unit length, in which positives and negatives are
    found too. An anchor without a positive or without a negative selects nothing and counts 0 in
    the mean.
    Raises ValueError for a wrong shape, dtype, B < 2.
    """
    check_rows("x", x_BD)
    check_labels(labels_B, x_BD)
    check_memory(x_BD, memory_QD, memory_labels_Q)
    x_BD = x_BD.to(compute_dtype(x_BD))
    similarity_BN = inner_products(x_BD, _with_memory(x_BD, memory_QD).to(x_BD.dtype))
    pairs = pairs_of(labels_B, _with_memory(labels_B, memory_labels_Q))
    seen_BN = similarity_BN.detach()
    nearest_negative_B1 = seen_BN.masked_fill(~pairs.differ_BN, -math.inf).amax(1, keepdim=True)
    farthest_positive_B1 = seen_BN.masked_fill(~pairs.same_BN, math.inf).amin(1, keepdim=True)
    positive_BN = pairs.same_BN & (seen_BN - epsilon < nearest_negative_B1)
    negative_BN = pairs.differ_BN & (seen_BN + epsilon > farthest_positive_B1)
    attract_B = _log_one_plus_sum_exp(-alpha * (similarity_BN - base), positive_BN, dim=1) / alpha
    repel_B = _log_one_plus_sum_exp(beta * (similarity_BN - base), negative_BN, dim=1) / beta
    return (attract_B + repel_B).mean()


def proxy_anchor_loss(
    x_BD: Tensor, labels_B: Tensor, proxies_CD: Tensor, *, alpha: float = 32.0, margin: float = 0.1
) -> Tensor:
    """Proxy-anchor loss (Kim et al. 2020); a scalar.  Each proxy is an anchor of the whole batch.

        1/|P⁺| Σ_{p in P⁺} log(1 + Σ_{x of class p} exp(-α (S_xp - δ)))
        + 1/C  Σ_p         log(1 + Σ_{x of other classes} exp(α (S_xp + δ)))

    x_BD and proxies_CD: unit rows, S_xp = x · p.  P⁺: proxies whose class is in the batch.  δ:
    margin.
    labels_B: integers in 0..C-1, a row of proxies_CD each.  Memory O(B·C).
    Raises ValueError for a wrong shape, dtype, B < 2, or a label without a proxy.
    """
    check_rows("x", x_BD)
    check_labels(labels_B, x_BD)
    check_proxies(proxies_CD, x_BD)
    C = proxies_CD.shape[0]
    check_proxy_labels(labels_B, C)
    dtype = compute_dtype(x_BD, proxies_CD)
    similarity_BC = inner_products(x_BD.to(dtype), proxies_CD.to(dtype))
    own_BC = labels_B[:, None] == torch.arange(C, device=labels_B.device)
    attract_C = _log_one_plus_sum_exp(-alpha * (similarity_BC - margin), own_BC, dim=0)
    repel_C = _log_one_plus_sum_exp(alpha * (similarity_BC + margin), ~own_BC, dim=0)
    # Proxies of absent classes have attract 0, so the sum over P⁺ is the sum over all.
    return attract_C.sum() / own_BC.any(0).sum() + repel_C.sum() / C
