"""Where documents begin in packed sequences, for networks that are to see each of them by itself.

A document ends with the separator, the end-of-text token; what a sequence begins with counts from
position 0, though it may be the middle of one. Everything is None where no separator is given: the
sequence is then one text.

What follows a separator is left out of divergences between two models too, and of comparisons of their
hidden states: both are defined there, but about a token that nobody asks for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_ray.core.errors import MinitronError


def positions(ids: Tensor, separator: int | None) -> Tensor | None:
    """The place of each token in its document, int64 (samples, tokens), for `ids` of that shape.

    Given these and no mask, transformers lets no token attend to another document.
    """
    if separator is None:
        return None
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts = torch.zeros_like(ids)
    starts[:, 1:] = places[:, 1:] * (ids[:, :-1] == separator)
    return places - starts.cummax(1).values


def predicted(ids: Tensor, separator: int | None) -> Tensor | None:
    """Which tokens behind the first are predicted, bool (samples, tokens - 1): all but the first of each
    document, of which nothing before it says anything.

    Raises MinitronError for a sequence without any.
    """
    if separator is None:
        return None
    found = ids[:, :-1] != separator
    if not found.any(1).all():
        raise MinitronError(
            f"a sequence holds nothing but end-of-text tokens (id {separator}), so that nothing is predicted in it; "
            "remove such rows from data.source, or set `data.documents: joined`"
        )
    return found


def predictions(ids: Tensor, separator: int | None) -> int:
    """How many there are in all sequences of `ids`. Raises as `predicted` does."""
    found = predicted(ids, separator)
    return ids[:, 1:].numel() if found is None else int(found.sum())
