"""Multi-similarity loss on the CPU: what each anchor's terms need, and their gradient, block by
block.

Shapes: b local rows (rows offset..offset+b of the batch), B all rows, D width, r anchors of one
block, S the size of the largest class in it.  Definition: reference.multi_similarity_loss;
similarities are x_i · x_j. Negatives are the dense part of a block; positives are few and are
picked from it by number.
"""

import math

import torch
from torch import Tensor

from .blocks import Classes, block_rows, computed, row_blocks


def similarity_statistics(
    x_bD: Tensor,
    x_BD: Tensor,
    labels_b: Tensor,
    labels_B: Tensor,
    *,
    offset: int,
    alpha: float,
    beta: float,
    base: float,
    epsilon: float,
) -> Tensor:
    """(b, 4) for each anchor: the farthest positive's similarity (inf without one), the nearest
    negative's (-inf without one), log(1 + Σ exp(-α (S - base))) over mined positives, log(1 + Σ
    exp(β (S - base))) over negatives."""
    x_bD, x_BD = computed(x_bD, x_BD)
    classes = Classes(labels_b, labels_B)
    b, B = x_bD.shape[0], x_BD.shape[0]
    statistics_b4 = x_bD.new_empty(b, 4)
    buffer_rB = x_bD.new_empty(block_rows(b, B), B)
    for rows in row_blocks(b, B):
        S_rB = torch.mm(x_bD[rows], x_BD.T, out=buffer_rB[: rows.stop - rows.start])
        member_rS = classes.members(rows)
        positive_rS = _others(member_rS, rows, offset)
        S_rS = S_rB.gather(1, member_rS)
        farthest_r1 = S_rS.masked_fill(~positive_rS, math.inf).amin(1, keepdim=True)
        S_rB.scatter_(1, member_rS, -math.inf)
        nearest_r1 = S_rB.amax(1, keepdim=True)

        # The last member repeats as padding, and must count once.
        positive_rS[:, 1:] &= member_rS[:, 1:] != member_rS[:, :-1]
        mined_rS = positive_rS & (S_rS - epsilon < nearest_r1)
        attract_r = torch.logsumexp(
            (S_rS - base).mul_(-alpha).masked_fill_(~mined_rS, -math.inf), 1
        )

        # Shifted by the largest, so that no β overflows; threshold_ is far cheaper than a mask.
        reach_r1 = _reach(farthest_r1, epsilon)
        shift_r1 = nearest_r1.masked_fill(nearest_r1 == -math.inf, 0.0)
        torch.threshold_(S_rB.sub_(reach_r1), 0.0, -math.inf)
        repel_r = S_rB.add_(reach_r1 - shift_r1).mul_(beta).exp_().sum(1).log_()
        repel_r += beta * (shift_r1.squeeze(1) - base)

        zero = repel_r.new_zeros(())
        columns = (farthest_r1.squeeze(1), nearest_r1.squeeze(1))
        logs = (torch.logaddexp(attract_r, zero), torch.logaddexp(repel_r, zero))
        torch.stack([*columns, *logs], 1, out=statistics_b4[rows])
    return statistics_b4


def similarity_gradient(
    x_bD: Tensor,
    x_BD: Tensor,
    labels_b: Tensor,
    labels_B: Tensor,
    statistics_b4: Tensor,
    statistics_B4: Tensor,
    *,
    offset: int,
    alpha: float,
    beta: float,
    base: float,
    epsilon: float,
) -> Tensor:
    """Gradient (b, D) of Σ_i L_i over the whole batch for the local rows, as anchors and as
    candidates."""
    x_bD, x_BD = computed(x_bD, x_BD)
    classes = Classes(labels_b, labels_B)
    b, B = x_bD.shape[0], x_BD.shape[0]
    grad_bD = torch.empty_like(x_bD)
    reach_b, level_b = _repulsion(statistics_b4, beta=beta, base=base, epsilon=epsilon)
    reach_B, level_B = _repulsion(statistics_B4, beta=beta, base=base, epsilon=epsilon)
    buffers = x_bD.new_empty(2, block_rows(b, B), B)
    for rows in row_blocks(b, B):
        S_rB, W_rB = buffers[:, : rows.stop - rows.start]
        torch.mm(x_bD[rows], x_BD.T, out=S_rB)
        member_rS = classes.members(rows)
        positive_rS = _others(member_rS, rows, offset)
        S_rS = S_rB.gather(1, member_rS)

        # Every pair counts twice, once with either row as the anchor.
        torch.threshold_(torch.sub(S_rB, reach_b[rows, None], out=W_rB), 0.0, -math.inf)
        W_rB.mul_(beta).add_(level_b[rows, None]).exp_()
        torch.threshold_(S_rB.sub_(reach_B), 0.0, -math.inf)
        W_rB += S_rB.mul_(beta).add_(level_B).exp_()

        attract_rS = torch.zeros_like(S_rS)
        for _, nearest_rS, log_rS, _ in (
            statistics_b4[rows, None].unbind(2),
            statistics_B4[member_rS].unbind(2),
        ):
            mined_rS = positive_rS & (S_rS - epsilon < nearest_rS)
            attract_rS -= (
                ((S_rS - base) * -alpha - log_rS).masked_fill_(~mined_rS, -math.inf).exp_()
            )
        W_rB.scatter_(1, member_rS, attract_rS)
        torch.mm(W_rB, x_BD, out=grad_bD[rows])
    return grad_bD


def _others(member_rS: Tensor, rows: slice, offset: int) -> Tensor:
    """Which members are not the anchor itself, (r, S)."""
    return (
        member_rS != torch.arange(rows.start, rows.stop, device=member_rS.device)[:, None] + offset
    )


def _reach(farthest: Tensor, epsilon: float) -> Tensor:
    """Negatives above this similarity are mined; without a positive none is, and the number stays
    finite."""
    return (farthest - epsilon).clamp_max(torch.finfo(farthest.dtype).max)


def _repulsion(
    statistics_n4: Tensor, *, beta: float, base: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    """With T = S - reach, a mined negative's weight is exp(β T + level): (reach, level), each
    (n,)."""
    farthest_n, _, _, log_n = statistics_n4.unbind(1)
    level_n = beta * (farthest_n - epsilon - base) - log_n
    return _reach(farthest_n, epsilon), level_n.masked_fill_(farthest_n == math.inf, 0.0)
