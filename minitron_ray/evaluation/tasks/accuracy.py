"""How often the most probable token is the next one, on the calibration sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from minitron_ray.evaluation.task import Batch, Material, Sequences, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


class Accuracy(Task):
    """Top-1 accuracy of next-token prediction; one value a sequence."""

    kind: Literal["accuracy"] = "accuracy"

    @property
    def label(self) -> str:
        return "accuracy"

    def examples(self, material: Material) -> Sequences:
        return material.calibration

    def values(self, hidden: Tensor, batch: Batch, head: Tensor, softcap: float | None = None) -> NDArray:
        import torch

        from minitron_ray.weights.vocabulary import chunk_logits, chunks

        # A soft cap is monotone and changes no ranking.
        inputs, labels = hidden[:, :-1].flatten(0, 1), torch.from_numpy(batch.ids)[:, 1:].to(hidden.device)
        parts = chunks(len(inputs), len(head), inputs.device)
        best = torch.cat([chunk_logits(inputs[part], head).argmax(-1) for part in parts])
        result: NDArray = best.view(labels.shape).eq(labels).double().mean(1).cpu().numpy()
        return result
