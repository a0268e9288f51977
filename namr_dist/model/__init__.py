"""The network: images → embeddings."""
