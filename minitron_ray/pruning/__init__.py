"""Cutting a checkpoint to an explicit shape, file by file: no run, no search, no distillation, no Ray."""
