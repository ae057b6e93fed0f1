"""The stages of a run, in the order `pipeline.py` calls them; one file each."""
