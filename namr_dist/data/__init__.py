"""Images: sets of shards, how they are built, read and fetched."""
