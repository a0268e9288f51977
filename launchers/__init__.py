"""What starts training on every rank, on one machine or many."""
