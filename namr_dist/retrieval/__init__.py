"""Search among embeddings and its figures, of pure arrays."""
