"""The likeliest tokens of each distribution, and the mass of all others as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from minitron_ray.distillation.packing import bytes_for, pack, unpack
from minitron_ray.distillation.signal import StoredSignal

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from minitron_ray.distillation.targets import SparseTargets

_TAIL_BYTES = 4


class TopK(StoredSignal):
    """Exact on the `k` likeliest tokens; how the rest is spread is not known, so gradients are biased."""

    kind: Literal["top_k"] = "top_k"
    k: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Tokens kept; all of them where the vocabulary has fewer."""

    sparse: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return f"{self.kind} {self.k}"

    def bytes_a_token(self, hidden: int, vocabulary: int, value: int) -> float:
        return min(self.k, vocabulary) * (bytes_for(vocabulary) + 2) + _TAIL_BYTES

    def encode(
        self, hidden: Tensor, head: Tensor, softcap: float | None, sequences: Sequence[int], seed: int
    ) -> dict[str, NDArray]:
        import torch

        from minitron_ray.weights.vocabulary import chunk_logits, chunks

        samples, tokens, _ = hidden.shape
        flat = hidden[:, :-1].flatten(0, 1)
        ids, probabilities, tails = [], [], []
        for part in chunks(len(flat), len(head), flat.device):
            whole = chunk_logits(flat[part], head, softcap).softmax(-1)
            likely, at = whole.topk(min(self.k, len(head)), dim=-1)
            ids.append(at.cpu())
            probabilities.append(likely.half().cpu())
            tails.append(whole.scatter_(-1, at, 0.0).sum(-1).cpu())  # 1 - sum would cancel
        places = torch.cat(ids).unflatten(0, (samples, tokens - 1)).numpy()
        return {
            "ids": pack(places, bytes_for(len(head))),
            "probabilities": torch.cat(probabilities).unflatten(0, (samples, tokens - 1)).numpy(),
            "tail": torch.cat(tails).unflatten(0, (samples, tokens - 1)).numpy(),
        }

    def decode(self, rows: Sequence[Mapping[str, NDArray]], device: torch.device) -> SparseTargets:
        import numpy as np

        from minitron_ray.distillation.targets import SparseTargets
        from minitron_ray.weights.device import on_device

        ids = on_device(unpack(np.stack([row["ids"] for row in rows])), device)
        tail = on_device(np.stack([row["tail"] for row in rows]), device)
        probabilities = on_device(np.stack([row["probabilities"] for row in rows]), device).float()
        # They were rounded to 11 bits; together with the tail they are to be 1.
        probabilities *= ((1 - tail) / probabilities.sum(-1))[..., None]
        return SparseTargets(ids=ids, probabilities=probabilities, tail=tail)
