"""Nodes before a job: whether they can train together."""
