"""Which shapes a student may take, and which units it keeps."""

from minitron_ray.core.kinds import one_of

Sampler = one_of("minitron_ray.search.samplers")
