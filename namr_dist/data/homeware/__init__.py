"""homeware, the embedded data set: its finished shards, and who made the models
(ATTRIBUTION.csv)."""

from pathlib import Path


def embedded_shards() -> Path:
    """Folder of the shard set inside the package."""
    return Path(__file__).parent / "shards"
