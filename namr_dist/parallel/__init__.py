"""What ranks share: who each is, gathers, batch norm, batches larger than memory."""
