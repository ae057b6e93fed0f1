"""How well final hidden states predict the next token, without a (tokens x vocabulary) matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from minitron_ray.weights.softmax import distribution

HeadOrNone = TypeVar("HeadOrNone", Tensor, Tensor | None)

_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""Logits held at once: 64 MiB in float32 on a CPU, where caches matter; 512 MiB on a GPU."""
_SCORED_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
"""The same of either model where two are compared."""
_ROW_ELEMENTS = {"cpu": 2**18}
"""Logits that are worked on at once: on a CPU the megabyte of each operand stays in the cache."""


def common_rows(head: HeadOrNone, vocabulary: int | None) -> HeadOrNone:
    """The first `vocabulary` rows of an LM head (vocabulary, hidden), all of them for None. Two models of one
    tokenizer may be padded to unlike numbers of rows; those beyond the common part stand for no token."""
    return head if head is None or vocabulary is None or len(head) <= vocabulary else head[:vocabulary]


def chunks(tokens: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Slices of at most as many tokens as the logits of which fit the device's chunk."""
    size = max(64, _CHUNK_ELEMENTS.get(device.type, 2**24) // vocabulary)
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits as the network means them: c * tanh(logits / c) where it has a soft cap c."""
    return logits if softcap is None else (logits / softcap).tanh_().mul_(softcap)


@torch.no_grad()
def chunk_logits(hidden: Tensor, head: Tensor, softcap: float | None = None) -> Tensor:
    """Float32 logits (tokens, vocabulary) of the final hidden states (tokens, hidden) of one chunk,
    computed in the head's type."""
    with torch.autocast(hidden.device.type, enabled=False):
        return capped((hidden.to(head.dtype) @ head.T).float(), softcap)


def row_slices(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """All rows of a chunk's logits in slices that are to be worked on one after the other: on a CPU so many
    rows that a slice stays in the processor's cache, elsewhere all at once."""
    elements = _ROW_ELEMENTS.get(device.type)
    step = max(1, rows if elements is None else elements // vocabulary)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class _Head:
    """An LM head in the type of the computation, and room for the logits of one chunk, used again for each."""

    def __init__(self, weight: Tensor, softcap: float | None, tokens: int) -> None:
        self._weight, self._softcap = weight, softcap
        self._raw = torch.empty(tokens, len(weight), dtype=weight.dtype, device=weight.device)

    def project(self, states: Tensor) -> None:
        torch.mm(states.to(self._weight.dtype), self._weight.T, out=self._raw[: len(states)])

    def logits(self, rows: slice) -> Tensor:
        """Of some rows of the last chunk, float32; may be overwritten, and can then not be had again."""
        return capped(self._raw[rows].float(), self._softcap)


@torch.no_grad()
def sequence_scores(
    hidden: Tensor,
    head: Tensor,
    input_ids: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocabulary: int | None = None,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Cross entropy and KL(teacher || student) of each sequence, nats a token, float64 (samples,).

    `hidden` is (samples, tokens, hidden); the last position predicts nothing and is left out, so a
    sequence of T tokens has T - 1 predictions. Logits are computed in `dtype`, capped and compared in
    float32, over the first `vocabulary` rows of either head (None: all). Of the predictions those count
    that `counted` names, bool (samples, tokens - 1), at least one of each sequence; None for all.
    """
    head, teacher_head = common_rows(head, vocabulary).to(dtype), common_rows(teacher_head, vocabulary)
    samples, tokens, device = len(hidden), hidden.shape[1] - 1, hidden.device
    # Of a sequence by itself, as rows of a product may depend on how many there are; and of equal size, as
    # each chunk reads the whole head.
    most = max(64, _SCORED_ELEMENTS.get(device.type, _SCORED_ELEMENTS["cpu"]) // len(head))
    size = -(-tokens // -(-tokens // most))
    student, teacher = _Head(head, softcap, size), None
    if teacher_hidden is not None and teacher_head is not None:
        teacher = _Head(teacher_head.to(dtype), teacher_softcap, size)
    # One by one on the device: a sum that is fetched for each chunk would have a GPU wait for the host.
    found = torch.empty(1 if teacher is None else 2, samples, tokens, dtype=torch.float64, device=device)
    with torch.autocast(device.type, enabled=False):
        for sample in range(samples):
            for start in range(0, tokens, size):
                part = slice(start, min(start + size, tokens))
                student.project(hidden[sample, part])
                if teacher is not None and teacher_hidden is not None:
                    teacher.project(teacher_hidden[sample, part])
                for rows in row_slices(part.stop - start, len(head), device):
                    first, last = start + rows.start, start + rows.stop
                    labels = input_ids[sample, first + 1 : last + 1]
                    others = None if teacher is None else teacher.logits(rows)
                    _score(student.logits(rows), others, labels, found[:, sample, first:last])
    means = found.mean(-1) if counted is None else found.where(counted, 0.0).sum(-1) / counted.sum(-1)
    losses, *divergences = means.cpu()
    return losses, divergences[0] if divergences else None


def _score(student: Tensor, teacher: Tensor | None, labels: Tensor, out: Tensor) -> None:
    """Cross entropy and, where there is a teacher, divergence of each row into float64 (1 or 2, rows)."""
    log_sum = distribution(student)[1]
    out[0] = log_sum - student.gather(-1, labels[:, None])[:, 0]
    if teacher is not None:
        probabilities, teacher_sum = distribution(teacher)
        # Their difference before the mean over p, in which large numbers would cancel.
        offset = (teacher_sum - log_sum).float()[:, None]
        out[1] = teacher.sub_(student).sub_(offset).mul_(probabilities).sum(-1)
