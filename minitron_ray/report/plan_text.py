"""A plan for people and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from minitron_ray.core.units import format_bytes, format_count
from minitron_ray.models.cost import training_bytes, weight_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from minitron_ray.plan import Plan

_SHOWN = 40
"""Feasible candidates printed; all of them go to the table `candidates` of a run."""


def render(plan: Plan, console: Console) -> None:
    """Teacher, budget, candidates inside it, and an upper bound of what each stage costs."""
    teacher, family = plan.teacher, plan.family
    console.print(f"[bold]{plan.experiment.name}[/]")
    console.print(
        f"teacher     {family.parameters(teacher):,} parameters ({family.non_embedding_parameters(teacher):,} "
        f"without embeddings), {family.model_type}: {teacher.layers} layers, hidden {teacher.hidden}, "
        f"{teacher.heads} heads in {teacher.kv_heads} KV groups, MLP {teacher.mlp}",
        soft_wrap=True,
    )
    console.print(f"budget      {plan.band.text()}", soft_wrap=True)
    console.print(
        f"candidates  {len(plan.feasible):,} of {len(plan.rows):,} shapes are inside; "
        f"{plan.trials} will be tried" + (" (all of them)" if plan.trials == len(plan.feasible) else ""),
        soft_wrap=True,
    )
    largest = max(plan.feasible, key=lambda row: row.parameters).candidate.architecture(teacher)
    console.print(
        f"memory      a trial holds {format_bytes(training_bytes(family, largest))} (float32 student, gradients, "
        f"optimizer; activations come on top), which workers share in the distillation; the teacher takes "
        f"{format_bytes(weight_bytes(family, teacher, 'bfloat16'))} in bfloat16",
        soft_wrap=True,
    )
    console.print(_candidates(plan))
    if len(plan.feasible) > _SHOWN:
        console.print(f"... and {len(plan.feasible) - _SHOWN:,} more; --json prints all")
    console.print(_costs(plan))


def as_json(plan: Plan) -> dict[str, Any]:
    """The same as JSON values, every candidate included."""
    return {
        "experiment": plan.experiment.name,
        "fingerprint": plan.fingerprint,
        "teacher": {
            "model_type": plan.family.model_type,
            "parameters": plan.family.parameters(plan.teacher),
            "non_embedding_parameters": plan.family.non_embedding_parameters(plan.teacher),
            **{
                name: getattr(plan.teacher, name) for name in ("layers", "hidden", "heads", "kv_heads", "mlp")
            },
        },
        "budget": {"low": plan.band.low, "high": plan.band.high, "count": plan.band.count},
        "trials": plan.trials,
        "candidates": [row.row() for row in plan.rows],
        "costs": [
            {"stage": cost.stage, "what": cost.what, "tokens": cost.tokens, "flops": cost.flops}
            for cost in plan.costs
        ],
    }


def _candidates(plan: Plan) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("candidate", no_wrap=True)
    for name in ("layers", "hidden", "heads", "MLP", "parameters"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in plan.feasible[:_SHOWN]:
        shape = row.candidate
        sizes = (shape.layers, shape.hidden, shape.heads, shape.mlp)
        table.add_row(shape.id, *map(str, sizes), f"{row.parameters:,}")
    return table


def _costs(plan: Plan) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption="halving does less; validation during distillation is not counted",
        caption_justify="left",
    )
    table.add_column("stage", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("FLOPs", justify="right", no_wrap=True)
    table.add_column("what")
    for cost in plan.costs:
        table.add_row(cost.stage, format_count(cost.tokens), f"{cost.flops:.1e}", cost.what)
    total = sum(cost.flops for cost in plan.costs)
    table.add_row("all", format_count(sum(cost.tokens for cost in plan.costs)), f"{total:.1e}", "")
    return table
