"""What a fault drill saw: the run's progress while it goes on, and what each fault cost. A part of `fault_drill.py`."""

from __future__ import annotations

import csv
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minitron_ray.results.store import Store

TOLERANCE = 1e-4
"""Nats between a step of the disturbed run and the same step of the calm one, where the number of workers
differed: sums are then added up in another order."""


@dataclass(kw_only=True)
class Fault:
    """One fault. Times are seconds since the drill began, or since the fault for `seconds_*`."""

    number: int
    kind: str
    target: str
    at: float
    step: int
    """The last step that was heard of before."""
    workers: int
    """Processes that trained."""
    restarted: bool = False
    """Whether processes of the group, or all, were started anew."""
    from_step: int | None = None
    """The checkpoint's that they went on from."""
    steps_lost: int = 0
    """Made before, and made again."""
    driver_exit: int | None = None
    """How the driver ended, where it did."""
    seconds_to_train: float | None = None
    """Until the next step was made; null: never."""
    seconds_to_catch_up: float | None = None
    """Until the next new step was made."""
    message: str = ""
    """What the driver said."""


@dataclass(kw_only=True)
class Progress:
    """Reads what a run leaves behind while it goes on; `poll` takes in what is new."""

    results: Path
    step: int = 0
    """Newest step heard of, whether new or made again."""
    highest: int = 0
    at: float = 0.0
    """Unix time of that."""
    checkpoint: int = 0
    """Newest whole checkpoint's step."""
    lag: int = 0
    """Steps that were made while a checkpoint was being written, at most; whether or not it became whole."""
    _read: int = 0

    @property
    def folder(self) -> Path | None:
        """The run's; None before there is one."""
        return next((path.parent for path in self.results.glob("*/*/run.json")), None)

    def poll(self) -> list[tuple[float, int]]:
        """Time and step of what was heard since the last call."""
        folder = self.folder
        if folder is None:
            return []
        before = self.checkpoint
        self.checkpoint = max(_steps(folder, "step"), default=before)
        begun = max(_steps(folder, "partial"), default=0)
        heard = []
        for event in self._events(folder / "events.jsonl"):
            if event.get("kind") == "stage_progress" and event.get("stage") == "distill" and "step" in event:
                self.step, self.at = int(event["step"]), float(event["at"])
                self.highest = max(self.highest, self.step)
                heard.append((self.at, self.step))
        if self.checkpoint > before:
            self.lag = max(self.lag, self.step - self.checkpoint)
        if begun > self.checkpoint:  # one that a fault cuts short never becomes whole
            self.lag = max(self.lag, self.step - begun)
        return heard

    def _events(self, path: Path) -> list[dict[str, Any]]:
        if not path.is_file():
            return []
        with path.open("rb") as stream:
            stream.seek(self._read)
            lines = stream.read().splitlines(keepends=True)
        found = []
        for line in lines:
            if not line.endswith(b"\n"):
                break  # it is being written
            self._read += len(line)
            try:
                found.append(json.loads(line))
            except ValueError:  # a driver was killed in the middle of this line
                continue
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Of the table `steps`."""
        assert self.folder is not None
        return Store(self.folder, self.folder.parent.name, self.folder.name).read("steps").to_pylist()


def _steps(run: Path, kind: str) -> list[int]:
    """Of a run's checkpoints that are whole (`step`) or being written (`partial`)."""
    found = (path.name.rpartition("-")[2] for path in run.glob(f"checkpoints/*/checkpoints/{kind}-*"))
    return [int(step) for step in found]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The drill as a whole."""

    faults: int
    recovered: int
    interval: int
    steps: int
    lag: int
    """Steps made while a checkpoint was being written: a fault may cost so many beside an interval."""
    rows_lost: int
    rows_doubled: int
    steps_lost: Sequence[int]
    workers: Sequence[int]
    seconds: Sequence[float]
    difference: float
    """Largest between a step's loss and the calm run's."""
    identical: int
    """Steps whose loss is the calm run's, bit by bit."""
    end_difference: float
    """Of the last validation loss."""
    wanted: int

    @property
    def passed(self) -> bool:
        return not self.broken()

    def broken(self) -> list[str]:
        """The goals that were missed."""
        goals = {
            f"{self.faults} faults, {self.wanted} wanted": self.faults >= self.wanted,
            f"{self.faults - self.recovered} faults without recovery": self.recovered == self.faults,
            f"{max(self.steps_lost, default=0)} steps lost": max(self.steps_lost, default=0)
            <= self.interval + self.lag,
            f"{self.rows_lost} rows lost": self.rows_lost == 0,
            f"{self.rows_doubled} rows doubled": self.rows_doubled == 0,
            f"losses differ by {self.difference:.2g}": self.difference <= self.tolerance,
            f"validation differs by {self.end_difference:.2g}": self.end_difference <= self.tolerance,
        }
        return [name for name, kept in goals.items() if not kept]

    @property
    def tolerance(self) -> float:
        return 0.0 if len(set(self.workers)) == 1 else TOLERANCE


