"""Losses on the validation sequences, and downstream tasks."""

from minitron_ray.core.kinds import one_of

AnyTask = one_of("minitron_ray.evaluation.tasks")
