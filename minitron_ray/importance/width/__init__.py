"""Metrics for hidden channels, heads and MLP neurons; one file each, named by its `kind`."""
