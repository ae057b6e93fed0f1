"""How well final hidden states predict the next token, without a (tokens x vocabulary) matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

HeadOrNone = TypeVar("HeadOrNone", Tensor, Tensor | None)

_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""Logits held at once: 64 MiB in float32 on a CPU, where caches matter; 512 MiB on a GPU."""


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
    samples = len(hidden)
    head, teacher_head = common_rows(head, vocabulary).to(dtype), common_rows(teacher_head, vocabulary)
    teacher_head = None if teacher_head is None else teacher_head.to(dtype)
    losses = torch.empty(samples, dtype=torch.float64)
    divergences = None if teacher_hidden is None else torch.empty(samples, dtype=torch.float64)
    with torch.autocast(hidden.device.type, enabled=False):
        for sample in range(samples):
            loss = divergence = 0.0
            here = slice(None) if counted is None else counted[sample]
            targets, states = input_ids[sample, 1:][here], hidden[sample, :-1][here]
            others = None if teacher_hidden is None else teacher_hidden[sample, :-1][here]
            for part in chunks(len(targets), len(head), hidden.device):
                labels = targets[part, None]
                logits = (states[part].to(dtype) @ head.T).float()
                log_student = capped(logits, softcap).log_softmax(-1)
                loss -= log_student.gather(-1, labels).double().sum().item()
                if others is not None and teacher_head is not None:
                    logits = others[part].to(dtype) @ teacher_head.T
                    log_teacher = capped(logits.float(), teacher_softcap).log_softmax(-1)
                    divergence += (log_teacher.exp() * (log_teacher - log_student)).sum().item()
            losses[sample] = loss / len(targets)
            if divergences is not None:
                divergences[sample] = divergence / len(targets)
    return losses, divergences
