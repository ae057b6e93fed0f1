"""Probabilities and their logarithms in one pass of exponentials."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def distribution(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (tokens, vocabulary), and the logarithm of each row's sum of exponentials, float64 (tokens,).

    log p = logit - log sum: one pass of exponentials for both, where log_softmax and exp make two.
    """
    probabilities = logits.softmax(-1)
    # The likeliest has at least 1 / vocabulary, so that its logarithm is exact. In float64, as the sum is of
    # the size of a logit, which of a peaked distribution would round off more than the whole loss.
    return probabilities, logits.amax(-1).double() - probabilities.amax(-1).double().log()
