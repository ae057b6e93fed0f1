"""A plan for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from minitron_ray.core.units import format_bytes, format_count
from minitron_ray.models.architecture import CUT_AXES, Architecture
from minitron_ray.plan import Layout, experiment_fingerprint
from minitron_ray.plan.intermediate import choose_intermediate, trained_on
from minitron_ray.plan.rungs import early_halving, first_halving
from minitron_ray.plan.saving import search_savings
from minitron_ray.plan.tokens import learns_nothing
from minitron_ray.report.cost_text import cost_lines, cost_table, idle_devices, saving_table
from minitron_ray.report.sections import Section, tables
from minitron_ray.report.signal_text import signal_table, signals_json
from minitron_ray.report.text_sources import planned_sources, planned_text

if TYPE_CHECKING:
    from rich.console import Console

    from minitron_ray.core.hardware import Hardware
    from minitron_ray.plan import Plan
    from minitron_ray.search.space import CandidateRow

_TITLES = {"kv_heads": "KV\ngroups", "mlp": "MLP", "expert_mlp": "expert\nMLP"}
_MEASURES = {
    "memory_bytes": ("memory", format_bytes),
    "flops_per_token": ("FLOPs\na token", format_count),
}
_SHOWN = 40
"""Feasible candidates printed; all of them go to the table `candidates` of a run."""


def render(
    plan: Plan,
    console: Console,
    finished: Mapping[str, str] = MappingProxyType({}),
    hardware: Hardware | None = None,
    layout: Layout | None = None,
    before: Sequence[Plan] = (),
) -> None:
    """Teacher, student or candidates, and an upper bound of what each stage costs.

    `finished` has the stages that will be taken from an earlier run, and which run that is; `before` the
    plans that are run first.
    """
    layout = layout or Layout.on(hardware)
    teacher, family = plan.teacher, plan.family
    console.print(f"[bold]{plan.experiment.name}[/]")
    console.print(
        f"teacher     {family.parameters(teacher):,} parameters ({family.non_embedding_parameters(teacher):,} "
        f"without embeddings), {family.model_type}: {_sizes(teacher)}",
        soft_wrap=True,
    )
    if plan.start_source is not None:
        console.print(
            f"cut from    {family.parameters(plan.start):,} parameters: {_sizes(plan.start)} ({plan.start_source})",
            soft_wrap=True,
        )
    for name, text in _facts(plan):
        console.print(f"{name:<11} {text}", soft_wrap=True)
    if plan.fixed is None:
        for table in tables(_candidates(plan), console):
            console.print()
            console.print(table)
        console.print()
    if len(plan.feasible) > _SHOWN:
        console.print(f"... and {len(plan.feasible) - _SHOWN:,} more; --json prints all")
    costs = plan.costs(hardware, layout, before)
    console.print(cost_table(costs, finished, hardware))
    early, idle = early_halving(plan.experiment), idle_devices(plan, hardware, layout)
    for name, text in cost_lines(costs, finished, hardware, layout, early, idle):
        console.print(f"{name:<11} {text}", soft_wrap=True)
    if (signals := signal_table(plan)) is not None:
        console.print(signals)
    if (savings := saving_table(plan)) is not None:
        console.print(savings)


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    """What is known apart from tables, one line each."""
    if (text := planned_text(plan.experiment)) is not None:
        yield "text", text
    if plan.fixed is not None:
        yield "student", _student(plan, plan.fixed)
    if plan.limits is not None:
        tried = " (all of them)" if plan.trials == len(plan.feasible) else ""
        if learns_nothing(plan.experiment, plan.trials, len(plan.feasible)):
            zero_shot = (
                "the best undistilled cuts and others by lot" if "zero_shot" in plan.stages else "by lot"
            )
            tried = f", all chosen before {plan.experiment.searched.sampler.kind} knows results enough: {zero_shot}"
        yield "budget", plan.limits.text()
        yield from _serving(plan)
        yield (
            "candidates",
            f"{len(plan.feasible):,} of {len(plan.rows):,} shapes are inside; {plan.trials} will be tried{tried}",
        )
    distill = plan.experiment.distill
    if distill is not None:
        layers = [row.candidate.layers for row in plan.feasible]
        for line in trained_on(distill, plan.family, plan.teacher.layers, layers):
            yield "trained on", line
    yield "exported", _exported(plan)


def _serving(plan: Plan) -> Iterator[tuple[str, str]]:
    serving = plan.experiment.searched.serving
    if serving is None:
        return
    rules = [f"{serving.tensor_parallel} devices a layer"] if serving.tensor_parallel > 1 else []
    rules += [f"{kernel} kernels" for kernel in serving.kernels]
    rules += [f"gguf {serving.gguf}"] if serving.gguf is not None else []
    out = sum("(serving." in (row.reason or "") for row in plan.rows)
    yield "serving", f"{', '.join(rules) or 'no rule'}: {out:,} shapes that can be cut do not fit"


def _student(plan: Plan, row: CandidateRow) -> str:
    arch = row.candidate.architecture(plan.start)
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
    if experiment.search is not None and experiment.search.keep == "ties":
        what = "the distilled students, one or as many as tie"
    elif experiment.search is not None and experiment.search.fewest_kept > 1:
        what = f"the {experiment.search.keep} distilled students"
    return f"{what}, as {plan.family.model_type} in {experiment.export.dtype}"


def as_json(
    plan: Plan,
    finished: Mapping[str, str] = MappingProxyType({}),
    hardware: Hardware | None = None,
    layout: Layout | None = None,
    before: Sequence[Plan] = (),
) -> dict[str, Any]:
    """The same as JSON values, every candidate included."""
    return {
        "experiment": plan.experiment.name,
        "fingerprint": experiment_fingerprint(plan.experiment),
        "teacher": {
            "model_type": plan.family.model_type,
            "parameters": plan.family.parameters(plan.teacher),
            "non_embedding_parameters": plan.family.non_embedding_parameters(plan.teacher),
            **{axis: getattr(plan.teacher, axis) for axis in CUT_AXES},
        },
        "start": None
        if plan.start_source is None
        else {
            "source": plan.start_source,
            "parameters": plan.family.parameters(plan.start),
            **{axis: getattr(plan.start, axis) for axis in CUT_AXES},
        },
        "sources": planned_sources(plan.experiment),
        "stages": list(plan.stages),
        "finished": dict(finished),
        "budget": None if plan.limits is None else asdict(plan.limits),
        "shape": None if plan.fixed is None else plan.fixed.row(),
        "trials": plan.trials,
        "first_halving_steps": first_halving(plan.experiment),
        "warnings": [
            text
            for text in (
                early_halving(plan.experiment),
                idle_devices(plan, hardware, layout or Layout.on(hardware)),
            )
            if text is not None
        ],
        "candidates": [row.row() for row in plan.rows],
        "trained_on": _trained_on(plan),
        "hardware": None if hardware is None else asdict(hardware),
        "costs": [cost.row() for cost in plan.costs(hardware, layout, before)],
        "signals": signals_json(plan),
        "savings": [saving.as_json() for saving in search_savings(plan)],
    }


def _trained_on(plan: Plan) -> dict[str, Any]:
    """Of every candidate inside the budget what its distillation compares; empty where there is none."""
    distill = plan.experiment.distill
    if distill is None:
        return {}
    found = {
        row.candidate.id: choose_intermediate(distill, plan.family, plan.teacher.layers, row.candidate.layers)
        for row in plan.feasible
    }
    return {
        name: {
            "losses": [loss.model_dump(mode="json") for loss in chosen.losses],
            "weight": distill.intermediate_weight,
            "reason": chosen.reason,
        }
        for name, chosen in found.items()
    }


def _candidates(plan: Plan) -> Section:
    """Sizes and parameters, and what else the budget bounds."""
    axes = [axis for axis in CUT_AXES if getattr(plan.teacher, axis)]
    bounded = {band.measure for band in plan.limits.bands} if plan.limits is not None else set()
    more = [measure for measure in _MEASURES if measure in bounded]
    rows = tuple(
        (
            row.candidate.id,
            *(str(getattr(row.candidate, axis)) for axis in axes),
            f"{row.parameters:,}",
            *(_MEASURES[measure][1](getattr(row, measure)) for measure in more),
        )
        for row in plan.feasible[:_SHOWN]
    )
    titles = [_TITLES.get(axis, axis) for axis in axes]
    header = ("candidate", *titles, "parameters", *(_MEASURES[measure][0] for measure in more))
    return Section(title="candidates", header=header, rows=rows)


def _sizes(arch: Architecture) -> str:
    text = f"{arch.layers} layers, hidden {arch.hidden}, {arch.heads} heads in {arch.kv_heads} KV groups" + (
        f", MLP {arch.mlp}" if arch.mlp else ""
    )
    if arch.experts:
        text += f", {arch.experts} experts of {arch.expert_mlp} with {arch.active_experts} a token"
    return text
