"""In which precision the backbone's forward pass is made."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch


class Precision(NamedTuple):
    """The precision that was chosen, and the reason, as the banner shows them."""

    bf16: bool
    """Else fp32."""
    why: str

    def __str__(self) -> str:
        return f"{'bf16' if self.bf16 else 'fp32'} ({self.why})"


def choose_precision(wanted: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """What train.precision means on this device."""
    if device.type != "cuda":
        if wanted == "bf16":
            return Precision(True, "asked for; on a CPU it saves no time unless it has AMX")
        return Precision(False, "CPU" if wanted == "auto" else "asked for")
    if wanted != "auto":
        return Precision(wanted == "bf16", "asked for")
    able = torch.cuda.is_bf16_supported(including_emulation=False)
    return Precision(able, "the GPU has it" if able else "the GPU has no bf16 units")
