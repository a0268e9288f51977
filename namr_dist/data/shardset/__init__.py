"""What a shard set is and holds."""
