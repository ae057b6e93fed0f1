"""What stages compute on, as far as a plan needs it: how fast, how much memory, how many."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

UTILIZATION: Final = 0.4
"""Share of a device's peak that training is taken to reach. Published training of 8B models in bfloat16
reaches 33 to 39 % of an H100's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKind:
    """A device as its vendor describes it."""

    flops: float
    """Operations a second at its peak, dense, in bfloat16."""
    memory: int
    """Bytes."""


KINDS: Final[Mapping[str, DeviceKind]] = MappingProxyType(
    {
        "a100": DeviceKind(flops=312e12, memory=80 * 2**30),
        "h100": DeviceKind(flops=989e12, memory=80 * 2**30),
        "h200": DeviceKind(flops=989e12, memory=140 * 2**30),
        "b200": DeviceKind(flops=2250e12, memory=178 * 2**30),
    }
)
"""From the vendors' data sheets, without sparsity; of boards with the full power (SXM)."""
_SLOWER: Final = ("pcie", "nvl")
"""In the names of boards of the Hopper kinds that are slower than the ones above."""


def peak_of(name: str) -> float | None:
    """The peak in bfloat16, operations a second, of the device that its driver calls `name`
    (`NVIDIA H100 80GB HBM3`). None for one that is not in `KINDS`."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    kind = next((kind for kind in KINDS if kind in words), None)
    if kind is None or (kind.startswith("h") and any(word in _SLOWER for word in words)):
        return None
    return KINDS[kind].flops


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """`count` equal devices."""

    name: str
    """For people: `h100`, or what the probe ran on."""
    count: int
    flops: float
    """Operations a second that one device is taken to reach, utilization included."""
    memory: int | None
    """Bytes of one device; None where it is not known."""
    accelerator: bool = True
    """Whether it is apart from the machine's memory."""
    source: str
    """Where the speed is from, for people: `40% of 989 TFLOP/s`, `measured by the probe`."""

    def device_seconds(self, flops: float) -> float:
        """Seconds of one device for so many operations."""
        return flops / self.flops

    def text(self) -> str:
        """For people: `8 x h100 at 396 TFLOP/s each (40% of 989 TFLOP/s)`."""
        many = f"{self.count} x {self.name}" if self.count > 1 else self.name
        each = " each" if self.count > 1 else ""
        return f"{many} at {rate_text(self.flops)}{each} ({self.source})"


def rate_text(flops: float) -> str:
    """Operations a second for people: `396 TFLOP/s`, `71.3 GFLOP/s`."""
    sizes = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6))
    prefix, size = next((pair for pair in sizes if flops >= pair[1]), sizes[-1])
    return f"{flops / size:.{0 if flops >= 100 * size else 1}f} {prefix}FLOP/s"
