"""What each kind of the teacher's signal would cost a search, for people and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from minitron_ray.core.units import format_bytes
from minitron_ray.plan.signal import signal_costs

if TYPE_CHECKING:
    from minitron_ray.plan import Plan
    from minitron_ray.plan.signal import SignalCost


def signal_table(plan: Plan) -> Table | None:
    """One row a kind, the chosen one marked; None where nothing is searched."""
    if plan.experiment.search is None:
        return None
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption="FLOPs of the teacher alone: once before the search, and in each trial",
        caption_justify="left",
    )
    table.add_column("teacher's signal", no_wrap=True)
    for name in ("disk", "FLOPs once", "a trial"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for cost in signal_costs(plan.experiment, plan.family, plan.teacher):
        table.add_row(
            cost.signal.label,
            format_bytes(cost.bytes) if cost.bytes else "-",
            f"{cost.once:.1e}" if cost.once else "-",
            f"{cost.each:.1e}" if cost.each else "-",
            _note(cost),
            style=None if cost.chosen else "dim",
        )
    return table


def signals_json(plan: Plan) -> list[dict[str, Any]]:
    """The same as JSON values."""
    return [
        {
            "signal": cost.signal.model_dump(mode="json"),
            "bytes": cost.bytes,
            "flops_once": cost.once,
            "flops_a_trial": cost.each,
            "refused": cost.refused,
            "chosen": cost.chosen,
        }
        for cost in signal_costs(plan.experiment, plan.family, plan.teacher)
    ]


def _note(cost: SignalCost) -> str:
    if cost.chosen:
        return "chosen"
    return "" if cost.refused is None else cost.refused
