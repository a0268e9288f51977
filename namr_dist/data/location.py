"""Where a shard set is: in the package, in a folder, or behind a URL."""

from __future__ import annotations

from pathlib import Path

from namr_dist.config import RemoteConfig
from namr_dist.data.formats.homeware import embedded_shards
from namr_dist.data.manifest import Manifest


def open_shards(location: str | Path | None, remote: RemoteConfig | None = None) -> Manifest:
    """The shard set at `location`; None: homeware. Raises InputError as Manifest.load does."""
    return Manifest.load(location or embedded_shards())
