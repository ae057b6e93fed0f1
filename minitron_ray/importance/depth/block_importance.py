"""Block Importance: how far a layer turns the residual stream (paper §2.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from minitron_ray.importance.metric import LayerMetric

if TYPE_CHECKING:
    from torch import Tensor


class BlockImportance(LayerMetric):
    """BI = 1 - E[cos(input, output)] over samples and tokens; an identity layer scores 0."""

    kind: Literal["block_importance"] = "block_importance"

    @property
    def label(self) -> str:
        return "block_importance"

    def evidence(self) -> CosineEvidence:
        return CosineEvidence()


class CosineEvidence:
    """The mean cosine, summed in float64."""

    def __init__(self) -> None:
        self._sum, self._tokens = 0.0, 0

    def add(self, before: Tensor, after: Tensor) -> None:
        x, y = before.detach().float(), after.detach().float()
        norms = x.square().sum(-1).mul_(y.square().sum(-1)).sqrt_().clamp_min_(1e-12)
        cosine = (x * y).sum(-1).div_(norms)
        self._sum += float(cosine.double().sum())
        self._tokens += cosine.numel()

    def score(self) -> float:
        return 1.0 - self._sum / self._tokens
