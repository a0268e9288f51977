"""A run's folder: its files, its log, and how far the run is. Free of torch."""
