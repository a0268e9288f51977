"""Validation figures of one trained run at several test sizes, a JSON line each.

python tools/validate_sizes.py RUN 96 128 160 > docs/results/test-size/RUN.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from namr_dist.config import Config
from namr_dist.data.location import open_shards
from namr_dist.data.read.augment import TestTransform
from namr_dist.data.read.stream import ShardImages
from namr_dist.parallel.ranks import only_rank
from namr_dist.retrieval.evaluate import evaluate_sample
from namr_dist.run.folder import RunFolder
from namr_dist.train.checkpoints.network import load_network
from namr_dist.train.embed import embed


def main(run: Path, sizes: list[int]) -> None:
    """Print the figures of the trained network, size by size."""
    config, rank = Config.load(run / "config.json"), only_rank()
    network, trained = load_network(RunFolder(run).final, config, device=rank.device)
    manifest = open_shards(config.data.path, config.data.remote)
    index = manifest.index("val")
    for size in sizes:
        images = ShardImages(
            manifest, index, TestTransform(size=size, crop_share=config.data.test_crop)
        )
        z_ND, _ = embed(network, images, rank=rank, batch_size=128, workers=config.data.workers)
        print(
            json.dumps(
                {
                    "steps": trained["steps"],
                    "backbone_lr": config.optim.backbone_lr,
                    "crop_scale": config.data.crop_scale,
                    "image_size": config.data.image_size,
                    "test_size": size,
                    "val": evaluate_sample(z_ND, index.label_N),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(size) for size in sys.argv[2:]])
