"""`Signal`: what a file of `signals/` provides.

A signal is what a student learns from in place of the running teacher. Kinds that are stored encode
the teacher's final hidden states as arrays of bytes, sequence by sequence, and decode them again as
what the fused head takes: final hidden states, or a few probabilities a token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from minitron_ray.core.kinds import Plugin

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from minitron_ray.distillation.targets import SparseTargets


class Signal(Plugin):
    """One way of having the teacher's predictions at hand."""

    sparse: ClassVar[bool] = False
    """Whether it has few probabilities of each token's distribution instead of all."""

    @property
    def label(self) -> str:
        """The kind with what distinguishes it, for people."""
        return str(self.kind)  # type: ignore[attr-defined]


class StoredSignal(Signal):
    """A signal that is computed once and read from files afterwards."""

    seeded: ClassVar[bool] = False
    """Whether it is drawn at random: the experiment's seed is then part of what it is."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the bytes, the teacher and its text apart."""
        return self.model_dump(mode="json")

    @abstractmethod
    def bytes_a_token(self, hidden: int, vocabulary: int, value: int) -> float:
        """Size on disk, for a teacher of these sizes that computes in values of `value` bytes."""

    @abstractmethod
    def encode(
        self, hidden: Tensor, head: Tensor, softcap: float | None, sequences: Sequence[int], seed: int
    ) -> dict[str, NDArray]:
        """Final hidden states (samples, tokens, hidden) of the sequences with these numbers, as arrays.

        `head` is (vocabulary, hidden), `softcap` of the logits. Arrays of later batches are appended.
        """

    def row(self, arrays: Mapping[str, NDArray], number: int) -> dict[str, NDArray]:
        """What `arrays`, memory-mapped and of many sequences, hold of the one in place `number`."""
        return {name: array[number] for name, array in arrays.items()}

    @abstractmethod
    def decode(self, rows: Sequence[Mapping[str, NDArray]], device: torch.device) -> Tensor | SparseTargets:
        """Of sequences as `row` gives them: final hidden states (samples, tokens, hidden), or sparse
        targets of every token but the last, which predicts nothing."""
