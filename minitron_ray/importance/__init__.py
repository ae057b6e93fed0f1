"""What each unit of the teacher is worth, from its activations on a little data (paper §2.2)."""

from minitron_ray.core.kinds import one_of

WidthMetric = one_of("minitron_ray.importance.width")
DepthMetric = one_of("minitron_ray.importance.depth")
