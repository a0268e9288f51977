"""The structure embedding from cluster centres of the training embeddings."""
