"""Metrics for decoder layers; one file each, named by its `kind`."""
