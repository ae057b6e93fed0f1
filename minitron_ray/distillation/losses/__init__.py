"""Losses a student can be trained with; one file each, named by its `kind`."""
