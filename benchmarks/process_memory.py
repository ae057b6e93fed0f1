"""The memory of the processes of this one's offspring, sampled while a command runs."""

from __future__ import annotations

import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final

INTERVAL: Final = 0.5
_MAPPING: Final = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)")


@dataclass(kw_only=True)
class Memory:
    """Of all processes together, in bytes, at the sample with the largest PSS."""

    KINDS: ClassVar[dict[str, str]] = {
        "pss": "PSS",
        "private": "  private (anonymous)",
        "weights": "  mapped: the teacher's weights",
        "signal": "  mapped: the teacher's signal",
        "other": "  mapped: libraries, Ray's store, text",
        "rss": "resident size, for comparison",
    }

    peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Memory.KINDS, 0))
    processes: int = 0


@contextmanager
def watch(title: str, weights: Path, results: Path) -> Iterator[Memory]:
    """Samples, until the block ends, all descendants of this process whose command line begins with `title`.

    `weights` is the teacher's folder, the signal is in the cache of `results`.
    """
    memory, ended = Memory(), threading.Event()
    places = {
        "weights": str(weights.resolve()),
        "signal": str(results.resolve() / ".cache" / "teacher_signal"),
    }

    def sample() -> None:
        while not ended.wait(INTERVAL):
            found, processes = _sample(title, places)
            if found["pss"] > memory.peak["pss"]:
                memory.peak, memory.processes = found, processes

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


def _sample(title: str, places: dict[str, str]) -> tuple[dict[str, int], int]:
    """Sizes, and the number of processes."""
    found, count = dict.fromkeys(Memory.KINDS, 0), 0
    for process in _descendants(os.getpid()):
        try:
            if not Path(f"/proc/{process}/cmdline").read_text(errors="replace").startswith(title):
                continue
            mappings = Path(f"/proc/{process}/smaps").read_text(errors="replace")
            rolled = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        count += 1
        sizes = _sizes(rolled)
        found["pss"] += sizes["Pss"]
        found["rss"] += sizes["Rss"]
        found["private"] += sizes["Pss_Anon"]
        mapped = sizes["Pss"] - sizes["Pss_Anon"]
        for name, place in places.items():
            part = _mapped(mappings, place)
            found[name] += part
            mapped -= part
        found["other"] += mapped
    return found, count


def _sizes(text: str) -> dict[str, int]:
    """The fields of `smaps_rollup`, in bytes."""
    pairs = (line.split() for line in text.splitlines()[1:])
    return {pair[0].rstrip(":"): 1024 * int(pair[1]) for pair in pairs}


def _mapped(mappings: str, place: str) -> int:
    """PSS of the mappings of files below `place`."""
    total, inside = 0, False
    for line in mappings.splitlines():
        if (match := _MAPPING.fullmatch(line)) is not None:
            inside = match[1].startswith(place)
        elif inside and line.startswith("Pss:"):
            total += 1024 * int(line.split()[1])
    return total


def _descendants(root: int) -> list[int]:
    children: defaultdict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                stat = (path / "stat").read_text()
            except OSError:
                continue
            children[int(stat.rpartition(")")[2].split()[1])].append(int(path.name))
    found, waiting = [], [root]
    while waiting:
        below = children[waiting.pop()]
        found += below
        waiting += below
    return found
