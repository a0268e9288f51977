"""Multi-cluster ranking of one rank's rows among all: the label-free loss that trains the structure
embedding."""

from torch import Tensor, nn

from namr_dist import kernels
from namr_dist.losses.rows import Rows, scaled_rows, through_unit_rows


class MultiClusterRankingRows(nn.Module):
    """L_mcr of docs/algorithm.md, "Multi-cluster ranking".

    clusters: M, ordered cluster centres; 2 follows the NASA authors' published formulas.
    spread: t, how many deviations below the mean the nearest centre lies.
    floor: φ, the nearest centre's least value as a fraction of the mean distance.
    sharpness: a, of the soft assignment of a distance to the centres.
    statistics: "batch" or "anchor", what mean and deviation run over.
    geometry: "scaled", distances of the rows as they come; "unit", of rows of length 1, divided by
        their mean pairwise distance. The gradient passes through both.
    Raises ValueError for fewer than two clusters, a floor outside [0, 1], other statistics.
    """

    def __init__(
        self,
        *,
        clusters: int = 2,
        spread: float = 3.0,
        floor: float = 0.2,
        sharpness: float = 10.0,
        statistics: str = "batch",
        geometry: str = "scaled",
    ) -> None:
        super().__init__()
        kernels.check_clusters(clusters=clusters, floor=floor, statistics=statistics)
        self.clusters = clusters
        self.spread = spread
        self.floor = floor
        self.sharpness = sharpness
        self.statistics = statistics
        self.geometry = geometry

    def forward(self, rows: Rows, s_bD: Tensor, s_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The batch's loss and its gradients for rows.z_bD and s_bD. s: positive weights, of this
        rank and of all."""
        if self.geometry == "scaled":
            return self._of(rows, s_bD, s_BD)
        scaled = scaled_rows(rows.unit(), batch=len(s_BD))
        loss, grad_bD, grad_s_bD = self._of(scaled.rows, s_bD, s_BD)
        return loss, through_unit_rows(rows.z_bD, scaled.through(grad_bD)), grad_s_bD

    def _of(self, rows: Rows, s_bD: Tensor, s_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.ranking_of_rows(
            rows.z_bD,
            s_bD,
            rows.z_ND,
            s_BD,
            offset=rows.offset,
            gather=rows.gather,
            clusters=self.clusters,
            spread=self.spread,
            floor=self.floor,
            sharpness=self.sharpness,
            statistics=self.statistics,
            with_grad=True,
        )

    def extra_repr(self) -> str:
        """The settings, for repr()."""
        return (
            f"clusters={self.clusters}, spread={self.spread}, floor={self.floor}, "
            f"sharpness={self.sharpness}, statistics={self.statistics!r}, geometry={self.geometry!r}"
        )
