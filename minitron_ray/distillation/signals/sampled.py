"""Random draws from the teacher's distributions: an unbiased estimate of each in some 50 bytes.

Sparse Logit Sampling (Anshumann et al., arXiv 2503.16870): of n draws, an id that was drawn c times
stands for the probability c/n, whose mean over all draws is the teacher's. So is the mean of the
gradient of the forward KL divergence, which is linear in the teacher's probabilities.
"""

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

_UNIQUE_SHARE = 0.3
"""Different ids by draws. SmolLM2-135M had 14 of 50 on prose and 24 on tables and code; larger teachers
are surer and have fewer."""


class Sampled(StoredSignal):
    """`draws` of each distribution, one out of each of as many equal slices of its mass.

    Slices (stratified draws) leave the mean as it is and take off variance. The teacher's entropy is
    kept too, so that the value of the loss is an estimate of the divergence, also unbiased.
    """

    kind: Literal["sampled"] = "sampled"
    draws: Annotated[int, Field(ge=1, le=255)] = 50

    sparse: ClassVar[bool] = True
    seeded: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return f"{self.kind} {self.draws}"

    def bytes_a_token(self, hidden: int, vocabulary: int, value: int) -> float:
        """On average; it depends on how sure the teacher is."""
        unique = max(1.0, _UNIQUE_SHARE * self.draws)
        return unique * bytes_for(vocabulary * self.draws) + 1 + 2

    def encode(
        self, hidden: Tensor, head: Tensor, softcap: float | None, sequences: Sequence[int], seed: int
    ) -> dict[str, NDArray]:
        import numpy as np
        import torch

        from minitron_ray.weights.vocabulary import chunk_logits, chunks

        samples, tokens, _ = hidden.shape
        flat = hidden[:, :-1].flatten(0, 1)
        points = torch.from_numpy(
            np.concatenate([self._points(seed, number, tokens - 1) for number in sequences])
        )
        entries, uniques, entropies = [], [], []
        for part in chunks(len(flat), len(head), flat.device):
            log_probabilities = chunk_logits(flat[part], head, softcap).log_softmax(-1)
            probabilities = log_probabilities.exp()
            entropies.append(-(probabilities * log_probabilities).sum(-1).cpu())
            # In float32 the sum over a large vocabulary would lose the least likely ids.
            cumulative = probabilities.double().cumsum_(-1)
            at = points[part].to(flat.device) * cumulative[:, -1:]
            drawn = torch.searchsorted(cumulative, at, right=True).clamp_(max=len(head) - 1).cpu()
            packed, unique = self._counted(drawn, len(head))
            entries.append(packed)
            uniques.append(unique)
        unique = torch.cat(uniques).view(samples, tokens - 1)
        return {
            "lengths": unique.sum(-1).to(torch.int32).numpy(),
            "unique": unique.to(torch.uint8).numpy(),
            "entropy": torch.cat(entropies).view(samples, tokens - 1).half().numpy(),
            "entries": np.concatenate(entries),
        }

    def row(self, arrays: Mapping[str, NDArray], number: int) -> dict[str, NDArray]:
        """Sequences take as many entries as they have different ids."""
        start = int(arrays["lengths"][:number].sum())
        stop = start + int(arrays["lengths"][number])
        return {
            "unique": arrays["unique"][number],
            "entropy": arrays["entropy"][number],
            "entries": arrays["entries"][start:stop],
        }

    def decode(self, rows: Sequence[Mapping[str, NDArray]], device: torch.device) -> SparseTargets:
        import numpy as np

        from minitron_ray.distillation.targets import SparseTargets
        from minitron_ray.weights.device import on_device

        unique = np.stack([row["unique"] for row in rows])
        values = unpack(np.concatenate([row["entries"] for row in rows]))
        filled = np.arange(unique.max()) < unique[..., None]
        ids = np.zeros(filled.shape, dtype=np.int64)
        probabilities = np.zeros(filled.shape, dtype=np.float32)
        ids[filled], counts = np.divmod(values, self.draws)
        probabilities[filled] = (counts + 1) / self.draws
        entropy = np.stack([row["entropy"] for row in rows]).astype(np.float32)
        return SparseTargets(
            ids=on_device(ids, device),
            probabilities=on_device(probabilities, device),
            entropy=on_device(entropy, device),
        )

    def _points(self, seed: int, sequence: int, tokens: int) -> NDArray:
        """Where the draws of a sequence fall in [0, 1), rising in each row, float64 (tokens, draws).

        A function of seed and sequence alone: not of batches, devices or workers.
        """
        import numpy as np

        uniform = np.random.default_rng([seed, sequence]).random((tokens, self.draws))
        points: NDArray = (np.arange(self.draws) + uniform) / self.draws
        return points

    def _counted(self, drawn: Tensor, vocabulary: int) -> tuple[NDArray, Tensor]:
        """Rising ids (tokens, draws) as one number id x draws + count - 1 for each different id of a
        token, packed, and how many different ids each token has."""
        import torch

        first = torch.ones_like(drawn, dtype=torch.bool)
        first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        starts = first.flatten().nonzero()[:, 0]
        counts = torch.diff(starts, append=starts.new_tensor([drawn.numel()]))
        numbers = drawn[first] * self.draws + counts - 1
        return pack(numbers.numpy(), bytes_for(vocabulary * self.draws)), first.sum(-1)
