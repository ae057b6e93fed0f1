"""A plan for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from minitron_ray.core.units import format_bytes, format_count
from minitron_ray.models.architecture import CUT_AXES, Architecture
from minitron_ray.models.cost import training_bytes, weight_bytes
from minitron_ray.plan import experiment_fingerprint

if TYPE_CHECKING:
    from rich.console import Console

    from minitron_ray.plan import Plan
    from minitron_ray.search.space import CandidateRow

_TITLES = {"kv_heads": "KV groups", "mlp": "MLP", "expert_mlp": "expert MLP"}
_SHOWN = 40
"""Feasible candidates printed; all of them go to the table `candidates` of a run."""


def render(plan: Plan, console: Console, finished: Mapping[str, str] = MappingProxyType({})) -> None:
    """Teacher, student or candidates, and an upper bound of what each stage costs.

    `finished` has the stages that will be taken from an earlier run, and which run that is.
    """
    teacher, family = plan.teacher, plan.family
    console.print(f"[bold]{plan.experiment.name}[/]")
    console.print(
        f"teacher     {family.parameters(teacher):,} parameters ({family.non_embedding_parameters(teacher):,} "
        f"without embeddings), {family.model_type}: {_sizes(teacher)}",
        soft_wrap=True,
    )
    for name, text in _facts(plan):
        console.print(f"{name:<11} {text}", soft_wrap=True)
    if plan.fixed is None:
        console.print(_candidates(plan))
    if len(plan.feasible) > _SHOWN:
        console.print(f"... and {len(plan.feasible) - _SHOWN:,} more; --json prints all")
    console.print(_costs(plan, finished))


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    """What is known apart from tables, one line each."""
    experiment, family, teacher = plan.experiment, plan.family, plan.teacher
    if plan.fixed is not None:
        yield "student", _student(plan, plan.fixed)
    if plan.band is not None:
        tried = " (all of them)" if plan.trials == len(plan.feasible) else ""
        yield "budget", plan.band.text()
        yield (
            "candidates",
            f"{len(plan.feasible):,} of {len(plan.rows):,} shapes are inside; {plan.trials} will be tried{tried}",
        )
    in_bfloat16 = format_bytes(weight_bytes(family, teacher, "bfloat16"))
    largest = max(plan.feasible, key=lambda row: row.parameters).candidate.architecture(teacher)
    if experiment.search is not None or experiment.distill is not None:
        state = f"{format_bytes(training_bytes(family, largest))} (float32 student, gradients, optimizer; "
        state += "activations come on top)"
        told = f"the distillation holds {state}, shared by its workers"
        if experiment.search is not None:
            told = f"a trial holds {state}"
            told += "" if experiment.distill is None else ", which workers share in the distillation"
        yield "memory", f"{told}; the teacher takes {in_bfloat16} in bfloat16"
    else:
        cut = format_bytes(weight_bytes(family, largest, "float32"))
        yield "memory", f"the cut is measured in float32, {cut}; the teacher takes {in_bfloat16} in bfloat16"
    yield "exported", _exported(plan)


def _student(plan: Plan, row: CandidateRow) -> str:
    arch = row.candidate.architecture(plan.teacher)
    share = row.parameters / plan.family.parameters(plan.teacher)
    return (
        f"{row.parameters:,} parameters ({row.non_embedding_parameters:,} without embeddings), "
        f"{100 * share:.1f}% of the teacher: {_sizes(arch)}"
    )


def _exported(plan: Plan) -> str:
    experiment = plan.experiment
    if experiment.distill is None and experiment.search is not None:
        return "nothing: trials keep no weights; add distill to train the best, the search is then reused"
    what = "the student as cut, not trained" if experiment.distill is None else "the distilled student"
    if experiment.search is not None and experiment.search.keep > 1:
        what = f"the {experiment.search.keep} distilled students"
    return f"{what}, as {plan.family.model_type} in {experiment.export.dtype}"


def as_json(plan: Plan, finished: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """The same as JSON values, every candidate included."""
    band = plan.band
    return {
        "experiment": plan.experiment.name,
        "fingerprint": experiment_fingerprint(plan.experiment),
        "teacher": {
            "model_type": plan.family.model_type,
            "parameters": plan.family.parameters(plan.teacher),
            "non_embedding_parameters": plan.family.non_embedding_parameters(plan.teacher),
            **{axis: getattr(plan.teacher, axis) for axis in CUT_AXES},
        },
        "stages": list(plan.stages),
        "finished": dict(finished),
        "budget": None if band is None else {"low": band.low, "high": band.high, "count": band.count},
        "shape": None if plan.fixed is None else plan.fixed.row(),
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
    axes = [axis for axis in CUT_AXES if getattr(plan.teacher, axis)]
    for name in [*(_TITLES.get(axis, axis) for axis in axes), "parameters"]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in plan.feasible[:_SHOWN]:
        shape = row.candidate
        table.add_row(shape.id, *(str(getattr(shape, axis)) for axis in axes), f"{row.parameters:,}")
    return table


def _sizes(arch: Architecture) -> str:
    text = f"{arch.layers} layers, hidden {arch.hidden}, {arch.heads} heads in {arch.kv_heads} KV groups" + (
        f", MLP {arch.mlp}" if arch.mlp else ""
    )
    if arch.experts:
        text += f", {arch.experts} experts of {arch.expert_mlp} with {arch.active_experts} a token"
    return text


def _costs(plan: Plan, finished: Mapping[str, str]) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption=_caption(plan, finished),
        caption_justify="left",
    )
    table.add_column("stage", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("FLOPs", justify="right", no_wrap=True)
    table.add_column("what")
    for cost in plan.costs:
        row = (cost.stage, format_count(cost.tokens), f"{cost.flops:.1e}", cost.what)
        if cost.stage in finished:
            row = (cost.stage, "-", "-", f"finished in {finished[cost.stage]}: {cost.what}")
        table.add_row(*row, style="dim" if cost.stage in finished else None)
    to_do = [cost for cost in plan.costs if cost.stage not in finished]
    total = sum(cost.flops for cost in to_do)
    table.add_row(
        "to do" if finished else "all", format_count(sum(c.tokens for c in to_do)), f"{total:.1e}", ""
    )
    return table


def _caption(plan: Plan, finished: Mapping[str, str]) -> str | None:
    notes = []
    if plan.experiment.search is not None and plan.experiment.search.halving is not None:
        notes.append("halving does less")
    if plan.experiment.distill is not None:
        notes.append("validation during distillation is not counted")
    if finished:
        notes.append("finished stages are reused if teacher and text are unchanged")
    return "; ".join(notes) or None
