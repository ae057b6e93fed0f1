"""How much a downstream measure falls when layers are removed (Llama-3.1-Minitron chose its block so)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from minitron_ray.evaluation import AnyTask
from minitron_ray.importance.metric import RemovalMetric

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from minitron_ray.evaluation.task import Batch, Examples, Material


class OnTask(RemovalMetric):
    """The whole network's mean value on a task less the mean value without the layers."""

    kind: Literal["task"] = "task"
    task: AnyTask
    """What is measured; a plug-in of `evaluation/tasks/`."""

    @property
    def label(self) -> str:
        return f"task({self.task.label}{', iterative' if self.iterative else ''})"

    def examples(self, material: Material) -> Examples:
        return self.task.examples(material)

    def values(
        self, outputs: Sequence[Tensor], batch: Batch, head: Tensor, softcap: float | None = None
    ) -> NDArray:
        import numpy as np

        return np.stack([self.task.values(hidden, batch, head, softcap) for hidden in outputs])

    def reduce(self, values: NDArray) -> NDArray:
        means: NDArray = values.mean(axis=1)
        return means[0] - means[1:]

    def inputs(self, base: Path) -> dict[str, Any]:
        return self.task.inputs(base)
