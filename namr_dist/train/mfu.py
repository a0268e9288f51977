"""Images a second that a GPU could at most train: its peak over the backbone's floating-point
operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from namr_dist.model.network import EmbeddingNetwork


@dataclass(frozen=True, kw_only=True)
class Peak:
    """A device's floating-point operations a second, in units of 10^12, without sparsity."""

    bf16: float
    tf32: float
    fp32: float


_A100 = Peak(bf16=312.0, tf32=156.0, fp32=19.5)
_HOPPER_SXM = Peak(bf16=989.4, tf32=494.7, fp32=66.9)
PEAKS: Mapping[str, Peak] = {
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA H100 80GB HBM3": _HOPPER_SXM,
    "NVIDIA H200": _HOPPER_SXM,
    "NVIDIA H100 PCIe": Peak(bf16=756.0, tf32=378.0, fp32=51.0),
    "NVIDIA B200": Peak(bf16=2250.0, tf32=1100.0, fp32=75.0),
    "NVIDIA L40S": Peak(bf16=362.0, tf32=183.0, fp32=91.6),
    "NVIDIA L4": Peak(bf16=121.0, tf32=60.0, fp32=30.3),
}
"""By the name that torch.cuda.get_device_name gives. From NVIDIA's data sheets of each, halved
where they count with sparsity. Other devices have no share of peak."""


@dataclass(frozen=True, kw_only=True)
class ImageFlops:
    """Floating-point operations of one image's forward pass, a multiplication with an addition
    being two."""

    convolution: int
    product: int
    """Matrix products, attention's included."""


def image_flops(backbone: nn.Module, *, size: int, device: torch.device) -> ImageFlops:
    """Counted while the backbone, in eval mode, embeds one black image: uint8 (1, size, size,
    3)."""
    # Imports Triton, which a CPU has no use for.
    from torch.utils.flop_counter import (
        FlopCounterMode,
    )

    mode = backbone.training
    backbone.eval()
    # Attention as two products: not all its fused forms are counted on all devices.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, size, size, 3, dtype=torch.uint8, device=device))
    backbone.train(mode)
    convolution = sum(
        flops
        for operator, flops in counter.get_flop_counts()["Global"].items()
        if "convolution" in str(operator)
    )
    return ImageFlops(convolution=convolution, product=counter.get_total_flops() - convolution)


def peak_img_per_s(
    flops: ImageFlops, peak: Peak, *, bf16: bool, tf32_convolution: bool, tf32_product: bool
) -> float:
    """Images a second that one device would train, were it at its peak in the precision of each
    operation.

    A step is worth three forward passes, for a backward pass is two. What gradient caching does
    once more is no progress and does not count.
    """
    convolution = peak.bf16 if bf16 else peak.tf32 if tf32_convolution else peak.fp32
    product = peak.bf16 if bf16 else peak.tf32 if tf32_product else peak.fp32
    return 1e12 / (3 * (flops.convolution / convolution + flops.product / product))


def device_peak(device: torch.device) -> Peak | None:
    """None for a CPU, and for a GPU that is not in PEAKS."""
    return PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def run_peak_img_per_s(
    network: EmbeddingNetwork, peak: Peak | None, *, size: int, device: torch.device, ranks: int
) -> float | None:
    """Images a second that so many devices would train at their peak, heads and losses left out;
    None if that is not known."""
    if peak is None:
        return None
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    flops = image_flops(network.backbone, size=size, device=device)
    return ranks * peak_img_per_s(
        flops,
        peak,
        bf16=network.bf16,
        tf32_convolution=convolutions.fp32_precision == "tf32",
        tf32_product=torch.backends.cuda.matmul.fp32_precision == "tf32",
    )
