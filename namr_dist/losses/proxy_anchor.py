"""Proxy-anchor loss of one rank's rows among all, with its learnt proxies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from namr_dist import kernels
from namr_dist.kernels import reference
from namr_dist.losses.registry import ProxyAnchorConfig
from namr_dist.losses.rows import Batches, Rows, RowsLoss, through_unit_rows, with_gradients


class ProxyAnchorRows(RowsLoss):
    """Proxy-anchor loss on unit vectors (Kim et al. 2020), one learnt proxy a training class.

    classes: number of training classes C; labels are 0..C-1.
    width: embedding width D.
    alpha: sharpness.
    margin: similarity gap δ.
    generator: draws the proxies' first values (None: torch's global generator).
    The proxies are the float32 parameter `proxies`, (C, D), kaiming-normal over the number of
    classes as in the published method; they are normalised in forward, and train with a learning
    rate of their own. Raises ValueError for fewer than one class or dimension; in forward for a
    label outside 0..C-1.
    """

    def __init__(
        self,
        *,
        classes: int,
        width: int,
        alpha: float = 32.0,
        margin: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if classes < 1 or width < 1:
            raise ValueError(f"classes and width must be at least 1, got {classes} and {width}")
        self.alpha = alpha
        self.margin = margin
        self.proxies = nn.Parameter(torch.empty(classes, width, dtype=torch.float32))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out", generator=generator)

    @classmethod
    def configured(cls, settings: ProxyAnchorConfig, batches: Batches) -> ProxyAnchorRows:
        """From loss.proxy_anchor, with a proxy for every training class."""
        return cls(
            classes=batches.classes,
            width=batches.width,
            alpha=settings.alpha,
            margin=settings.margin,
        )

    def forward(self, rows: Rows, *, seed: int) -> tuple[Tensor, Tensor]:
        """The batch's loss, carrying this rank's share of the gradient for the proxies, and its
        gradient for rows.z_bD, of any length. rows.labels_b: 0..C-1. seed: not used."""
        x_bD, proxies_CD = kernels.unit_rows(rows.z_bD), kernels.unit_rows(self.proxies)
        loss, grad_x_bD, grad_unit_CD = kernels.proxy_anchor_of_rows(
            x_bD,
            rows.labels_b,
            proxies_CD.detach(),
            gather=rows.gather_one,
            alpha=self.alpha,
            margin=self.margin,
            with_grad=True,
        )
        return with_gradients(loss, (proxies_CD, grad_unit_CD)), through_unit_rows(
            rows.z_bD, grad_x_bD
        )

    def definition(self, x_BD: Tensor, labels_B: Tensor, *, seed: int) -> Tensor:
        """Of rows and proxies at length 1; differentiable in the proxies too. seed: not used."""
        unit_BD, proxies_CD = (
            nn.functional.normalize(rows, dim=1) for rows in (x_BD, self.proxies)
        )
        return reference.proxy_anchor_loss(
            unit_BD, labels_B, proxies_CD, alpha=self.alpha, margin=self.margin
        )

    def extra_repr(self) -> str:
        """The settings, for repr()."""
        classes, width = self.proxies.shape
        return f"classes={classes}, width={width}, alpha={self.alpha}, margin={self.margin}"
