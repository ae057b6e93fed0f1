"""What a run's stages were planned to take, and what they took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from minitron_ray.core.hardware import rate_text
from minitron_ray.core.units import format_bytes, format_count
from minitron_ray.report.cost_text import NONE, time_text
from minitron_ray.report.sections import Section
from minitron_ray.results.files import folder_size
from minitron_ray.results.runs import RunInfo
from minitron_ray.results.store import Store

SEARCH: Final = "search"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageActual:
    """One stage. None is what is not known, or not yet."""

    stage: str
    status: str | None
    """Of the last attempt, see the table `stages`; None for a stage that has not begun."""
    planned_tokens: int
    planned_ties: int
    """Tokens more that ties may have added: a number between is as planned."""
    tokens: int | None
    """That this run trained on or measured; None where that is not known, or was done by another run."""
    planned_flops: float
    planned_seconds: float | None
    """Of one device."""
    seconds: float | None
    """Wall time of all attempts that came to an end, times the planned devices; None where there was none."""
    planned_disk: int
    disk: int | None
    """Bytes that the stage has left, or of files that it removed, the most that were seen."""
    share: float | None
    """Of the planned work, what was done in `seconds`; None where that is not known."""

    @property
    def reached(self) -> float | None:
        """Operations a second of one device: the planned ones, as far as the work went."""
        if not self.seconds or not self.planned_flops or not self.share:
            return None
        return self.planned_flops * self.share / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"reached": self.reached}


def plan_against_actual(run: RunInfo) -> tuple[StageActual, ...]:
    """A row a planned stage, in order; none for a run from before plans were kept."""
    store = run.store
    attempts = sorted(store.read("stages").to_pylist(), key=lambda row: row["at"])
    tokens = {stage: count(store) for stage, count in _TOKENS.items()}
    return tuple(_row(row, attempts, tokens, run) for row in store.read("costs").to_pylist())


def _row(
    planned: dict[str, Any], attempts: Sequence[dict[str, Any]], counted: dict[str, int | None], run: RunInfo
) -> StageActual:
    stage = planned["stage"]
    own = [row for row in attempts if row["stage"] == stage]
    worked = [row for row in own if row["status"] not in _NOT_WORKED]
    ended = [row["seconds"] for row in worked if row["seconds"] is not None]
    tokens = counted[stage] if stage in counted else _noted(worked)
    if not worked or any(row["status"] == "taken_over" for row in own):
        tokens = None  # the tables have what another run did
    return StageActual(
        stage=stage,
        status=own[-1]["status"] if own else None,
        planned_tokens=planned["tokens"],
        planned_ties=planned["tie_tokens"] or 0,
        tokens=tokens,
        planned_flops=planned["flops"],
        planned_seconds=planned["device_seconds"],
        seconds=sum(ended) * (planned["devices"] or 1) if ended else None,
        planned_disk=planned["disk_bytes"],
        disk=_disk(stage, own, run) if own else None,
        share=_share(stage, worked, tokens, planned["tokens"]) if len(ended) == len(worked) else None,
    )


def _noted(attempts: Sequence[dict[str, Any]]) -> int | None:
    """Tokens that the attempts say they put through a network; None where one does not."""
    said = [row["tokens"] for row in attempts]
    return None if not said or None in said else sum(said)


def _share(stage: str, worked: Sequence[dict[str, Any]], tokens: int | None, planned: int) -> float | None:
    """Of the planned work, what attempts that all came to an end have done."""
    if tokens is not None:
        return tokens / planned if planned else None
    decided = stage not in (*_TOKENS, "teacher")
    return 1.0 if decided and any(row["status"] == "finished" for row in worked) else None


def _searched(store: Store) -> int | None:
    return _trained(store, lambda origin: origin in (None, SEARCH))


def _baselines(store: Store) -> int | None:
    return _trained(store, lambda origin: origin not in (None, SEARCH))


def _trained(store: Store, counts: Callable[[str | None], bool]) -> int | None:
    """Tokens that trials of some origins saw; a trial has a row a rung. A copy was not trained."""
    seen: dict[tuple[str | None, str], int] = {}
    for row in store.read("trials").to_pylist():
        if counts(row["origin"]) and row["tokens"] is not None and not row["copied"]:
            key = (row["origin"], row["candidate_id"])
            seen[key] = max(seen.get(key, 0), row["tokens"])
    return sum(seen.values()) if seen else None


def _corrected(store: Store) -> int | None:
    return _stepped(store, lambda name: name == "teacher")


def _distilled(store: Store) -> int | None:
    return _stepped(store, lambda name: name != "teacher")


def _stepped(store: Store, counts: Callable[[str], bool]) -> int | None:
    """Tokens of the optimizer steps of some models."""
    seen: dict[str, int] = {}
    for row in store.read("steps").to_pylist():
        if not counts(row["candidate_id"]):
            continue
        seen[row["candidate_id"]] = max(seen.get(row["candidate_id"], 0), row["tokens"])
    return sum(seen.values()) if seen else None


_TOKENS: Final[dict[str, Callable[[Store], int | None]]] = {
    "correct": _corrected,
    "search": _searched,
    "baselines": _baselines,
    "distill": _distilled,
}
"""Of stages whose tokens are not decided before they run, and are in their tables."""
_NOT_WORKED: Final = ("reused", "taken_over")
"""How an attempt ends that has found the result."""


def _disk(stage: str, attempts: Sequence[dict[str, Any]], run: RunInfo) -> int | None:
    """Bytes of the files of a stage, where they are or by what its attempts have seen; None where neither."""
    if stage == "export":
        sizes = [size for size in run.store.read("exports")["bytes"].to_pylist() if size is not None]
        return sum(sizes) if sizes else None
    folder = {"search": "trials", "baselines": "baselines", "distill": "checkpoints"}.get(stage)
    found = [row["disk_bytes"] for row in attempts if row["disk_bytes"] is not None]
    if folder is not None and (run.folder / folder).is_dir():
        found.append(folder_size(run.folder / folder))
    return max(found, default=None)


# --- For people ---------------------------------------------------------------------------------------


HEADER: Final = ("stage", "tokens", "planned", "device\ntime", "planned", "reached", "disk", "planned")


def cells(rows: Sequence[StageActual]) -> Iterator[tuple[str, ...]]:
    """A line a stage, under `HEADER`: what was found, then what was planned."""
    for row in rows:
        found = row.status in _NOT_WORKED and row.seconds is None
        taken = "reused" if found else _or_none(row.seconds, time_text)
        yield (
            row.stage,
            _or_none(row.tokens, format_count),
            _planned_tokens(row),
            taken,
            _or_none(row.planned_seconds or None, time_text),
            _or_none(row.reached, rate_text),
            _or_none(row.disk, format_bytes),
            format_bytes(row.planned_disk) if row.planned_disk else NONE,
        )


def _planned_tokens(row: StageActual) -> str:
    """`20.5K`; where ties may have added to it, the most that is as planned: `≤65.5K`."""
    if not row.planned_tokens:
        return NONE
    most = format_count(row.planned_tokens + row.planned_ties)
    return f"≤{most}" if row.planned_ties else most


def actual_section(rows: Sequence[StageActual]) -> Section:
    """For the report; 80 columns are enough."""
    return Section(title="Plan against actual", header=HEADER, rows=tuple(cells(rows)))


def _or_none(value: Any, text: Callable[[Any], str]) -> str:
    return NONE if value is None else text(value)
