"""The most memory that training held: whether a batch fits, and how much larger one could be."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def take_peak_bytes(device: torch.device) -> int:
    """On a GPU, the most bytes that tensors of this process held since the last call. On a CPU, the most that its
    resident set has been since it began, loader workers apart."""
    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak_bytes
    peaks = [line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")] \
        if _STATUS.is_file() else []
    # Unlike VmHWM, maxrss is not less than what the program held that started this one.
    return 1024 * int(peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
