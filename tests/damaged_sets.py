"""Shard sets with something wrong inside, of which all else fits together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from namr_dist.data.shardset.manifest import Manifest, Shard
from namr_dist.data.shardset.shards import Sample, write_shard


def edit(manifest: Manifest, change: Callable[[dict], object]) -> None:
    """Change what the manifest's file says; its shards stay as they are."""
    path = manifest.folder / "manifest.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def with_images(manifest: Manifest, jpegs: dict[str, bytes]) -> Manifest:
    """The set built anew with these bytes in the place of the images of these keys: all sizes and
    hashes are right."""

    def rebuilt(shard: Shard) -> Shard:
        tar = (manifest.folder / shard.file).read_bytes()
        images = zip(shard.keys, shard.labels, shard.offsets, shard.lengths, strict=True)
        samples = [
            Sample(key=key, label=label, jpeg=jpegs.get(key, tar[offset : offset + length]))
            for key, label, offset, length in images
        ]
        return write_shard(
            manifest.folder, shard.file, shard.split, samples, manifest.class_by_label
        )

    built = replace(manifest, shards=tuple(map(rebuilt, manifest.shards)))
    built.save()
    return built
