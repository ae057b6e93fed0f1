"""The view of a run that goes on: `open_view` gives the listener that fits the terminal.

A terminal gets one picture that is redrawn in place; anything else gets `Heartbeat` lines.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from minitron_ray.core.events import Event
from minitron_ray.core.units import format_count, format_seconds
from minitron_ray.report.event_lines import EventLines
from minitron_ray.report.heartbeat import Heartbeat, amount, figures
from minitron_ray.report.progress import ProgressModel, Stage, Trial
from minitron_ray.report.text import NONE
from minitron_ray.results.runs import STAGES

_MARKS = {"waiting": " ", "running": ">", "finished": "✓", "reused": "=", "failed": "✗"}
_STYLES = {"waiting": "dim", "running": "bold", "finished": "green", "reused": "cyan", "failed": "red"}
_TRIAL_STYLES = {"running": "bold", "completed": "green", "stopped": "dim", "failed": "red"}
_BAR = 20
_STOPS = "Ctrl-C stops at the next safe point"
_TRIALS_AT_LEAST = 3


@contextmanager
def open_view(
    stderr: TextIO,
    *,
    quiet: bool = False,
    as_events: bool = False,
    stages: Sequence[str] = STAGES,
    hint: str = _STOPS,
) -> Iterator[Callable[[Event], None]]:
    """A listener for `EventBus` that shows the run, which has these stages, on `stderr` until the block ends.

    `quiet` shows nothing but failures and notes; `as_events` writes JSON for another program instead.
    `hint` says below the picture what Ctrl-C does.
    """
    console = Console(file=stderr, highlight=False)
    if as_events:
        yield EventLines(stderr)
    elif quiet:
        heartbeat = Heartbeat(stderr, stages)
        loud = ("stage_failed", "note")
        yield lambda event: heartbeat(event) if event.kind in loud else None
    elif console.is_terminal and not console.is_dumb_terminal:
        with LiveView(console, stages, hint) as view:
            yield view
    else:
        yield Heartbeat(stderr, stages)


class LiveView:
    """A listener and context manager that redraws its console twice a second."""

    def __init__(
        self,
        console: Console,
        stages: Sequence[str] = STAGES,
        hint: str = _STOPS,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._console = console
        self._hint = hint
        self._now = now
        self._model = ProgressModel(stages)
        self._lock = threading.Lock()
        self._live = Live(
            console=console, get_renderable=self.picture, refresh_per_second=2, redirect_stdout=False
        )

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._model.apply(event)

    def picture(self) -> RenderableType:
        """What is on the screen now, in no more lines than the screen has."""
        with self._lock:
            return draw(self._model, self._now(), self._console.width, self._console.height, self._hint)


def draw(model: ProgressModel, now: float, width: int, height: int, hint: str = _STOPS) -> RenderableType:
    """The run as one picture of at most `width` columns and about `height` lines."""
    stages = [line for stage in model.stages.values() for line in _stage(stage, now, width)]
    parts: list[RenderableType] = [_header(model, now, width), *stages]
    foot = _footer(model, width, hint)
    room = height - len(parts) - len(foot) - 6  # the table's head, the empty line, the last failure
    if model.trials and not _over(model):
        parts += ["", _trials(list(model.trials.values()), max(room, _TRIALS_AT_LEAST), width)]
    return Group(*parts, *foot)


def _over(model: ProgressModel) -> bool:
    """Whether the search is history and its trials, and those of baselines, would only be in the way."""
    search, baselines = model.stages.get("search"), model.stages.get("baselines")
    if baselines is not None and baselines.status == "running":
        return False
    return search is None or search.status in ("finished", "reused")


def _header(model: ProgressModel, now: float, width: int) -> Text:
    name = model.experiment or "starting"
    line = Text.assemble((name, "bold"), f"  {format_seconds(model.elapsed(now))}")
    if cell_len(line.plain) + 2 + len(model.run_id) <= width:
        line = Text.assemble((name, "bold"), f"  {model.run_id}  {format_seconds(model.elapsed(now))}")
    return line


def _stage(stage: Stage, now: float, width: int) -> Iterator[Text]:
    """One line with the stage's bar, and while it runs a second one with its figures."""
    mark, style = _MARKS[stage.status], _STYLES[stage.status]
    line = Text(f"{mark} {stage.name:<10} ", style=style)
    if stage.status == "running":
        fraction = stage.fraction
        if fraction is not None:
            filled = round(_BAR * fraction)
            line.append("━" * filled, style="cyan").append("━" * (_BAR - filled), style="dim")
            line.append(f" {math.floor(100 * fraction):3d}%  ")
        line.append(amount(stage) or "working")
        yield line
        rest = figures(stage, now)[1 if amount(stage) else 0 :]
        yield from _wrapped(rest, width, indent=13)
    else:
        time_taken = None if stage.seconds is None else format_seconds(stage.seconds)
        said = " · ".join(part for part in (time_taken, stage.summary) if part)
        yield from _folded(line, said, width)


