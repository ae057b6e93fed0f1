"""Teaching a student from its teacher."""

from minitron_ray.core.kinds import one_of

Loss = one_of("minitron_ray.distillation.losses")
SignalKind = one_of("minitron_ray.distillation.signals")
StateLosses = one_of("minitron_ray.distillation.intermediate")
