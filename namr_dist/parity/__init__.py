"""Many ranks beside one process: the same loss, the same gradients."""
