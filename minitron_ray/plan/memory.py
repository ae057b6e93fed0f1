"""Bytes that one process of a stage takes on its device, by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from minitron_ray.core.hardware import Hardware
from minitron_ray.distillation.engine import TEACHER_SHARE
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.cost import (
    BYTES,
    TRAINING_STATE_BYTES,
    activation_bytes,
    training_bytes,
    weight_bytes,
)
from minitron_ray.models.family import Family

LOGITS: Final = {"cpu": 2**24, "accelerator": 2**27}
"""Logits of a chunk of tokens, see `weights/vocabulary.py`."""
LOGIT_COPIES: Final = 4
"""Of a chunk in float32: both models' logits, the gradient, and one on the way."""
FINAL_BYTES: Final = 20
"""A token and a channel of a student in training: what the final norm keeps, and the final hidden states again
where the loss takes them, with their gradients."""
CHECKPOINT_BYTES: Final = 12
"""A parameter of a checkpoint: the weight and Adam's two moments in float32."""
STATE_BYTES: Final = 16
"""A token and a channel of the teacher, of each pair of hidden states that are compared: both models' states,
lifted and as they are, and what the distance keeps of them for the backward pass."""
WEIGHTS_SHARE: Final = 0.6
"""Of a device's memory, in a run of what is free: above it a teacher is scored layer by layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a run is laid out, as far as memory goes."""

    micro_batch: int = 4
    """Sequences of one forward pass."""
    workers: int = 1
    """Processes that share a student in the distillation: the fewest, with whom each holds most."""
    most_workers: int | None = None
    """The most of a range."""
    trial_workers: int = 1
    """Processes that share a trial's student."""
    trials_at_once: int | None = None
    """Trials that train at the same time; None where nothing tells."""
    accelerator: bool = False
    importance: Literal["auto", "resident", "streamed"] = "auto"
    recompute: bool = False
    """Whether a layer in training keeps its input alone, and runs forward again for the backward pass."""
    teacher: Literal["auto", "whole", "sharded"] = "auto"
    """Whether each process of a group holds the whole running teacher, or a shard of it."""
    memory: int | None = None
    """Bytes of one device."""
    asynchronous: bool = True
    """Whether a distillation's checkpoints are copied, to be written while it goes on."""

    @property
    def workers_text(self) -> str:
        """`8`, or `2..8`."""
        return f"{self.workers}" if self.most_workers is None else f"{self.workers}..{self.most_workers}"

    @property
    def teacher_workers(self) -> int:
        """Processes that share a teacher that nobody is trained beside, as `Cluster.teacher_group` has them."""
        if self.teacher == "whole":
            return 1
        return max(self.trial_workers, self.workers if self.teacher == "sharded" else 1)

    @property
    def measuring_workers(self) -> int:
        """Processes that share a student that is evaluated."""
        return max(self.trial_workers, self.teacher_workers)

    @classmethod
    def on(
        cls,
        hardware: Hardware | None,
        *,
        micro_batch: int = 4,
        workers: int | tuple[int, int] | None = None,
        trial_workers: int = 1,
        concurrent_trials: int | None = None,
        importance: Literal["auto", "resident", "streamed"] = "auto",
        recompute: bool = False,
        teacher: Literal["auto", "whole", "sharded"] = "auto",
        asynchronous: bool = True,
    ) -> Layout:
        """One worker a device where nothing else is said, and as many trials as all accelerators have room for.
        `workers` is their number, or the fewest and the most."""
        least, most = workers if isinstance(workers, tuple) else (workers, workers)
        if hardware is not None and hardware.accelerator:
            room = max(1, hardware.count // trial_workers)
            concurrent_trials = min(concurrent_trials or room, room)
        return cls(
            micro_batch=micro_batch,
            workers=least or (1 if hardware is None else hardware.count),
            most_workers=None if most == least else most,
            trial_workers=trial_workers,
            trials_at_once=concurrent_trials,
            accelerator=hardware is not None and hardware.accelerator,
            importance=importance,
            recompute=recompute,
            teacher=teacher,
            memory=None if hardware is None else hardware.memory,
            asynchronous=asynchronous,
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

    def training(
        self,
        student: Architecture,
        group: int | None = None,
        passes: int = 1,
        lifted: int | None = None,
        pairs: int = 0,
        compared: int = 0,
    ) -> int:
        """A student in training, in float32; None for one process by itself, else its state is spread over so
        many workers. An optimizer step is made of so many `passes` of a worker.

        Weights, gradients and moments, also of a projection to `lifted` channels; what a pass keeps of each
        layer, and the gradients of the final hidden states and of the head, which the loss forms at once; a
        chunk of logits. Of `pairs` of hidden states that are compared, `compared` channels wide, what their
        distance takes. Products in bfloat16 keep a copy of the weights.
        """
        parameters = self.family.parameters(student)
        projection = (lifted or 0) * student.hidden
        size = (training_bytes(self.family, student) + TRAINING_STATE_BYTES * projection) // (group or 1)
        kept = activation_bytes(student, self.value, recompute=self.layout.recompute)
        busy = self.tokens * (kept + FINAL_BYTES * student.hidden + pairs * STATE_BYTES * compared)
        busy += 4 * student.vocab * student.hidden + self.logits
        if group is None or (group == 1 and self.value == "float32"):
            copies = 0 if self.value == "float32" else (parameters + projection) * BYTES[self.value]
            return size + copies + busy
        whole, last = self._whole(student, projection, passes)
        return size + whole + max(busy, last)

    def _whole(self, student: Architecture, projection: int, passes: int) -> tuple[int, int]:
        """Of a student in shards, what is whole during a pass, and what at its end, when nothing of the layers
        is kept any more: weights in the type of products, and gradients, whose sums are in float32."""
        value, parameters = BYTES[self.value], self.family.parameters(student) + projection
        outside = self.family.embedding_parameters(student) + projection
        layer = (parameters - outside) // student.layers
        last = (value + 4) * max(outside, layer)
        if self.layout.accelerator:
            return value * (outside + 2 * layer), last  # one layer computes while the next one comes
        # On a CPU all weights stay until the step is over, and all gradients where it has several passes.
        return (value + (4 if passes > 1 else 0)) * parameters, last

    def checkpoint(self, student: Architecture, workers: int) -> int:
        """The copy of its state that each of so many workers keeps for checkpoints: on an accelerator none, as it
        lies in the machine's memory."""
        if self.layout.accelerator or not self.layout.asynchronous:
            return 0
        return CHECKPOINT_BYTES * self.family.parameters(student) // workers

    def teaching(self, teacher: Architecture, group: int | None, student: Architecture) -> int:
        """A teacher that runs beside a `student` of so many workers, as `training` has them: whole, or a shard.
        And its final hidden states, twice: the loss takes them without each last one."""
        states, workers = 2 * self.tokens * teacher.hidden * BYTES[self.value], group or 1
        return self.running(teacher, workers, 4 * self.family.parameters(student) // workers) + states

    def running(self, teacher: Architecture, group: int, taken: int = 0) -> int:
        """The weights of a running teacher of so many workers, each with so much `taken` already: whole, or a
        shard."""
        whole = self.weights(teacher)
        if group == 1 or not self._spreads(whole, taken):
            return whole
        return self._shard(teacher, group)

    def _shard(
        self, arch: Architecture, group: int, stored: int | None = None, used: int | None = None
    ) -> int:
        """Of a model that only runs forward: with its embeddings and two layers, which come back for a pass. So
        many bytes a parameter where it is `stored` and where it is `used`, else those of the type of products."""
        value, outside = BYTES[self.value], self.family.embedding_parameters(arch)
        parameters = self.family.parameters(arch)
        layer = (parameters - outside) // arch.layers
        return parameters * (stored or value) // group + (outside + 2 * layer) * (used or value)

    def _spreads(self, whole: int, taken: int) -> bool:
        """As the run decides it. With memory that is not known the teacher stays whole."""
        if self.layout.teacher != "auto":
            return self.layout.teacher == "sharded"
        return self.layout.memory is not None and whole > TEACHER_SHARE * (self.layout.memory - taken)

    def measuring(self, student: Architecture, group: int = 1) -> int:
        """A student that is measured, shared by so many workers: float32 weights, their copy under bfloat16, a
        chunk of logits."""
        copies = 4 if self.value == "float32" else 4 + BYTES[self.value]
        if group > 1:
            return self._shard(student, group, stored=4, used=copies) + self.logits
        return self.family.parameters(student) * copies + self.logits

    def scored_cut(self, student: Architecture, group: int = 1) -> int:
        """An undistilled student that only runs forward, shared by so many workers; a chunk of logits."""
        whole = self.weights(student) if group == 1 else self._shard(student, group)
        return whole + self.logits
