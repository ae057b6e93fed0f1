"""Downstream measures; one file each, named by its `kind`."""
