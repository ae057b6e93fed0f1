"""Training loops of several processes that take turns, one optimizer step each, and are timed at it.

What else the machine does, and how fast it is just then, hits all of them alike, so ratios within a
round are much steadier than those of runs one after the other. The child's half needs torch alone: it
runs in environments where this program is not installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

MIB = 2**20


class Turn:
    """A child's end: it works only between a `go` of the parent and its own next message.

    Memory is the largest that was in use since `loaded`: resident, without what imports took; on a GPU
    what torch had allocated.
    """

    def __init__(self, reads: int, writes: int) -> None:
        """The two file descriptors that the parent left open. Call this when everything is imported."""
        self._commands, self._messages = os.fdopen(reads), os.fdopen(writes, "w")
        self._cuda = torch.cuda.is_available()
        self._imports = 0 if self._cuda else _status("VmRSS")
        self._start = (0.0, 0.0)

    def loaded(self, weights: int, **more: Any) -> None:
        """Models are there, of `weights` bytes together; returns when the first step may begin."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's mark of the largest size
        self._weights = weights
        self._say({"weights": weights, **more})

    def stepped(self, loss: float) -> None:
        """An optimizer step was made; returns when the next may begin."""
        if self._cuda:
            torch.cuda.synchronize()
        processor, wall = time.process_time() - self._start[0], time.perf_counter() - self._start[1]
        largest = torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")
        above = largest - self._imports - self._weights
        self._say({"processor": processor, "wall": wall, "loss": loss, "above": above})

    def _say(self, message: dict[str, Any]) -> None:
        if self._cuda:
            torch.cuda.empty_cache()  # the others have their turn on the same device
        print(json.dumps(message), file=self._messages, flush=True)
        if not self._commands.readline():  # the parent has seen enough
            os._exit(0)
        self._start = time.process_time(), time.perf_counter()


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Of one optimizer step: seconds, loss, and the bytes above the weights at the peak so far."""

    processor: float
    wall: float
    loss: float
    above: int


class Child:
    """The parent's end of one process. `failed` is why it can go on no more, in one line."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str], log: Path) -> None:
        """`command` gets two more arguments: the file descriptors for `Turn`."""
        here, there = os.pipe(), os.pipe()
        ends = (here[0], there[1])
        self._log, self.failed = log, ""
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, *map(str, ends)],
                pass_fds=ends,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )
        for end in ends:
            os.close(end)
        self._commands: IO[str] = os.fdopen(here[1], "w")
        self._messages: IO[str] = os.fdopen(there[0])
        self.about = self._hear()
        self.steps: list[StepCost] = []

    def step(self) -> None:
        """One optimizer step. Does nothing once the child has failed."""
        if self.failed:
            return
        print("go", file=self._commands, flush=True)
        message = self._hear()
        if message:
            self.steps.append(StepCost(**message))

    def close(self) -> None:
        self._commands.close()
        self._messages.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _hear(self) -> dict[str, Any]:
        if line := self._messages.readline():
            found: dict[str, Any] = json.loads(line)
            return found
        self.process.wait()
        lines = [text for text in self._log.read_text(errors="replace").splitlines() if text.strip()]
        self.failed = lines[-1].strip() if lines else f"ended with exit status {self.process.returncode}"
        return {}


def take_turns(children: Mapping[str, Child], rounds: int) -> None:
    """`rounds` steps of each, after one that is not counted, in an order that turns."""
    names = list(children)
    for name in names:
        children[name].step()
        children[name].steps.clear()
    for number in range(rounds):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name in turned if number % 2 else turned[::-1]:
            children[name].step()
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
