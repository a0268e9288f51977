"""Proxy-anchor loss as a module, with its learnt proxies."""

import torch
from torch import Tensor, nn

from namr_dist import kernels


class ProxyAnchorLoss(nn.Module):
    """Proxy-anchor loss on unit vectors (Kim et al. 2020), one learnt proxy a training class.

    classes: number of training classes C; labels are 0..C-1.
    width: embedding width D.
    alpha: sharpness.
    margin: similarity gap δ.
    generator: draws the proxies' first values (None: torch's global generator).
    The proxies are the float32 parameter `proxies`, (C, D), kaiming-normal over the number of classes as in
    the published method; they are normalised in forward, and train with a learning rate of their own.
    Raises ValueError for fewer than one class or dimension; in forward for a label outside 0..C-1.
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

    def forward(self, z_BD: Tensor, labels_B: Tensor, *, seed: int) -> Tensor:
        """z_BD: floating (B, D), any length.  labels_B: integers, 0..C-1.  seed: not used."""
        return kernels.proxy_anchor_loss(
            kernels.unit_rows(z_BD),
            labels_B,
            kernels.unit_rows(self.proxies),
            alpha=self.alpha,
            margin=self.margin,
        )

    def extra_repr(self) -> str:
        classes, width = self.proxies.shape
        return f"classes={classes}, width={width}, alpha={self.alpha}, margin={self.margin}"
