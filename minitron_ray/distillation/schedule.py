"""The learning rate as a function of tokens seen: linear warm-up, then cosine decay."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """`peak` is reached after `warmup` x `tokens`, `minimum` at `tokens`."""

    peak: float
    minimum: float
    warmup: float
    tokens: int

    def rate(self, tokens: float) -> float:
        """The rate at `tokens` seen so far, 0 <= tokens <= self.tokens."""
        rise = self.warmup * self.tokens
        if tokens < rise:
            return self.peak * tokens / rise
        progress = min(1.0, (tokens - rise) / max(1.0, self.tokens - rise))
        return self.minimum + (self.peak - self.minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))
