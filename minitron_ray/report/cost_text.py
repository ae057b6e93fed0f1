"""What a plan costs, for people: a table of figures, and a line a stage under it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from minitron_ray.core.units import format_bytes, format_count, format_seconds
from minitron_ray.plan.saving import COMPARED_TRIALS, FamilySaving, exact_saving, search_saving
from minitron_ray.plan.tokens import trials_a_cohort

if TYPE_CHECKING:
    from minitron_ray.core.hardware import Hardware
    from minitron_ray.plan import Layout, Plan, StageCost

NONE = "-"
_WITHOUT_TRAINING: Final = ("teacher", "evaluate")
"""Stages whose models are spread over more than a trial's processes only where the cluster file says so."""


def cost_table(found: Sequence[StageCost], finished: Mapping[str, str], hardware: Hardware | None) -> Table:
    """A row a stage and their sum; of finished ones no figures. `device time` only where it is known."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for name in ("tokens", "FLOPs", *(("device time",) if hardware else ()), "memory", "disk"):
        table.add_column(name, justify="right", no_wrap=True)
    for cost in found:
        done = cost.stage in finished
        cells = [NONE] * (len(table.columns) - 1) if done else _figures(cost, hardware)
        table.add_row(cost.stage, *cells, style="dim" if done else None)
    to_do = [cost for cost in found if cost.stage not in finished]
    sums = [format_count(sum(c.tokens for c in to_do)), _flops(sum(c.flops for c in to_do))]
    if hardware is not None:
        sums.append(time_text(sum(c.device_seconds or 0.0 for c in to_do)))
    most = max((c.memory_bytes or 0 for c in to_do), default=0)
    sums += [_bytes(most), _bytes(sum(c.disk_bytes for c in to_do))]
    table.add_row("to do" if finished else "all", *sums)
    return table


def _figures(cost: StageCost, hardware: Hardware | None) -> list[str]:
    time = [] if hardware is None else [time_text(cost.device_seconds) if cost.device_seconds else NONE]
    memory = NONE if cost.memory_bytes is None else _bytes(cost.memory_bytes)
    tokens = format_count(cost.tokens) if cost.tokens else NONE
    return [tokens, _flops(cost.flops), *time, memory, _bytes(cost.disk_bytes)]


def cost_lines(
    found: Sequence[StageCost],
    finished: Mapping[str, str],
    hardware: Hardware | None,
    layout: Layout,
    early: str | None = None,
    idle: str | None = None,
) -> Iterator[tuple[str, str]]:
    """What each stage does, on what, and what does not fit. `early` and `idle` are what `plan.rungs` and
    `idle_devices` say of the search."""
    for cost in found:
        reused = f"finished in {finished[cost.stage]}: " if cost.stage in finished else ""
        yield cost.stage, f"{reused}{cost.what}"
        if cost.stage == "search" and early is not None and not reused:
            yield "too early", early
    if finished:
        yield "reused", "finished stages are taken over if teacher and text are unchanged"
    yield "memory", f"of one process, with {layout.micro_batch} sequences in a forward pass"
    to_do = [cost for cost in found if cost.stage not in finished]
    if hardware is None:
        yield (
            "hardware",
            "unknown: give devices in a cluster file (--cluster), or measure this machine (--probe)",
        )
        return
    yield "hardware", hardware.text()
    total = sum(cost.device_seconds or 0.0 for cost in to_do)
    if hardware.count > 1:
        yield (
            "duration",
            f"{time_text(total / hardware.count)} where all {hardware.count} are busy throughout",
        )
        if idle is not None and any(cost.stage == "search" for cost in to_do):
            yield "idle", idle
    if short := _short_of_memory(to_do, hardware, layout):
        yield "too large", short


def idle_devices(plan: Plan, hardware: Hardware | None, layout: Layout) -> str | None:
    """One line where the search has too few trials at a time for all devices; None where it has enough, or
    the devices are not known.

    A sampler that learns proposes a cohort only when the one before it has ended.
    """
    if plan.experiment.search is None or hardware is None:
        return None
    search, trials = plan.experiment.search, plan.trials
    cohort = trials_a_cohort(plan.experiment, trials, len(plan.feasible))
    # The most that a cohort can take: as many of its trials as there are such shapes are groups.
    alone = plan.alone(layout) if layout.trial_workers > 1 else plan.feasible
    groups = min(cohort, len(plan.feasible) - len(alone))
    busy, largest = cohort + groups * (layout.trial_workers - 1), layout.trial_workers if groups else 1
    if busy > hardware.count - largest:
        return None
    text = f"the search has at most {busy} of {hardware.count} devices busy"
    if cohort == trials:
        return f"{text}: it has {trials} trials in all"
    remedy = "raise halving.cohort" if search.halving else "set halving with a larger cohort"
    return (
        f"{text}, fewer from rung to rung: a cohort is {cohort} trials, and the next one begins when all of them "
        f"have ended; {remedy}, or take sampler: random, which needs no results"
    )


def _short_of_memory(found: Sequence[StageCost], hardware: Hardware, layout: Layout) -> str | None:
    if hardware.memory is None:
        return None
    large = [cost for cost in found if (cost.memory_bytes or 0) > hardware.memory]
    if not large:
        return None
    named = ", ".join(f"{cost.stage} {_bytes(cost.memory_bytes or 0)}" for cost in large)
    recompute = "" if layout.recompute else "set activation_checkpointing: true, "
    told = (
        f"{named}; {hardware.name} has {format_bytes(hardware.memory)}: in the cluster file lower micro_batch "
        f"(now {layout.micro_batch}), {recompute}or spread a student over more workers (distill: workers, now "
        f"{layout.workers_text}; search: trial_workers, now {layout.trial_workers})"
    )
    alone = [cost.stage for cost in large if cost.stage in _WITHOUT_TRAINING]
    if alone and layout.teacher != "sharded" and layout.teacher_workers < max(2, layout.workers):
        told += (
            f"; {' and '.join(alone)}: teacher: sharded, now {layout.teacher}, spreads them over all workers"
        )
    return told


def saving_table(plan: Plan) -> Table | None:
    """What a teacher that runs once saves a search, and halving on top; None without a search."""
    if plan.experiment.search is None or plan.trials < 2:
        return None
    chosen = search_saving(plan, plan.trials)
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption=_saving_caption(plan, chosen.signal),
        caption_justify="left",
    )
    kinds = ["final_hidden", *(() if chosen.signal in ("final_hidden", "online") else (chosen.signal,))]
    for name in ("trials", "teacher in each", *kinds, "and halving"):
        table.add_column(name, justify="right", no_wrap=True)
    for trials in sorted({plan.trials, COMPARED_TRIALS}):
        exact, own = exact_saving(plan, trials), search_saving(plan, trials)
        stored = [exact.stored_times, own.stored_times][: len(kinds)]
        halved = (exact if chosen.signal == "online" else own).halved_times
        times = [f"÷ {value:.2f}" for value in (*stored, halved)]
        table.add_row(str(trials), f"{_flops(own.online)} FLOPs", *times)
    return table


def _saving_caption(plan: Plan, signal: str) -> str:
    search = plan.experiment.searched
    halving = "as this experiment halves" if search.halving else "by two at 1/8, 1/4 and 1/2 of the tokens"
    online = "; here the teacher runs in each" if signal == "online" else ""
    return (
        f"What the trials' training takes with the teacher in each, and how many times less where it runs once "
        f"and this is stored of it. Halving: {halving}{online}."
    )


def family_line(saving: FamilySaving) -> str:
    """What a family that is cut saves against training each of its models."""
    models = " + ".join(format_count(count) for count in saving.parameters)
    return (
        f"{models}: {saving.papers_times:.2f} times less compute than training each from scratch, counted as "
        f"in the paper (a distilled model takes 1/40 of the tokens, passes of its teacher not counted); "
        f"{saving.whole_times:.2f} times with all that these experiments do"
    )


def time_text(seconds: float) -> str:
    """`4.2s`, `12:05`, `3:07:12`, and from ten hours on `5,920 h`."""
    return f"{seconds / 3600:,.0f} h" if seconds >= 36_000 else format_seconds(seconds)


def _flops(flops: float) -> str:
    return f"{flops:.1e}".replace("e+", "e") if flops else NONE


def _bytes(size: int) -> str:
    return format_bytes(size) if size else NONE
