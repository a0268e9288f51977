"""Cluster centres that are learnt with the embeddings, without labels. Formulas:
docs/algorithm.md, "Learnt centres".

Shapes: b rows of this rank, B rows of all ranks, M centres, D width, k nearest centres.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from namr_dist import kernels
from namr_dist.kernels import reference
from namr_dist.kernels.reference.pairs import (
    inner_products,
    pairwise_squared_distance,
    safe_sqrt,
)
from namr_dist.losses.rows import Rows, scaled_rows, through_unit_rows, with_gradients

CentresObjective = Literal["soft_k_means", "views", "ranking"]

UNSEEN = 20
"""A centre is dead once UNSEEN · M rows have gone by of which none was nearest to it: with clusters
of equal size, it would have been the nearest of 20."""


class LearntCentres(nn.Module):
    """M centres among the rows û, which are z as it is searched, divided by the batch's mean
    pairwise distance; and the loss that they are learnt by.

    centres: M.  width: D.
    unit: û is made of z / ‖z‖, for a search by cosine.
    objective: "soft_k_means": a row's mean squared distance to the centres, weighted by its soft
        assignment; "views": two views of an image must order the centres alike; "ranking": L_mcr,
        with the k nearest centres as candidates.
    pull: share of the loss's gradient that reaches z; 0: the centres follow z, and z knows nothing
        of them.
    sharpness: κ, of the assignment, in units of an inverse squared mean distance.
    nearest: k, at most M.  clusters, spread, floor, rank_sharpness: as in multi-cluster ranking.

    A call in training mode is a step: the first M rows that are seen become the centres (until
    there are so many, loss and gradients are 0), and a centre that has long been no row's nearest
    (UNSEEN) takes the place of a row that is farthest from all centres. The loss is that of the
    centres before. All of it depends on the rows of the global batch alone, so it is the same on
    all ranks and on any number of them.

    A centre is `base_MD + moves / √D`: where it was put, a buffer, and how far it has been moved
    since, the parameter. So ZeRO may partition the parameter, which only the optimizer writes, and
    an update of Adam at learning rate r moves a centre by about r mean distances, whatever D.
    Buffers hold the rest of the state, so a checkpoint does.

    In one process, with an optimizer over `loss.parameters()`:

        value, grad_BD = loss(all_rows(z_BD.detach(), labels_B), index_B)
        with_gradients(value, (z_BD, grad_BD), (value, torch.ones_like(value))).backward()

    or `loss(…)[0].backward()` where z is fixed. Labels are not read, index_B by "views" alone.
    Raises ValueError for an unknown objective, fewer than one centre or neighbour, a sharpness that
    is not above 0, and what multi-cluster ranking refuses.
    """

    base_MD: Tensor
    unseen_M: Tensor
    taken: Tensor

    def __init__(
        self,
        *,
        centres: int,
        width: int,
        unit: bool,
        objective: CentresObjective = "soft_k_means",
        pull: float = 0.0,
        sharpness: float = 20.0,
        nearest: int = 5,
        clusters: int = 2,
        spread: float = 3.0,
        floor: float = 0.2,
        rank_sharpness: float = 10.0,
    ) -> None:
        super().__init__()
        if objective not in get_args(CentresObjective):
            raise ValueError(
                f"objective is {objective!r}, expected one of {', '.join(get_args(CentresObjective))}"
            )
        if centres < 1 or nearest < 1:
            raise ValueError(f"centres and nearest must be at least 1, got {centres} and {nearest}")
        if not sharpness > 0:
            raise ValueError(f"sharpness must be above 0, got {sharpness}")
        kernels.check_clusters(clusters=clusters, floor=floor, statistics="batch")
        self.objective = objective
        self.unit = unit
        self.pull = pull
        self.sharpness = sharpness
        self.nearest = min(nearest, centres)
        self.clusters = clusters
        self.spread = spread
        self.floor = floor
        self.rank_sharpness = rank_sharpness
        self.moves = nn.Parameter(torch.zeros(centres, width))
        self.register_buffer("base_MD", torch.zeros(centres, width))
        # Rows that have gone by since a row was nearest to each, and rows since the start.
        self.register_buffer("unseen_M", torch.zeros(centres, dtype=torch.int64))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))

    def centres(self, moves: Tensor) -> Tensor:
        """The centres (M, D) in units of the mean pairwise distance. moves: the whole parameter of
        that name, wherever it has been gathered."""
        return self.base_MD + moves.detach() / math.sqrt(moves.shape[1])

    def forward(self, rows: Rows, index_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss of the batch, carrying this rank's share of the gradient for `moves`, and `pull`
        times its gradient for rows.z_bD, (b, D).

        rows: of a batch, without those of a memory, at any scale. index_B: which image each row of
        all ranks is of; "views" needs it, and raises ValueError without.
        """
        searched = rows.unit() if self.unit else rows
        scaled = scaled_rows(searched, batch=len(searched.z_ND))
        x = scaled.rows
        if self.training:
            self._take_first(x.z_ND)
        with torch.enable_grad():
            x_bD = x.z_bD.detach().requires_grad_()
            centres_MD = self.centres(self.moves).requires_grad_()
            share, squared_b, index_b = self._share(x, x_bD, centres_MD, index_B)
            grad_x_bD, grad_MD = torch.autograd.grad(share, (x_bD, centres_MD))
        ready = self.taken >= len(self.base_MD)
        loss = rows.gather_one(share.detach()[None]).sum()
        loss, grad_x_bD, grad_MD = (value.where(ready, 0.0) for value in (loss, grad_x_bD, grad_MD))
        grad_z_bD = torch.zeros_like(rows.z_bD)
        if self.pull:
            grad_z_bD = self.pull * scaled.through(grad_x_bD)
            if self.unit:
                grad_z_bD = through_unit_rows(rows.z_bD, grad_z_bD)
        if self.training:
            self._replace_dead(x, squared_b, index_b, ready)
        grad_moves_MD = grad_MD / math.sqrt(grad_MD.shape[1])
        return with_gradients(loss, (self.moves, grad_moves_MD)), grad_z_bD

    def definition(self, z_BD: Tensor, index_B: Tensor | None = None) -> Tensor:
        """The loss of a whole batch, of differences and differentiable by autograd in z, whatever
        `pull`, and in `moves`; for checks. Call it before a step: it changes nothing."""
        u_BD = nn.functional.normalize(z_BD, dim=1) if self.unit else z_BD
        x_BD = u_BD / reference.mean_pairwise_distance(u_BD)
        centres_MD = self.base_MD + self.moves / math.sqrt(self.moves.shape[1])
        squared_BM = pairwise_squared_distance(x_BD, centres_MD)
        if self.objective == "soft_k_means":
            return (torch.softmax(-self.sharpness * squared_BM, 1) * squared_BM).sum(1).mean()
        if self.objective == "views":
            q_BM = torch.softmax(-self.sharpness * squared_BM, 1)
            images = _checked(index_B).tolist()
            terms = []
            for row, image in enumerate(images):
                views = [other for other, its in enumerate(images) if its == image]
                other = views[(views.index(row) + 1) % len(views)]
                if other != row:
                    one_M, other_M = q_BM[row], q_BM[other]
                    terms.append((one_M * (one_M / other_M).log()).sum())
                    terms.append((other_M * (other_M / one_M).log()).sum())
            return torch.stack(terms).sum() / max(1, len(terms) // 2) if terms else 0 * z_BD.sum()
        d_Bk = safe_sqrt(squared_BM.sort(dim=1).values[:, : self.nearest])
        r_mBk = torch.stack([(d_Bk - eta).abs() for eta in self._thresholds(d_Bk.detach())])
        p_mBk = torch.softmax(-self.rank_sharpness * (self.clusters - 1) * r_mBk, 0)
        return (p_mBk * r_mBk).sum(0).mean()

    def _share(
        self, x: Rows, x_bD: Tensor, centres_MD: Tensor, index_B: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's part of the loss; each row's squared distance to its nearest centre, and
        which that is."""
        if self.objective == "ranking":
            squared_bk, index_bk = kernels.nearest_centres(x_bD, centres_MD, k=self.nearest)
            return self._ranking(x, squared_bk), squared_bk.detach()[:, 0], index_bk[:, 0]
        squared_bM = _squared(x_bD, centres_MD)
        if self.objective == "views":
            share = self._views(x, squared_bM, centres_MD, _checked(index_B))
        else:
            p_bM = torch.softmax(-self.sharpness * squared_bM, dim=1)
            share = (p_bM * squared_bM).sum() / len(x.z_ND)
        return share, *squared_bM.detach().min(dim=1)

    def _views(self, x: Rows, squared_bM: Tensor, centres_MD: Tensor, index_B: Tensor) -> Tensor:
        log_q_bM = torch.log_softmax(-self.sharpness * squared_bM, dim=1)
        next_B, last_B = _other_views(index_B)
        pairs = (next_B != torch.arange(len(next_B), device=next_B.device)).sum().clamp_min(1)
        own = slice(x.offset, x.offset + len(log_q_bM))
        total = log_q_bM.new_zeros(())
        for other_b in (next_B[own], last_B[own]):
            with torch.no_grad():
                squared_other_bM = _squared(x.z_ND[other_b], centres_MD)
                log_other_bM = torch.log_softmax(-self.sharpness * squared_other_bM, dim=1)
            difference_bM = log_q_bM - log_other_bM
            total = total + ((log_q_bM.exp() - log_other_bM.exp()) * difference_bM).sum()
        # Each pair is met from either side: half of its value, but all of what reaches the gradient
        # by way of that side.
        return (total - total.detach() / 2) / pairs

    def _ranking(self, x: Rows, squared_bk: Tensor) -> Tensor:
        d_bk = safe_sqrt(squared_bk)
        r_bkm = (d_bk[:, :, None] - self._thresholds(x.gather(d_bk.detach()))).abs()
        p_bkm = torch.softmax(-self.rank_sharpness * (self.clusters - 1) * r_bkm, dim=2)
        return (p_bkm * r_bkm).sum() / (len(x.z_ND) * self.nearest)

    def _thresholds(self, d_Bk: Tensor) -> Tensor:
        """η of multi-cluster ranking, the farthest first, from the distances of all rows to their
        nearest centres."""
        far, deviation = d_Bk.mean(), d_Bk.std()
        near = torch.maximum(self.floor * far, far - self.spread * deviation)
        step_m = torch.arange(self.clusters, dtype=d_Bk.dtype, device=d_Bk.device)
        return far - step_m / (self.clusters - 1) * (far - near)

    @torch.no_grad()
    def _take_first(self, x_BD: Tensor) -> None:
        """The first M rows of all steps become the centres, in their order. No GPU is waited
        for."""
        B = len(x_BD)
        row_M = torch.arange(len(self.base_MD), device=x_BD.device) - self.taken
        self._put((row_M >= 0) & (row_M < B), x_BD[row_M.clamp(0, B - 1)])
        self.taken += B

    @torch.no_grad()
    def _replace_dead(self, x: Rows, squared_b: Tensor, index_b: Tensor, ready: Tensor) -> None:
        """Put dead centres where the rows are that lie farthest from all, as many as there are of
        these. Ranks exchange two numbers a row; no GPU is waited for."""
        B, M = len(x.z_ND), len(self.base_MD)
        # Together: a float holds the number of any centre exactly.
        nearest_B2 = x.gather(torch.stack([squared_b, index_b.to(squared_b.dtype)], dim=1))
        seen_M = torch.zeros_like(self.unseen_M, dtype=torch.bool)
        seen_M.index_fill_(0, nearest_B2[:, 1].long(), True)
        unseen_M = (self.unseen_M + B).masked_fill_(seen_M | ~ready, 0)
        dead_M = unseen_M >= UNSEEN * M
        turn_M = dead_M.cumsum(0) - 1
        replaced_M = dead_M & (turn_M < B)
        farthest_B = nearest_B2[:, 0].argsort(descending=True, stable=True)
        self._put(replaced_M, x.z_ND[farthest_B[turn_M.clamp(0, B - 1)]])
        self.unseen_M.copy_(unseen_M.masked_fill_(replaced_M, 0))

    def _put(self, chosen_M: Tensor, rows_MD: Tensor) -> None:
        """Make the chosen centres these rows."""
        moved_MD = rows_MD - (self.centres(self.moves) - self.base_MD)
        self.base_MD.copy_(moved_MD.where(chosen_M[:, None], self.base_MD))

    def extra_repr(self) -> str:
        """The settings, for repr()."""
        M, D = self.base_MD.shape
        return (
            f"centres={M}, width={D}, unit={self.unit}, objective={self.objective!r}, "
            f"pull={self.pull}, sharpness={self.sharpness}, nearest={self.nearest}, "
            f"clusters={self.clusters}, spread={self.spread}, floor={self.floor}, "
            f"rank_sharpness={self.rank_sharpness}"
        )


def _squared(x_bD: Tensor, centres_MD: Tensor) -> Tensor:
    """(b, M) squared distances, as a product: from the centres' mean, so that little cancels."""
    origin_D = centres_MD.detach().mean(dim=0)
    x_bD, centres_MD = x_bD - origin_D, centres_MD - origin_D
    product_bM = inner_products(x_bD, centres_MD)
    return x_bD.square().sum(dim=1, keepdim=True) - 2 * product_bM + centres_MD.square().sum(dim=1)


def _other_views(index_B: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) the next row of the same image, the first after the last, and (B,) the one before; a row
    without another is its own."""
    sorted_B, order_B = index_B.sort(stable=True)
    place_B = torch.arange(len(index_B), device=index_B.device)
    first_B = torch.searchsorted(sorted_B, sorted_B)
    end_B = torch.searchsorted(sorted_B, sorted_B, right=True)
    next_B = torch.where(place_B + 1 == end_B, first_B, place_B + 1)
    last_B = torch.where(place_B == first_B, end_B - 1, place_B - 1)
    found_2B = torch.empty_like(torch.stack([order_B, order_B]))
    found_2B[:, order_B] = order_B[torch.stack([next_B, last_B])]
    return found_2B[0], found_2B[1]


def _checked(index_B: Tensor | None) -> Tensor:
    if index_B is None:
        raise ValueError("index_B is missing: pass which image each row is of, to find its views")
    return index_B
