"""How well final hidden states predict the next token, without a (tokens x vocabulary) matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from minitron_ray.weights.softmax import distribution

HeadOrNone = TypeVar("HeadOrNone", Tensor, Tensor | None)

_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""Logits held at once: 64 MiB in float32 on a CPU, where caches matter; 512 MiB on a GPU."""
_ROW_ELEMENTS = {"cpu": 2**18}
"""Logits that are worked on at once: on a CPU the megabyte of each operand stays in the cache."""
_SCORED = {"cpu": (256, 512), "cuda": (8192, 16384)}
"""The same where sequences are scored, as tokens and words of the vocabulary."""
_HEAD_ELEMENTS = {"cpu": 2**20}
"""Of a head that is multiplied at once with few tokens: on a CPU a product with all of it takes up to a third
longer."""
_FEW_TOKENS = 512
"""Fewer than these."""


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


def project(states: Tensor, head: Tensor, out: Tensor) -> Tensor:
    """states · headᵀ into `out` (tokens, vocabulary), which is returned; both of the head's type, or `out` float32."""
    elements = _HEAD_ELEMENTS.get(states.device.type)
    step = len(head) if elements is None or len(states) >= _FEW_TOKENS else max(1, elements // head.shape[1])
    for start in range(0, len(head), step):
        part = slice(start, start + step)
        if out.dtype == head.dtype:
            torch.mm(states, head[part].T, out=out[:, part])
        else:
            out[:, part] = states @ head[part].T
    return out


@torch.no_grad()
def chunk_logits(hidden: Tensor, head: Tensor, softcap: float | None = None) -> Tensor:
    """Float32 logits (tokens, vocabulary) of the final hidden states (tokens, hidden) of one chunk,
    computed in the head's type."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.empty(len(hidden), len(head), device=hidden.device)
        return capped(project(hidden.to(head.dtype), head, logits), softcap)


def row_slices(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """All rows of a chunk's logits in slices that are to be worked on one after the other: on a CPU so many
    rows that a slice stays in the processor's cache, elsewhere all at once."""
    elements = _ROW_ELEMENTS.get(device.type)
    step = max(1, rows if elements is None else elements // vocabulary)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


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
    student = _Model(hidden, head, softcap)
    teacher = None
    if teacher_hidden is not None and teacher_head is not None:
        teacher = _Model(teacher_hidden, teacher_head.to(dtype), teacher_softcap)
    # Of a sequence by itself, as rows of a product may depend on how many there are; and of equal size, as
    # each chunk reads the whole head.
    most, words = _SCORED.get(device.type, _SCORED["cpu"])
    size = -(-tokens // -(-tokens // most))
    # One by one on the device: a sum that is fetched for each chunk would have a GPU wait for the host.
    found = torch.empty(1 if teacher is None else 2, samples, tokens, dtype=torch.float64, device=device)
    with torch.autocast(device.type, enabled=False):
        for sample in range(samples):
            for start in range(0, tokens, size):
                part = slice(start, min(start + size, tokens))
                labels = input_ids[sample, part.start + 1 : part.stop + 1]
                found[:, sample, part] = _scores(student, teacher, sample, part, labels, words)
    means = found.mean(-1) if counted is None else found.where(counted, 0.0).sum(-1) / counted.sum(-1)
    losses, *divergences = means.cpu()
    return losses, divergences[0] if divergences else None


class _Model(NamedTuple):
    """What logits are computed from."""

    hidden: Tensor
    """(samples, tokens, hidden)"""
    head: Tensor
    """(vocabulary, hidden), in the type of the computation."""
    softcap: float | None

    def logits(self, sample: int, tokens: slice, words: slice) -> Tensor:
        """Float32 (tokens, words)."""
        states = self.hidden[sample, tokens].to(self.head.dtype)
        return capped((states @ self.head[words].T).float(), self.softcap)


def _scores(
    student: _Model, teacher: _Model | None, sample: int, tokens: slice, labels: Tensor, words: int
) -> Tensor:
    """Cross entropy and, where there is a teacher, divergence of each prediction, float64 (1 or 2, tokens).

    So many words of the vocabulary at a time: probabilities within such a block, and the blocks' own. The
    divergence is that of the blocks' probabilities, and the mean over them of that within each (chain rule).
    """
    sums, teacher_sums, within = [], [], []
    chosen = torch.full((len(labels),), torch.nan, device=labels.device)  # as it stays for what is no word
    for start in range(0, len(student.head), words):
        block = slice(start, min(start + words, len(student.head)))
        logits = student.logits(sample, tokens, block)
        sums.append(distribution(logits)[1])
        at = (labels - start).clamp(0, logits.shape[1] - 1)
        chosen = torch.where(labels == at + start, logits.gather(-1, at[:, None])[:, 0], chosen)
        if teacher is not None:
            others = teacher.logits(sample, tokens, block)
            probabilities, teacher_sum = distribution(others)
            teacher_sums.append(teacher_sum)
            # Their difference before the mean over p, in which large numbers would cancel.
            offset = (teacher_sum - sums[-1]).float()[:, None]
            within.append(others.sub_(logits).sub_(offset).mul_(probabilities).sum(-1))
    blocks = torch.stack(sums)
    losses = blocks.logsumexp(0) - chosen
    if teacher is None:
        return losses[None]
    log_teacher = torch.stack(teacher_sums).log_softmax(0)
    divergences = log_teacher.exp() * (log_teacher - blocks.log_softmax(0) + torch.stack(within))
    return torch.stack([losses, divergences.sum(0)])
