"""Training states and trained networks as files, and where a run begins."""
