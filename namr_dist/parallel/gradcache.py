"""Gradient caching: batches larger than memory, by embedding them in pieces.

The loss needs all embeddings at once, but no activations. So every piece is embedded without
keeping any, the loss and its gradient for the embeddings are taken over the whole batch, and
backward embeds each piece again, this time with activations, for the cached gradient (Gao et al.
2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"). Three passes
instead of two, memory of one piece.

That is activation checkpointing with the pieces of a batch as segments, and torch.utils.checkpoint
does it: random state and autocast are restored for the second pass. Because all pieces are one
graph, a parameter's gradient is accumulated once a step and reduced over ranks once, under every
ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_pieces(function: Callable[[Tensor], Tensor], rows_bX: Tensor, *, pieces: int) -> Tensor:
    """function(rows) of (b, …), computed in so many pieces of nearly equal size, each row by
    itself.

    `function` must treat rows independently (no batch norm in training). It runs once a piece, and
    once more in backward. All ranks must ask for the same number of pieces: ZeRO-3 counts forwards.
    """
    parts = rows_bX.tensor_split(pieces)
    if pieces == 1 or not torch.is_grad_enabled():
        return torch.cat([function(part) for part in parts])
    return torch.cat([checkpoint(function, part, use_reentrant=False) for part in parts])
