"""The whole network: images → (z, s)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from namr_dist.config import ModelConfig
from namr_dist.model.backbones import build_backbone
from namr_dist.model.heads import SampleHead, StructureHead
from namr_dist.parallel.gradcache import in_pieces
from namr_dist.structure.centres import Centres


class EmbeddingNetwork(nn.Module):
    """Backbone and the two heads, and cluster centres in the space of z if the structure embedding
    is made from these.

    With `bf16`, the backbone runs under autocast; the heads, whose outputs feed distances, stay in
    fp32. With several `pieces`, a training batch passes the backbone in so many
    (parallel/gradcache.py); the heads, and so their batch norm, always see all rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        image_size: int,
        bf16: bool = False,
        pieces: int = 1,
        centres: Centres | None = None,
    ) -> None:
        """centres: where images lie among them is the structure embedding; None: the weights
        are."""
        super().__init__()
        self.backbone = build_backbone(
            config.backbone,
            batchnorm=config.batchnorm,
            pretrained=config.pretrained,
            weights=config.weights,
            image_size=image_size,
        )
        self.sample_head = SampleHead(self.backbone.features, config.width)
        self.structure_head = StructureHead(
            self.backbone.features, config.width, hidden=config.structure_hidden, delta=config.delta
        )
        self.centres = centres
        self.bf16 = bf16
        self.pieces = pieces

    def features(self, images_bHW3: Tensor) -> Tensor:
        """uint8 (b, H, H, 3) → pooled features fp32 (b, F)."""
        return in_pieces(self._piece, images_bHW3, pieces=self.pieces if self.training else 1)

    def heads(self, features_bF: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (b, F) → z and weights, both fp32 (b, D): what is trained."""
        return self.sample_head(features_bF), self.structure_head(features_bF)

    def embedding(self, features_bF: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (b, F) → z, s: what is searched by. s, fp32: the weights (b, D), or where
        z lies among the centres (b, k + 1)."""
        if self.centres is None:
            return self.heads(features_bF)
        z_bD = self.sample_head(features_bF)
        return z_bD, self.centres(z_bD)

    def _piece(self, images_bHW3: Tensor) -> Tensor:
        with torch.autocast(images_bHW3.device.type, torch.bfloat16, enabled=self.bf16):
            return self.backbone(images_bHW3).to(self.sample_head.weight.dtype)

    def forward(self, images_bHW3: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (b, H, H, 3) → z (b, D) and s, as `embedding` makes them."""
        return self.embedding(self.features(images_bHW3))
