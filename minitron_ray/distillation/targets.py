"""`SparseTargets`: a few probabilities of the teacher's next-token distributions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTargets:
    """Of each token: `slots` ids of the vocabulary with a probability, and what is known of the rest.

    An id stands in one slot only, except that empty slots repeat an id with probability 0.
    """

    ids: Tensor
    """int64 (..., slots)."""
    probabilities: Tensor
    """float32 (..., slots); with `tail` they sum to 1."""
    tail: Tensor | None = None
    """float32 (...): the mass of all other ids together. None where the probabilities are an estimate
    of the whole distribution, in which the other ids have probability 0."""
    entropy: Tensor | None = None
    """float32 (...): nats of the teacher's own distribution. None takes it of the probabilities."""

    def flat(self) -> SparseTargets:
        """All tokens in one dimension."""
        return SparseTargets(
            ids=self.ids.flatten(0, -2),
            probabilities=self.probabilities.flatten(0, -2),
            tail=None if self.tail is None else self.tail.flatten(),
            entropy=None if self.entropy is None else self.entropy.flatten(),
        )

    def part(self, tokens: slice | Tensor) -> SparseTargets:
        """Some of the tokens of `flat`: a slice, or bool (tokens,)."""
        return SparseTargets(
            ids=self.ids[tokens],
            probabilities=self.probabilities[tokens],
            tail=None if self.tail is None else self.tail[tokens],
            entropy=None if self.entropy is None else self.entropy[tokens],
        )
