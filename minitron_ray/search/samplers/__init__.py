"""Samplers; one file each, named by its `kind`."""
