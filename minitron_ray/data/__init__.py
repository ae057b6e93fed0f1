"""Text in, packed token sequences out."""

from minitron_ray.core.kinds import one_of

DataSource = one_of("minitron_ray.data.sources")