def judge(faults: Sequence[Fault], progress: Progress, calm: Progress, interval: int, wanted: int) -> Verdict:
    """Compares the tables of the disturbed and the calm run."""
    rows, expected = progress.rows(), {row["step"]: row for row in calm.rows()}
    seen = Counter(row["step"] for row in rows)
    pairs = [(row["loss"], expected[row["step"]]["loss"]) for row in rows]
    ends = [max(table, key=lambda row: row["step"])["val_loss"] for table in (rows, [*expected.values()])]
    return Verdict(
        faults=len(faults),
        recovered=sum(fault.seconds_to_train is not None for fault in faults),
        interval=interval,
        lag=max(progress.lag, calm.lag),
        steps=len(expected),
        rows_lost=len(expected.keys() - seen.keys()),
        rows_doubled=sum(count - 1 for count in seen.values()),
        steps_lost=[fault.steps_lost for fault in faults],
        workers=sorted({row["workers"] for row in [*rows, *expected.values()]}),
        seconds=[fault.seconds_to_train for fault in faults if fault.seconds_to_train is not None],
        difference=max(abs(one - other) for one, other in pairs),
        identical=sum(one == other for one, other in pairs),
        end_difference=abs(ends[0] - ends[1]),
        wanted=wanted,
    )


def as_text(verdict: Verdict, faults: Sequence[Fault], head: str) -> str:
    """The report."""
    lines = [head, ""]
    lines += [
        f"{'':3} {'fault':15} {'on':7} {'step':>5} {'lost':>4} {'s to train':>10} {'caught up':>9}  driver"
    ]
    for one in faults:
        seconds = [f"{value:.1f}" if value is not None else "-" for value in
                   (one.seconds_to_train, one.seconds_to_catch_up)]  # fmt: skip
        ended = "went on" if one.driver_exit is None else f"exit {one.driver_exit}; run again"
        lines.append(
            f"{one.number:3} {one.kind:15} {one.target:7} {one.step:5} {one.steps_lost:4} {seconds[0]:>10} "
            f"{seconds[1]:>9}  {ended}"
        )
    lines += ["", f"{verdict.faults} faults, {verdict.recovered} recoveries; {verdict.steps} steps by "
              f"{' or '.join(map(str, verdict.workers))} workers, a checkpoint every {verdict.interval}"]  # fmt: skip
    for kind in dict.fromkeys(fault.kind for fault in faults):
        own = [fault for fault in faults if fault.kind == kind]
        times = [fault.seconds_to_train for fault in own if fault.seconds_to_train is not None]
        if times:
            lines.append(
                f"  {kind:15} {len(own):2}: median {statistics.median(times):5.1f} s, at most {max(times):5.1f} s; "
                f"steps lost at most {max(fault.steps_lost for fault in own)}"
            )
    lines += [
        f"steps lost: {sum(verdict.steps_lost)} in all, at most {max(verdict.steps_lost, default=0)} by one fault "
        f"(an interval is {verdict.interval}, and {verdict.lag} more were made while a checkpoint was written)",
        f"rows: {verdict.rows_lost} lost, {verdict.rows_doubled} doubled",
        f"losses: {verdict.identical} of {verdict.steps} steps bit by bit those of the calm run, largest difference "
        f"{verdict.difference:.2g}; last validation differs by {verdict.end_difference:.2g} "
        f"(allowed {verdict.tolerance:g})",
        "passed" if verdict.passed else f"FAILED: {'; '.join(verdict.broken())}",
    ]
    return "\n".join(lines) + "\n"


def write(folder: Path, report: str, faults: Sequence[Fault]) -> None:
    """`report.txt` and `faults.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.txt").write_text(report)
    with (folder / "faults.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, [column.name for column in fields(Fault)], lineterminator="\n")
        table.writeheader()
        for fault in faults:
            row = {name: round(value, 2) if isinstance(value, float) else value
                   for name, value in asdict(fault).items()}  # fmt: skip
            table.writerow(row)
