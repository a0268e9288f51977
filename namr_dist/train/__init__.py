"""Training: what is minimised, by which steps, and what a run tells of itself."""
