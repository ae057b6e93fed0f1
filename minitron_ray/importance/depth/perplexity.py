"""How much perplexity rises when layers are removed (paper §2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from minitron_ray.importance.metric import RemovalMetric

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from minitron_ray.evaluation.task import Batch


class Perplexity(RemovalMetric):
    """ln(perplexity without the layers / perplexity with them) on the calibration sequences.

    The logarithm, a difference of losses in nats a token, ranks as perplexity does and does not overflow.
    """

    kind: Literal["perplexity"] = "perplexity"

    @property
    def label(self) -> str:
        return "perplexity(iterative)" if self.iterative else "perplexity"

    def values(
        self, outputs: Sequence[Tensor], batch: Batch, head: Tensor, softcap: float | None = None
    ) -> NDArray:
        import numpy as np
        import torch

        from minitron_ray.weights.documents import predicted
        from minitron_ray.weights.vocabulary import sequence_scores

        ids = torch.from_numpy(batch.ids).to(head.device)
        score = partial(
            sequence_scores,
            head=head,
            input_ids=ids,
            dtype=head.dtype,
            softcap=softcap,
            counted=predicted(ids, batch.separator),
        )
        scores = (score(hidden) for hidden in outputs)
        return np.stack([losses.numpy() for losses, _ in scores])

    def reduce(self, values: NDArray) -> NDArray:
        losses: NDArray = values.mean(axis=1)
        return losses[1:] - losses[0]
