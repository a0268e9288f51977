"""The stop watch, the speed line, and the share of a device's peak."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from conftest import Ranks

from namr_dist.config import ModelConfig
from namr_dist.model.backbones import build_backbone
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.parallel.ranks import Rank
from namr_dist.run.folder import RunFolder
from namr_dist.train.logging import RunLog, spent
from namr_dist.train.mfu import (
    PEAKS,
    ImageFlops,
    Peak,
    image_flops,
    peak_img_per_s,
    run_peak_img_per_s,
)
from namr_dist.train.phases import IDLE, STEP_PHASES, Phases, StepTimes

CPU = torch.device("cpu")


def test_seconds_add_up_and_inner_phases_stand_apart() -> None:
    before_s = time.perf_counter()
    phases = Phases(CPU)
    began_s = time.perf_counter()
    with phases("forward"):
        time.sleep(0.03)
        with phases("heads"):
            assert phases.now == "heads"
            time.sleep(0.05)
        assert phases.now == "forward"
        time.sleep(0.02)
    time.sleep(0.01)
    with phases("forward"):
        time.sleep(0.02)
    ended_s = time.perf_counter()
    seconds = phases.take()
    after_s = time.perf_counter()
    assert ended_s - began_s <= sum(seconds.values()) <= after_s - before_s
    # A sleep is never shorter than asked for.
    assert set(seconds) == {IDLE, "forward", "heads"}
    assert seconds["forward"] >= 0.07 and seconds["heads"] >= 0.05 and seconds[IDLE] >= 0.01
    assert phases.now == IDLE and set(phases.take()) == {IDLE}


def test_take_within_a_phase_splits_it() -> None:
    phases = Phases(CPU)
    with phases("data"):
        time.sleep(0.02)
        first = phases.take()
        time.sleep(0.03)
    second = phases.take()
    assert first["data"] >= 0.02 and second["data"] >= 0.03 and IDLE in second


def test_what_validation_does_is_validation() -> None:
    phases = Phases(CPU)
    with phases("validation"):
        since_s = phases.since_s
        with phases("heads"), phases("gather"):
            time.sleep(0.02)
            assert phases.now == "gather" and phases.since_s > since_s
    seconds = phases.take()
    assert set(seconds) == {IDLE, "validation"} and seconds["validation"] >= 0.02


def test_an_exception_leaves_the_phases_as_they_were_and_says_where() -> None:
    phases = Phases(CPU)
    with pytest.raises(ValueError, match="no"), phases("forward"):
        time.sleep(0.01)
        with phases("loss"):
            time.sleep(0.02)
            raise ValueError("no")
    assert phases.now == IDLE and phases.broken == "loss"
    with phases("data"):
        assert phases.broken is None and phases.now == "data"
    seconds = phases.take()
    assert (
        seconds["forward"] >= 0.01
        and seconds["loss"] >= 0.02
        and set(seconds) == {IDLE, "forward", "loss", "data"}
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_kernels_are_booked_where_they_were_issued() -> None:
    device = torch.device("cuda")
    product = torch.randn(4096, 4096, device=device)
    product @ product
    phases = Phases(device)
    torch.cuda.synchronize()
    phases.take()
    began = time.perf_counter()
    with phases("forward"):
        for _ in range(40):
            product @ product
        with phases("heads"):
            product @ product
    issued_s = time.perf_counter() - began
    seconds = phases.take()
    wall_s = time.perf_counter() - began
    # The thread was through long before the kernels were.
    assert seconds["forward"] > 2 * issued_s
    assert 10 * seconds["heads"] < seconds["forward"] < wall_s
    assert sum(seconds.values()) == pytest.approx(wall_s, rel=0.2)


def times_on(rank: int) -> StepTimes:
    # Rank 0 waits in the gather for what rank 1 does in its forward.
    seconds = [{"data": 0.2, "forward": 1.0, "gather": 3.0}, {"data": 0.4, "forward": 4.0}][rank]
    return StepTimes.of_all_ranks(
        seconds, steps=2, rank=Rank(rank=rank, world_size=2, local_rank=rank, device=CPU)
    )


def own_times() -> StepTimes:
    return times_on(torch.distributed.get_rank())


@pytest.mark.dist
def test_mean_and_slowest_of_two_ranks(two_ranks: Ranks) -> None:
    for times in two_ranks(own_times):
        assert times.slowest_rank == 1 and times.slowest_s == pytest.approx(2.2)
        want = {**dict.fromkeys(STEP_PHASES, 0.0), "data": 0.15, "forward": 1.25, "gather": 0.75}
        assert times.mean_s == pytest.approx(want)


def test_small_phases_are_the_rest() -> None:
    seconds = {"data": 0.001, "forward": 0.05, "gather": 0.0004, "step": 0.03}
    assert spent(seconds, step_s=0.1) == "100 ms/step: data 1, forward 50, step 30, rest 19"


def test_speed_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = StepTimes(
        mean_s={**dict.fromkeys(STEP_PHASES, 0.0), "forward": 0.03, "backward": 0.06},
        slowest_rank=1,
        slowest_s=0.04,
    )
    with RunLog(
        RunFolder(tmp_path),
        steps=9,
        hosts=["left", "right"],
        peak_img_per_s=5000.0,
        tensorboard=False,
        name="x",
    ) as log:
        log.step(
            {
                "step": 3,
                "epoch": 2,
                "loss": 1.5,
                "metric_loss": 0.5,
                "ranking_loss": 0.5,
                "lr": 1e-4,
            }
        )
        log.speed(3, 2000.0, times, images=200, gathered_bytes=2**20, peak_bytes=3 * 2**20)
    line = " ".join(capsys.readouterr().err.split())
    assert "loss 1.5000 (metric 0.5000, ranking 0.5000) lr 1.0e-04 2000 img/s, 40 % of peak" in line
    assert line.endswith(
        "100 ms/step: forward 30, backward 60, rest 10 slowest: rank 1 on right, 40 ms"
    )
    logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert logged["img_per_s"] == 2000.0 and logged["mfu"] == 0.4 and logged["gathered_mib"] == 1.0
    assert logged["peak_mib"] == 3.0
    assert {f"{name}_s" for name in STEP_PHASES} <= logged.keys() and logged["slowest_rank"] == 1
    assert logged["slowest_host"] == "right"


@pytest.mark.parametrize(
    ("name", "giga_multiply_adds", "share_of_products"),
    [
        # He et al. 2016 and Dosovitskiy et al. 2021, as timm's tables count them; a class head of 2
        # M left out.
        ("timm:resnet50", 4.09, 0.0),
        ("timm:vit_small_patch16_224", 4.6, 0.987),
    ],
)
def test_flops_of_known_networks(
    name: str, giga_multiply_adds: float, share_of_products: float
) -> None:
    backbone = build_backbone(
        name, batchnorm="train", pretrained=False, weights=None, image_size=224
    ).train()
    flops = image_flops(backbone, size=224, device=CPU)
    total = flops.convolution + flops.product
    assert total / 2e9 == pytest.approx(giga_multiply_adds, rel=0.01)
    assert flops.product / total == pytest.approx(share_of_products, abs=1e-3)
    assert backbone.training


def test_peak_is_of_each_operations_precision() -> None:
    flops, peak = (
        ImageFlops(convolution=2 * 10**9, product=3 * 10**9),
        Peak(bf16=100.0, tf32=50.0, fp32=10.0),
    )

    def seconds(*, bf16: bool = False, convolution: bool = False, product: bool = False) -> float:
        # A training step is three forward passes' worth.
        return (
            1
            / peak_img_per_s(
                flops, peak, bf16=bf16, tf32_convolution=convolution, tf32_product=product
            )
            / 3
        )

    assert seconds(bf16=True) == pytest.approx(5e9 / 100e12)
    assert seconds() == pytest.approx(5e9 / 10e12)
    assert seconds(convolution=True) == pytest.approx(2e9 / 50e12 + 3e9 / 10e12)
    assert seconds(product=True) == pytest.approx(2e9 / 10e12 + 3e9 / 50e12)


def test_peak_of_a_run() -> None:
    peak = Peak(bf16=100.0, tf32=50.0, fp32=10.0)
    model = ModelConfig(
        backbone="timm:resnet10t", batchnorm="train", pretrained=False, width=8, structure_hidden=8
    )

    def at_peak(*, pieces: int = 1, ranks: int = 1, bf16: bool = True) -> float:
        network = EmbeddingNetwork(model, image_size=32, pieces=pieces, bf16=bf16)
        rate = run_peak_img_per_s(network, peak, size=32, device=CPU, ranks=ranks)
        assert rate is not None
        return rate

    assert at_peak(ranks=5) == pytest.approx(5 * at_peak())
    assert at_peak() == at_peak(pieces=2)  # the forward pass that is done once more is no progress
    # CuDNN's convolutions are TF32 unless told otherwise.
    assert at_peak() == pytest.approx(2 * at_peak(bf16=False))
    network = EmbeddingNetwork(model, image_size=32)
    assert run_peak_img_per_s(network, None, size=32, device=CPU, ranks=1) is None


def test_tensor_cores_are_the_faster_ones() -> None:
    for name, peak in PEAKS.items():
        # A figure with sparsity beside one without would be 4 times it, or equal.
        assert (
            peak.bf16 == pytest.approx(2 * peak.tf32, rel=0.03) and peak.tf32 > 1.9 * peak.fp32
        ), name
