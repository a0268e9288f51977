"""From a download to shards."""
