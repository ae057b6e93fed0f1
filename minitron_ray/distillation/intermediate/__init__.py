"""Hidden states a student can be asked to match beside the logits; one file each, named by its `kind`."""
