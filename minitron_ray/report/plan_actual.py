"""What a run's stages were planned to take, and what they took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from minitron_ray.core.hardware import rate_text
from minitron_ray.core.units import format_bytes, format_count
from minitron_ray.report.cost_text import NONE, time_text
from minitron_ray.report.sections import Section
from minitron_ray.results.runs import RunInfo
from minitron_ray.results.store import Store

SEARCH: Final = "search"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageActual:
    """One stage. None is what is not known, or not yet."""

    stage: str
    status: str | None
    """finished, reused, failed or interrupted; None for a stage that has not begun."""
    planned_tokens: int
    tokens: int | None
    """That were trained on or measured, from the tables."""
    planned_flops: float
    planned_seconds: float | None
    """Of one device."""
    seconds: float | None
    """Wall time of all attempts, times the planned devices; None where another run's result was taken over."""
    planned_disk: int
    disk: int | None
    """Bytes that the stage has left."""

    @property
    def reached(self) -> float | None:
        """Operations a second of one device: the planned ones, as far as the tokens went."""
        if not self.seconds or not self.planned_flops:
            return None
        share = self.tokens / self.planned_tokens if self.tokens and self.planned_tokens else 1.0
        return self.planned_flops * share / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"reached": self.reached}


def plan_against_actual(run: RunInfo) -> tuple[StageActual, ...]:
    """A row a planned stage, in order; none for a run from before plans were kept."""
    store = run.store
    attempts = store.read("stages").to_pylist()
    tokens = {stage: seen for stage, count in _TOKENS.items() if (seen := count(store)) is not None}
    return tuple(_row(row, attempts, tokens, run) for row in store.read("costs").to_pylist())


def _row(
    planned: dict[str, Any], attempts: Sequence[dict[str, Any]], tokens: dict[str, int], run: RunInfo
) -> StageActual:
    stage = planned["stage"]
    own = [row for row in attempts if row["stage"] == stage]
    worked = [row["seconds"] for row in own if row["status"] != "reused"]
    return StageActual(
        stage=stage,
        status=own[-1]["status"] if own else None,
        planned_tokens=planned["tokens"],
        tokens=tokens.get(stage) if own else None,
        planned_flops=planned["flops"],
        planned_seconds=planned["device_seconds"],
        seconds=sum(worked) * (planned["devices"] or 1) if worked else None,
        planned_disk=planned["disk_bytes"],
        disk=_disk(stage, run) if own else None,
    )


def _searched(store: Store) -> int | None:
    return _trained(store, lambda origin: origin in (None, SEARCH))


def _baselines(store: Store) -> int | None:
    return _trained(store, lambda origin: origin not in (None, SEARCH))


def _trained(store: Store, counts: Callable[[str | None], bool]) -> int | None:
    """Tokens that trials of some origins saw; a trial has a row a rung."""
    seen: dict[tuple[str | None, str], int] = {}
    for row in store.read("trials").to_pylist():
        if counts(row["origin"]) and row["tokens"] is not None:
            key = (row["origin"], row["candidate_id"])
            seen[key] = max(seen.get(key, 0), row["tokens"])
    return sum(seen.values()) if seen else None


def _distilled(store: Store) -> int | None:
    seen: dict[str, int] = {}
    for row in store.read("steps").to_pylist():
        seen[row["candidate_id"]] = max(seen.get(row["candidate_id"], 0), row["tokens"])
    return sum(seen.values()) if seen else None


_TOKENS: Final[dict[str, Callable[[Store], int | None]]] = {
    "search": _searched,
    "baselines": _baselines,
    "distill": _distilled,
}
"""Of stages whose tokens are not decided before they run."""


def _disk(stage: str, run: RunInfo) -> int | None:
    """Bytes of the files of a stage; None for one whose files are elsewhere or gone."""
    if stage == "export":
        sizes = [size for size in run.store.read("exports")["bytes"].to_pylist() if size is not None]
        return sum(sizes) if sizes else None
    folder = {"search": "trials", "distill": "checkpoints"}.get(stage)
    if folder is None or not (run.folder / folder).is_dir():
        return None
    return _size(run.folder / folder)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- For people ---------------------------------------------------------------------------------------


HEADER: Final = ("stage", "tokens", "planned", "device\ntime", "planned", "reached", "disk", "planned")


def cells(rows: Sequence[StageActual]) -> Iterator[tuple[str, ...]]:
    """A line a stage, under `HEADER`: what was found, then what was planned."""
    for row in rows:
        taken = (
            "reused" if row.status == "reused" and row.seconds is None else _or_none(row.seconds, time_text)
        )
        yield (
            row.stage,
            _or_none(row.tokens, format_count),
            format_count(row.planned_tokens) if row.planned_tokens else NONE,
            taken,
            _or_none(row.planned_seconds or None, time_text),
            _or_none(row.reached, rate_text),
            _or_none(row.disk, format_bytes),
            format_bytes(row.planned_disk) if row.planned_disk else NONE,
        )


def actual_section(rows: Sequence[StageActual]) -> Section:
    """For the report; 80 columns are enough."""
    return Section(title="Plan against actual", header=HEADER, rows=tuple(cells(rows)))


def _or_none(value: Any, text: Callable[[Any], str]) -> str:
    return NONE if value is None else text(value)
