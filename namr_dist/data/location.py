"""Where a shard set is: in the package, in a folder, or behind a URL."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from namr_dist.config import RemoteConfig
from namr_dist.data.homeware import embedded_shards
from namr_dist.data.remote.address import is_url
from namr_dist.data.remote.cache import open_remote
from namr_dist.data.shardset.manifest import Manifest


def open_shards(location: str | Path | None, remote: RemoteConfig | None = None) -> Manifest:
    """The shard set at `location`, a folder or a URL as text; None: homeware.

    Raises InputError as Manifest.load does, and for a URL whose manifest cannot be had.
    """
    if not isinstance(location, str) or not is_url(location):
        return Manifest.load(location or embedded_shards())
    if location.lower().startswith("file://"):
        return Manifest.load(url2pathname(urlsplit(location).path))
    return open_remote(location, remote or RemoteConfig())