def _wrapped(parts: list[str], width: int, *, indent: int) -> Iterator[Text]:
    """Parts joined by gaps, on as many lines as it takes to keep each part whole."""
    line = ""
    for part in parts:
        if line and indent + len(line) + 3 + len(part) > width:
            yield Text(" " * indent + line)
            line = ""
        line = f"{line} · {part}" if line else part
    if line:
        yield Text(" " * indent + line)


def _folded(head: Text, said: str, width: int) -> Iterator[Text]:
    """A sentence behind a head, folded between words under itself."""
    indent = cell_len(head.plain)
    words, line = said.split(), ""
    for word in words:
        if line and indent + len(line) + 1 + len(word) > width:
            yield head.append(line)
            head, line = Text(" " * indent), ""
        line = f"{line} {word}" if line else word
    yield head.append(line)


def _trials(trials: list[Trial], room: int, width: int) -> RenderableType:
    """Those that run, then the best, then the failed; as many as fit, and how many more there are."""
    order = {"running": 0, "completed": 1, "stopped": 1, "failed": 2}
    ranked = sorted(trials, key=lambda t: (order[t.status], math.inf if t.val_loss is None else t.val_loss))
    shown = ranked if len(ranked) <= room else ranked[: room - 1]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    wide = width >= 100
    for header, right in _headers(wide):
        table.add_column(header, justify="right" if right else "left", no_wrap=True, overflow="fold")
    for trial in shown:
        table.add_row(*_cells(trial, wide), style=_TRIAL_STYLES[trial.status])
    below: list[RenderableType] = []
    if hidden := ranked[len(shown) :]:
        failed = sum(trial.status == "failed" for trial in hidden)
        text = f"and {len(hidden)} more" + (f", {failed} failed" if failed else "")
        below.append(Text(text, style="dim"))
    if reasons := [
        f"{trial.shape or trial.candidate_id}: {trial.reason}" for trial in trials if trial.reason
    ]:
        below += [
            Text(line.plain, style="red") for line in _folded(Text("last failure "), reasons[-1], width)
        ]
    return Group(table, *below)


def _headers(wide: bool) -> list[tuple[str, bool]]:
    first = [("trial", False), ("parameters", True), ("status", False), ("tokens", True)]
    losses = [("cut", True), ("loss", True)]
    return [*first, *losses, ("tokens/s", True), ("candidate", False)] if wide else [*first, *losses]


def _cells(trial: Trial, wide: bool) -> list[str]:
    of = f"/{trial.total_tokens:,}" if wide and trial.total_tokens and trial.status == "running" else ""
    cells = [
        trial.shape or trial.candidate_id,
        NONE if trial.parameters is None else format_count(trial.parameters),
        trial.status,
        f"{trial.tokens:,}{of}",
        NONE if trial.cut_loss is None else f"{trial.cut_loss:.4f}",
        NONE if trial.val_loss is None else f"{trial.val_loss:.4f}",
    ]
    speed = NONE if trial.tokens_per_second is None else format_count(trial.tokens_per_second)
    return [*cells, speed, trial.candidate_id] if wide else cells


def _footer(model: ProgressModel, width: int, hint: str) -> list[Text]:
    lines = [Text("")]
    if model.note:
        lines += [Text(line.plain, style="yellow") for line in _folded(Text(""), model.note, width)]
    if model.status == "running" and "Ctrl-C" not in model.note:
        lines.append(Text(hint, style="dim"))
    return lines if len(lines) > 1 else []
