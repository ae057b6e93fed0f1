"""The teacher's final hidden states: the LM head turns them back into every logit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from minitron_ray.core.errors import MinitronError
from minitron_ray.distillation.signal import StoredSignal

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

_SCALE_BYTES = 4


class FinalHidden(StoredSignal):
    """`hidden` values a token instead of `vocabulary`; with `auto` the very values that were computed."""

    kind: Literal["final_hidden"] = "final_hidden"
    dtype: Literal["auto", "int8"] = "auto"
    """`auto` keeps the type of the computation. `int8` rounds each token's values to 1/127 of the
    largest of them: they are off by at most half of that."""

    @property
    def label(self) -> str:
        return self.kind if self.dtype == "auto" else f"{self.kind} {self.dtype}"

    def bytes_a_token(self, hidden: int, vocabulary: int, value: int) -> float:
        return hidden * value if self.dtype == "auto" else hidden + _SCALE_BYTES

    def encode(
        self, hidden: Tensor, head: Tensor, softcap: float | None, sequences: Sequence[int], seed: int
    ) -> dict[str, NDArray]:
        import torch

        if self.dtype == "int8":
            values = hidden.float()
            scale = values.abs().amax(-1) / 127
            # A token of zeros has scale 0: any divisor will do.
            rounded = (values / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round()
            return {
                "hidden": rounded.clamp(-127, 127).to(torch.int8).cpu().numpy(),
                "scale": scale.cpu().numpy(),
            }
        # numpy has no bfloat16: its bits are kept as int16.
        bits = hidden.contiguous().view(torch.int16) if hidden.dtype == torch.bfloat16 else hidden
        return {"hidden": bits.cpu().numpy()}

    def decode(self, rows: Sequence[Mapping[str, NDArray]], device: torch.device) -> Tensor:
        """Raises MinitronError for rows of several types."""
        import numpy as np
        import torch

        from minitron_ray.weights.device import on_device

        types = sorted({str(row["hidden"].dtype) for row in rows})
        if len(types) > 1:  # stacked they would all become one of them, bits of bfloat16 read as numbers
            raise MinitronError(
                f"the teacher's stored final hidden states are of several types ({', '.join(types)}), computed on "
                "unlike devices; set `precision: float32` or `precision: bfloat16` and run again"
            )
        stored = on_device(np.stack([row["hidden"] for row in rows]), device)
        if self.dtype == "int8":
            scale = on_device(np.stack([row["scale"] for row in rows]), device)
            return stored.float().mul_(scale[..., None])
        return stored.view(torch.bfloat16) if stored.dtype == torch.int16 else stored
