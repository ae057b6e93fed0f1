"""Bytes that one process of a stage takes on its device, by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from minitron_ray.core.hardware import Hardware
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.cost import BYTES, activation_bytes, training_bytes, weight_bytes
from minitron_ray.models.family import Family

LOGITS: Final = {"cpu": 2**24, "accelerator": 2**27}
"""Logits of a chunk of tokens, see `weights/vocabulary.py`."""
LOGIT_COPIES: Final = 4
"""Of a chunk in float32: both models' logits, the gradient, and one on the way."""
WEIGHTS_SHARE: Final = 0.6
"""Of a device's memory, in a run of what is free: above it a teacher is scored layer by layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a run is laid out, as far as memory goes."""

    micro_batch: int = 4
    """Sequences of one forward pass."""
    workers: int = 1
    """Processes that share a student in the distillation."""
    trial_workers: int = 1
    """Processes that share a trial's student."""
    accelerator: bool = False
    importance: Literal["auto", "resident", "streamed"] = "auto"
    memory: int | None = None
    """Bytes of one device."""

    @classmethod
    def on(
        cls,
        hardware: Hardware | None,
        *,
        micro_batch: int = 4,
        workers: int | None = None,
        trial_workers: int = 1,
        importance: Literal["auto", "resident", "streamed"] = "auto",
    ) -> Layout:
        """One worker a device where nothing else is said."""
        return cls(
            micro_batch=micro_batch,
            workers=workers or (1 if hardware is None else hardware.count),
            trial_workers=trial_workers,
            accelerator=hardware is not None and hardware.accelerator,
            importance=importance,
            memory=None if hardware is None else hardware.memory,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The parts of it, in bytes, for passes of `layout.micro_batch` sequences of `length` tokens."""

    family: Family
    length: int
    precision: Literal["auto", "float32", "bfloat16"]
    layout: Layout

    @property
    def value(self) -> str:
        """The type of products. `auto` is bfloat16 where that is native: of accelerators it is."""
        if self.precision != "auto":
            return self.precision
        return "bfloat16" if self.layout.accelerator else "float32"

    @property
    def tokens(self) -> int:
        """Of one pass."""
        return self.layout.micro_batch * self.length

    @property
    def logits(self) -> int:
        """Of one chunk of tokens."""
        return LOGIT_COPIES * 4 * LOGITS["accelerator" if self.layout.accelerator else "cpu"]

    def weights(self, arch: Architecture) -> int:
        """A model that only runs forward."""
        return weight_bytes(self.family, arch, self.value)

    def head(self, arch: Architecture) -> int:
        """An LM head by itself."""
        return arch.vocab * arch.hidden * BYTES[self.value]

    def scoring(self, arch: Architecture, outputs: int) -> int:
        """A model that is scored: its weights, or one layer's, and `outputs` hidden states of a batch."""
        states = outputs * self.tokens * arch.hidden * BYTES[self.value]
        whole = self.weights(arch)
        if not self._streams(whole):
            return whole + states
        apart = self.family.embedding_parameters(arch)
        layer = (self.family.parameters(arch) - apart) // arch.layers
        return (apart + layer) * BYTES[self.value] + states

    def _streams(self, whole: int) -> bool:
        if self.layout.importance != "auto":
            return self.layout.importance == "streamed"
        return self.layout.memory is not None and whole > WEIGHTS_SHARE * self.layout.memory

    def training(self, student: Architecture, workers: int = 1) -> int:
        """A student in training, in float32, its state spread over `workers`.

        Weights, gradients and moments; what a pass keeps of each layer, and the gradients of the final
        hidden states and of the head, which the loss forms at once; a chunk of logits. Products in
        bfloat16 keep a copy of the weights. Spread over workers, one layer and the head are whole again.
        """
        parameters = self.family.parameters(student)
        size = training_bytes(self.family, student) // workers
        size += self.tokens * (activation_bytes(student, self.value) + 8 * student.hidden)
        size += 4 * student.vocab * student.hidden + self.logits
        if self.value != "float32":
            size += parameters * BYTES[self.value]
        if workers > 1:
            apart = self.family.embedding_parameters(student)
            size += 4 * (apart + (parameters - apart) // student.layers)
        return size

    def measuring(self, student: Architecture) -> int:
        """A student that is measured: float32 weights, their copy under bfloat16, a chunk of logits."""
        copies = 4 if self.value == "float32" else 4 + BYTES[self.value]
        return self.family.parameters(student) * copies + self.logits
