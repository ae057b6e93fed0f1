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

        from minitron_ray.weights.documents import predicted
        from minitron_ray.weights.vocabulary import chunk_logits, chunks

        # A soft cap is monotone and changes no ranking.
        ids = torch.from_numpy(batch.ids).to(hidden.device)
        inputs, labels = hidden[:, :-1].flatten(0, 1), ids[:, 1:]
        parts = chunks(len(inputs), len(head), inputs.device)
        best = torch.cat([chunk_logits(inputs[part], head).argmax(-1) for part in parts])
        right = best.view(labels.shape).eq(labels).double()
        counted = predicted(ids, batch.separator)
        share = right.mean(1) if counted is None else (right * counted).sum(1) / counted.sum(1)
        result: NDArray = share.cpu().numpy()
        return result
