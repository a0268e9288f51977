"""Multi-cluster ranking on the CPU: values and gradients in one sweep over blocks of anchors.

Shapes: b local rows, B rows of the batch, N candidates, D width, M clusters, r anchors of one
block, C the candidates of a sweep that receive a gradient.
Formulas: docs/algorithm.md, "Multi-cluster ranking"; blocks.py for the distances.
"""

import torch
from torch import Tensor

from ..centre import centre_of
from .blocks import SquaredDistances, computed


def ranking(
    z_bD: Tensor,
    s_bD: Tensor,
    z_ND: Tensor,
    s_BD: Tensor,
    far_B: Tensor,
    step_B: Tensor,
    *,
    offset: int,
    clusters: int,
    sharpness: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """loss_b, one sum over j ≠ i per local anchor, and the gradients of the whole batch's sum for
    local z and s.

    Centres of anchor i: far_i - m·step_i, m = 0..M-1.  The gradients are None without with_grad.
    z_ND: the B anchors first; what follows is constant.
    """
    dtype = computed(z_ND, s_BD)[0].dtype
    z_bD, s_bD, z_ND, s_BD, far_B, step_B = (
        t.to(dtype) for t in (z_bD, s_bD, z_ND, s_BD, far_B, step_B)
    )
    b, B = z_bD.shape[0], s_BD.shape[0]
    centre_D = centre_of(z_ND)
    local = slice(offset, offset + b)
    kappa = sharpness * (clusters - 1)

    distances = SquaredDistances(z_bD, z_ND, s_bD, centre_D=centre_D)
    whole = b == B
    sweep = _Sweep(distances, s_bD, far_B[local], step_B[local], offset=offset, clusters=clusters, kappa=kappa,
                   same_rows=whole)  # fmt: skip
    loss_b = sweep.run(anchors=with_grad, candidates=with_grad and whole)
    if not with_grad:
        return loss_b, None, None
    grad_z_bD, grad_s_bD = sweep.grad_anchors_bD, sweep.grad_weights_bD
    if whole or b == 0:
        return loss_b, grad_z_bD, grad_s_bD
    # The local rows as candidates of everybody.
    distances = SquaredDistances(z_ND[:B], z_bD, s_BD, centre_D=centre_D)
    sweep = _Sweep(
        distances,
        s_BD,
        far_B,
        step_B,
        offset=-offset,
        clusters=clusters,
        kappa=kappa,
        same_rows=False,
    )
    sweep.run(anchors=False, candidates=True)
    return loss_b, grad_z_bD.add_(sweep.grad_candidates_CD), grad_s_bD


class _Sweep:
    """One pass over all (anchor, candidate) pairs, with the gradients for either side of them."""

    def __init__(
        self,
        distances: SquaredDistances,
        s_bD: Tensor,
        far_b: Tensor,
        step_b: Tensor,
        *,
        offset: int,
        clusters: int,
        kappa: float,
        same_rows: bool,
    ):
        """same_rows: the anchors are the first candidates, both sides of theirs add up in one
        gradient, and further candidates have none."""
        self.distances, self.s_bD, self.far_b, self.step_b = distances, s_bD, far_b, step_b
        self.offset, self.clusters, self.kappa = offset, clusters, kappa
        self.grad_anchors_bD = torch.zeros_like(distances.z_bD)
        self.grad_weights_bD = torch.zeros_like(distances.z_bD)
        self.grad_candidates_CD = (
            self.grad_anchors_bD if same_rows else torch.zeros_like(distances.z_BD)
        )

    def run(self, *, anchors: bool, candidates: bool) -> Tensor:
        """loss_b; fills grad_anchors and grad_weights, or grad_candidates, or both."""
        distances = self.distances
        loss_b = torch.empty_like(distances.norm_b)
        C, D = self.grad_candidates_CD.shape
        pulled_CK = torch.zeros_like(distances.right_BK[:C])
        form = _two_clusters if self.clusters == 2 else _clusters
        buffers = [
            torch.empty_like(distances._buffer_rB) for _ in range(4 if self.clusters == 2 else 8)
        ]
        for rows in distances.blocks():
            squared_rN, (row_P, column_P) = distances.squared(rows, offset=self.offset)
            D_rN = squared_rN.sqrt_()
            own = rows.start + self.offset
            loss_r, W_rN = form(
                D_rN,
                self.far_b[rows, None],
                self.step_b[rows, None],
                [buffer_rN[: D_rN.shape[0]] for buffer_rN in buffers],
                own=own,
                clusters=self.clusters,
                kappa=self.kappa,
            )
            loss_b[rows] = loss_r
            if not (anchors or candidates):
                continue
            # W = (d loss / dD) / D
            W_rN.div_(D_rN)
            W_rN.diagonal(own).zero_()
            if distances.largest == 0:
                # All candidates are the centre, and so are these anchors: distances 0 that need no
                # mending.
                W_rN[distances.norm_b[rows] == 0] = 0.0
            if row_P.numel():
                W_P = W_rN[row_P, column_P].masked_fill_(D_rN[row_P, column_P] == 0, 0.0)
                W_rN[row_P, column_P] = 0.0
                self._add_near(
                    row_P + rows.start, column_P, W_P, anchors=anchors, candidates=candidates
                )
            if anchors:
                self._add_anchors(rows, W_rN)
            if candidates:
                pulled_CK.addmm_(W_rN[:, :C].T, distances.left_bK[rows])
        if candidates:
            # left is [s, -2 s∘z]: Σ W s beside -2 Σ W s∘z
            self.grad_candidates_CD.addcmul_(distances.z_BD[:C], pulled_CK[:, :D]).add_(
                pulled_CK[:, D:], alpha=0.5
            )
        return loss_b

    def _add_anchors(self, rows: slice, W_rN: Tensor) -> None:
        distances = self.distances
        z_rD, D = distances.z_bD[rows], distances.z_bD.shape[1]
        # right is [z∘z, z]
        pulled_rK = W_rN @ distances.right_BK
        square_rD, linear_rD = pulled_rK[:, :D], pulled_rK[:, D:]
        apart_rD = z_rD * W_rN.sum(1, keepdim=True) - linear_rD  # Σ W (z_i - z_j)
        self.grad_anchors_bD[rows].addcmul_(self.s_bD[rows], apart_rD)
        self.grad_weights_bD[rows].add_(z_rD * (apart_rD - linear_rD) + square_rD, alpha=0.5)

    def _add_near(
        self, anchor_P: Tensor, candidate_P: Tensor, W_P: Tensor, *, anchors: bool, candidates: bool
    ) -> None:
        """Near-duplicates would cancel in the products over W; they come from the differences
        instead."""
        for part, diff_PD in self.distances.differences(anchor_P, candidate_P):
            pull_PD = diff_PD * W_P[part, None]
            if anchors:
                self.grad_weights_bD.index_add_(0, anchor_P[part], pull_PD * diff_PD, alpha=0.5)
            pull_PD *= self.s_bD[anchor_P[part]]
            if anchors:
                self.grad_anchors_bD.index_add_(0, anchor_P[part], pull_PD)
            if candidates:
                other_P = candidate_P[part]
                C, N = self.grad_candidates_CD.shape[0], self.distances.z_BD.shape[0]
                if C < N:
                    other_P, pull_PD = other_P[other_P < C], pull_PD[other_P < C]
                self.grad_candidates_CD.index_add_(0, other_P, pull_PD, alpha=-1.0)


def _two_clusters(
    D_rN: Tensor,
    far_r1: Tensor,
    step_r1: Tensor,
    buffers: list[Tensor],
    *,
    own: int,
    clusters: int,
    kappa: float,
) -> tuple[Tensor, Tensor]:
    """Σ_j loss_ij (r,) and d loss / dD (r, N) for M = 2.

    With v = D - (η_far + η_near)/2, h = (η_far - η_near)/2, v' = v held within ±h, w = v - v', and
    t = tanh(κ v'), the softmax over two is a sigmoid and
        loss = h + |w| - v' t,     d loss / dD = -(t + κ v' (1 - t²)), outside ±h instead sign(w).
    """
    t_rN, inner_rN, outer_rN, product_rN = buffers
    half_r1 = step_r1.abs() / 2
    v_rN = torch.sub(D_rN, far_r1 - step_r1 / 2, out=outer_rN)
    torch.maximum(v_rN, -half_r1, out=inner_rN)
    torch.minimum(inner_rN, half_r1, out=inner_rN)
    outer_rN.sub_(inner_rN)
    # tanh(x) = 2 sigmoid(2x) - 1, and torch's sigmoid is three times as fast.
    torch.mul(inner_rN, 2 * kappa, out=t_rN).sigmoid_().mul_(2.0).sub_(1.0)
    torch.mul(inner_rN, t_rN, out=product_rN)

    outer_rN.diagonal(own).zero_()
    product_rN.diagonal(own).zero_()
    # d loss / dD; beyond ±h the inner part stays at its value there, `edge`, and is taken back.
    edge_r1 = torch.tanh(kappa * half_r1)
    edge_r1 = edge_r1 + kappa * half_r1 * (1 - edge_r1.square())
    loss_r = outer_rN.abs().sum(1) - product_rN.sum(1)
    pairs_r = torch.full_like(loss_r, D_rN.shape[1])
    pairs_r[max(0, -own) : max(0, D_rN.shape[1] - own)] -= 1
    loss_r += pairs_r * half_r1.squeeze(1)
    inner_rN.addcmul_(product_rN, t_rN, value=-1.0)
    slope_rN = outer_rN.sign_().mul_(1 + edge_r1).sub_(t_rN).sub_(inner_rN, alpha=kappa)
    return loss_r, slope_rN


def _clusters(
    D_rN: Tensor,
    far_r1: Tensor,
    step_r1: Tensor,
    buffers: list[Tensor],
    *,
    own: int,
    clusters: int,
    kappa: float,
) -> tuple[Tensor, Tensor]:
    """The same for any M: with e_m = exp(-κ (r_m - min r)), y_m = D - η_m, r_m = |y_m|,

    f = Σ e r / Σ e = loss,        d loss / dD = Σ p sign(y) (1 + κ f) - κ Σ p y
    """
    nearest_rN, total_rN, loss_rN, sign_rN, signed_rN, y_rN, e_rN, r_rN = buffers
    nearest_rN.fill_(torch.inf)
    for m in range(clusters):
        torch.sub(D_rN, far_r1 - m * step_r1, out=y_rN)
        torch.minimum(nearest_rN, y_rN.abs_(), out=nearest_rN)
    for sums_rN in (total_rN, loss_rN, sign_rN, signed_rN):
        sums_rN.zero_()
    for m in range(clusters):
        torch.sub(D_rN, far_r1 - m * step_r1, out=y_rN)
        torch.abs(y_rN, out=r_rN)
        torch.sub(r_rN, nearest_rN, out=e_rN).mul_(-kappa).exp_()
        total_rN += e_rN
        loss_rN.addcmul_(e_rN, r_rN)
        signed_rN.addcmul_(e_rN, y_rN)
        sign_rN.addcmul_(e_rN, y_rN.sign_())
    loss_rN /= total_rN
    sign_rN.mul_(torch.mul(loss_rN, kappa, out=e_rN).add_(1.0)).sub_(signed_rN, alpha=kappa).div_(
        total_rN
    )
    loss_rN.diagonal(own).zero_()
    return loss_rN.sum(1), sign_rN
