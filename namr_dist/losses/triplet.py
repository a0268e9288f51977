"""Triplet loss of one rank's rows among all."""

from __future__ import annotations

from torch import Tensor

from namr_dist import kernels
from namr_dist.kernels import reference
from namr_dist.losses.registry import TripletConfig
from namr_dist.losses.rows import Batches, Rows, RowsLoss


class TripletRows(RowsLoss):
    """Triplet loss on embeddings as given; training hands it z scaled to mean pairwise distance 1.

    margin: how much farther a negative must lie than a positive, in units of the scaled distance.
    mining: "semihard", "hardest" or "distance_weighted"; see `kernels.triplet_loss`.
    most_positives: the most positives any row has, K - 1 for batches with K rows a class and no
        memory (None: counted each time, which on a GPU waits for the device).
    Raises ValueError for an unknown mining.
    """

    def __init__(
        self, *, margin: float = 0.2, mining: str = "semihard", most_positives: int | None = None
    ) -> None:
        super().__init__()
        kernels.check_mining(mining)
        self.margin = margin
        self.mining = mining
        self.most_positives = most_positives

    @classmethod
    def configured(cls, settings: TripletConfig, batches: Batches) -> TripletRows:
        """From loss.triplet; positives are counted only where a memory makes their number open."""
        return cls(
            margin=settings.margin, mining=settings.mining, most_positives=batches.most_positives
        )

    def forward(self, rows: Rows, *, seed: int) -> tuple[Tensor, Tensor]:
        """The batch's loss and its gradient for rows.z_bD. seed: picks the sampled negatives."""
        return kernels.triplet_of_rows(
            rows.z_bD,
            rows.labels_b,
            rows.z_ND,
            rows.labels_N,
            offset=rows.offset,
            gather=rows.gather,
            margin=self.margin,
            mining=self.mining,
            seed=seed,
            most_positives=self.most_positives,
            with_grad=True,
        )

    def definition(self, x_BD: Tensor, labels_B: Tensor, *, seed: int) -> Tensor:
        """Of the rows as given. seed: picks the sampled negatives."""
        return reference.triplet_loss(
            x_BD, labels_B, margin=self.margin, mining=self.mining, seed=seed
        )

    def extra_repr(self) -> str:
        """The settings, for repr()."""
        return f"margin={self.margin}, mining={self.mining!r}"
