"""`Serving`: what the engine that is to serve the student asks of its sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import Field, field_validator

from minitron_ray.core.kinds import Section

Kernel = Literal["int4", "int8", "fp8", "fp8_block"]

SERVED_AXES: Final = ("hidden", "heads", "kv_heads", "mlp", "expert_mlp")
"""The axes that the matrices of a layer are made of."""


class Multiples(NamedTuple):
    """What a kernel's matrices are multiples of, on each device."""

    rows: int
    """Of the inputs, along which values are summed and share a scale."""
    columns: int
    """Of the outputs."""


KERNELS: Final[dict[Kernel, Multiples]] = {
    "int4": Multiples(128, 64),  # GPTQ and AWQ in groups of 128, in Marlin's tiles
    "int8": Multiples(16, 16),  # one scale a row; CUTLASS and torch's scaled matrix product align to 16
    "fp8": Multiples(16, 16),
    "fp8_block": Multiples(128, 128),  # a scale for each 128 x 128 block
}
GGUF_ROWS: Final = {"k_quants": 256, "legacy": 32}
"""Values of one block, of which a row is made: Q2_K to Q6_K, and Q4_0 to Q8_0."""


class Serving(Section):
    """Shapes that the engine could not serve as asked are not proposed; `candidates` says why.

    Embedding and LM head are left out: engines pad the vocabulary, and kernels do not quantise them.
    """

    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """Devices that share each layer: heads and the MLP divide among them; KV groups do too, or where
    they are fewer, each stands on equally many."""
    kernels: tuple[Kernel, ...] = ()
    """Quantised matrix products whose multiples the matrices of every device must be."""
    gguf: Literal["k_quants", "legacy"] | None = None
    """Rows of whole blocks, so that no matrix falls back to another type: multiples of 256 for
    k-quants, of 32 for the types before them."""

    @field_validator("kernels")
    @classmethod
    def _each_kernel_once(cls, value: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
        twice = [kernel for place, kernel in enumerate(value) if kernel in value[:place]]
        if twice:
            raise ValueError(f"{twice[0]} is named twice; remove one of the two")
        return value

    def problem(self, axis: str, size: int, head_dim: int) -> str | None:
        """Why a student with this size on one of SERVED_AXES is not served; None where it is.

        An axis that the student does not have (0) has no matrices.
        """
        if size == 0:
            return None
        return self._undivided(axis, size) or next(self._misfits(axis, size, head_dim), None)

    def _undivided(self, axis: str, size: int) -> str | None:
        devices = self.tensor_parallel
        if axis == "hidden" or size % devices == 0:
            return None
        if axis == "kv_heads" and devices % size == 0:
            return None
        also = " and do not divide them" if axis == "kv_heads" else ""
        return f"{axis} {size} does not divide among {devices} devices{also} (serving.tensor_parallel)"

    def _misfits(self, axis: str, size: int, head_dim: int) -> Iterator[str]:
        """Widths on one device: the hidden size is whole on each, all others are shared out."""
        whole = size * head_dim if axis in ("heads", "kv_heads") else size
        share = whole if axis == "hidden" else whole // math.gcd(size, self.tensor_parallel)
        name = f"{axis} {size}" + (f" of {head_dim}" if whole != size else "")
        told = name if share == whole else f"{name}, {share} a device,"
        # Keys and values only come out of a matrix, all other widths also go into one.
        for kernel in self.kernels:
            rows, columns = KERNELS[kernel]
            multiple = columns if axis == "kv_heads" else math.lcm(rows, columns)
            if share % multiple:
                yield f"{told} is no multiple of {multiple} (serving.kernels: {kernel})"
        if self.gguf is not None and axis != "kv_heads" and whole % GGUF_ROWS[self.gguf]:
            yield f"{name} is no multiple of {GGUF_ROWS[self.gguf]} (serving.gguf: {self.gguf})"
