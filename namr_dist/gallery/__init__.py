"""From a trained network to a searchable gallery: embed, index, search."""
