"""Gradient caching at a global batch of 4,096 images of 96 px: memory of a real run, and gradients
beside a step that keeps all activations. Writes docs/results/large-batch.json.

    python tools/large_batch.py

Memory: the proportional set size of all processes of `torchrun --nproc-per-node 2` (launcher,
ranks, loader workers), added up five times a second while two steps run. The shards hold homeware's
images, four consecutive ones to a made-up class, for homeware has too few classes: no retrieval
figure comes of this.
Gradients: one process, a backbone small enough for all activations of 4,096 images, in pieces of 64
and all at once; the largest difference of a parameter's gradient, as a share of the whole
gradient's norm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

from namr_dist.config import Config
from namr_dist.data.location import open_shards
from namr_dist.data.read.stream import Batch, ShardImages
from namr_dist.data.shardset.manifest import ImageClass, Manifest
from namr_dist.data.shardset.shards import Sample, write_shard
from namr_dist.model.torchvision_shim import make_torchvision_importable
from namr_dist.provenance import provenance
from namr_dist.recipes.homeware import homeware
from namr_dist.run.folder import RunFolder
from namr_dist.run.log import read_log
from namr_dist.train.checkpoints.network import initial_network
from namr_dist.train.embed import test_transform
from namr_dist.train.objective import TrainingModule

CLASSES, EACH, SIDE, RANKS, MICRO_BATCH, ZERO_STAGE = 1024, 4, 96, 2, 16, 2
SMALL = "test_efficientnet"
OUT = Path(__file__).parents[1] / "docs" / "results" / "large-batch.json"


def make_shards(folder: Path) -> None:
    """4,096 of homeware's images as 1,024 training classes, with a class to validate and one to
    test."""
    source = open_shards(None)
    index = source.index(*source.splits)
    images = ShardImages(source, index, test_transform(homeware()))
    classes: dict[int, ImageClass] = {}
    shards = []
    for split, first, count in (
        ("train", 0, CLASSES),
        ("val", CLASSES, 1),
        ("test", CLASSES + 1, 1),
    ):
        labels = range(first, first + count)
        classes |= {
            label: ImageClass(label=label, name=str(label), category="made up", split=split)
            for label in labels
        }
        samples = [
            Sample(key=f"{position:05d}", label=label, jpeg=images.jpeg(position))
            for label in labels
            for position in range(EACH * label, EACH * (label + 1))
        ]
        shards.append(write_shard(folder, f"{split}.tar", split, samples, classes))
    Manifest(
        name="large batch",
        description="homeware's images under made-up labels",
        classes=tuple(classes.values()),
        shards=tuple(shards),
        folder=folder,
    ).save()


def proportional_mib(root: int) -> float:
    """Memory of a process and all its descendants, shared pages counted once, in MiB."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
    family, size = {root}, 0
    while len(family) > size:
        size = len(family)
        family |= {child for child, parent in parents.items() if parent in family}
    total = 0
    for process in family:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def real_run(folder: Path) -> dict[str, float | list[float]]:
    """Two steps of two ranks; peak memory and seconds a step."""
    words = {
        "data.path": folder,
        "data.classes_per_batch": CLASSES,
        "data.images_per_class": EACH,
        "data.image_size": SIDE,
        "data.validation_split": None,
        "data.workers": 1,
        "optim.steps": 2,
        "optim.warmup_steps": 1,
        "train.micro_batch": MICRO_BATCH,
        "train.log_every": 1,
        "train.zero_stage": ZERO_STAGE,
        "train.tensorboard": False,
    }
    run = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(RANKS),
            "launchers/train.py",
            "homeware",
            "--run-dir",
            str(folder / "run"),
            *(part for name, value in words.items() for part in (f"--set.{name}", str(value))),
        ],
        cwd=Path(__file__).parent.parent,
    )
    peak = 0.0
    while run.poll() is None:
        peak = max(peak, proportional_mib(run.pid))
        time.sleep(0.2)
    if run.returncode:
        raise SystemExit(f"the run ended with {run.returncode}")
    lines = read_log(RunFolder(folder / "run").log).entries
    speeds = [line["img_per_s"] for line in lines if "img_per_s" in line]
    return {
        "peak_mib": round(peak),
        "step_s": round(CLASSES * EACH / speeds[-1], 1),
        "loss": [line["loss"] for line in lines if "loss" in line],
    }


def gradients(
    config: Config, manifest: Manifest, *, images: int, pieces: int, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients and seconds of one step with the first so many images, one process."""
    network = initial_network(
        config, device=torch.device("cpu"), pretrained=True, pieces=pieces
    ).train()
    module = TrainingModule(network, config.loss, classes=CLASSES, images_per_class=EACH).to(dtype)
    source = ShardImages(manifest, manifest.index("train"), test_transform(config))
    batch = source.__getitems__([(position, 0) for position in range(images)])
    assert isinstance(batch, Batch)
    began = time.perf_counter()
    module(batch.images_bHW3, batch.labels_b, 0).total.backward()
    seconds = time.perf_counter() - began
    return {
        name: value.grad for name, value in module.named_parameters() if value.grad is not None
    }, seconds


def equality(folder: Path) -> list[dict[str, float | str]]:
    """The largest difference of a parameter's gradient, as a share of the whole gradient's norm."""
    make_torchvision_importable()
    import timm

    torch.manual_seed(0)
    weights = folder / "small.safetensors"
    safetensors.torch.save_file(timm.create_model(SMALL, num_classes=0).state_dict(), weights)
    config = homeware()
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, backbone=f"timm:{SMALL}", weights=weights)
    )
    manifest = Manifest.load(folder)
    comparisons: list[dict[str, float | str]] = []
    # In float64 all activations of 4,096 images need more memory than many machines have.
    for images, dtype in ((CLASSES * EACH, torch.float32), (CLASSES * EACH // 4, torch.float64)):
        whole, whole_s = gradients(config, manifest, images=images, pieces=1, dtype=dtype)
        cached, cached_s = gradients(
            config, manifest, images=images, pieces=images // 64, dtype=dtype
        )
        norm = torch.stack([value.norm() for value in whole.values()]).norm().item()
        worst = max((cached[name] - value).norm().item() for name, value in whole.items())
        comparisons.append(
            {
                "backbone": SMALL,
                "images": images,
                "pieces": images // 64,
                "dtype": str(dtype),
                "gradient_difference": worst / norm,
                "whole_s": round(whole_s, 1),
                "cached_s": round(cached_s, 1),
            }
        )
    return comparisons


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        make_shards(Path(name))
        report = {
            "batch": CLASSES * EACH,
            "image_size": SIDE,
            "ranks": RANKS,
            "micro_batch": MICRO_BATCH,
            "backbone": homeware().model.backbone,
            "zero_stage": ZERO_STAGE,
            "run": real_run(Path(name)),
            "equality": equality(Path(name)),
            **provenance(),
        }
    OUT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
