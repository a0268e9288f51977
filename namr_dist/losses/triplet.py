"""Triplet loss as a module."""

from torch import Tensor, nn

from namr_dist import kernels


class TripletLoss(nn.Module):
    """Triplet loss on embeddings as given; training hands it z scaled to mean pairwise distance 1.

    margin: how much farther a negative must lie than a positive, in units of the scaled distance.
    mining: "semihard", "hardest" or "distance_weighted"; see `kernels.triplet_loss`.
    most_positives: the most positives any row has, K - 1 for batches with K rows a class (None: counted each time,
        which on a GPU waits for the device).
    Raises ValueError for an unknown mining.
    """

    def __init__(self, *, margin: float = 0.2, mining: str = "semihard", most_positives: int | None = None) -> None:
        super().__init__()
        kernels.check_mining(mining)
        self.margin = margin
        self.mining = mining
        self.most_positives = most_positives

    def forward(self, z_BD: Tensor, labels_B: Tensor, *, seed: int) -> Tensor:
        """z_BD: (B, D), the global batch.  labels_B: integers.  seed: picks the sampled negatives."""
        return kernels.triplet_loss(z_BD, labels_B, margin=self.margin, mining=self.mining, seed=seed,
                                    most_positives=self.most_positives)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, mining={self.mining!r}"
