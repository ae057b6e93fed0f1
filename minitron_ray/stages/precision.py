"""What `precision: auto` stands for in a run: one type of products from its beginning to its end.

The workers' device says it when the run begins, and the run keeps it beside what `prepare` found. All
stages then see the type itself: their fingerprints are those of an experiment that names it, and every
process computes in it, whatever device that has. A run is not gone on with where `auto` is another type:
what it holds and what would be added could not be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, Final, Literal

import torch

from minitron_ray.core.errors import ConfigError
from minitron_ray.execution.ray_start import cluster_address
from minitron_ray.plan import Plan
from minitron_ray.stages.context import Context
from minitron_ray.stages.reuse import settled_precision
from minitron_ray.stages.setting import Setting

Type = Literal["float32", "bfloat16"]

BEFORE: Final = ("prepare",)
"""Stages of which no result depends on the precision."""


def settle(context: Context, plan: Plan) -> Plan:
    """`plan` with the run's type of products in place of `auto`; `context` is given it, too.

    What an earlier attempt has settled stands; whether it holds here is looked at before anything is
    computed, see `Context.stage`. Raises ConfigError for a run that has stages and does not say their type.
    """
    if plan.experiment.precision != "auto":
        return plan
    here = _here(context)
    if (known := settled_precision(context.run.folder)) is not None:
        context.before_work = partial(_check, context, known, here)
    elif begun := _begun(context):
        raise ConfigError(
            f"precision: auto: {begun} of run {context.run.run_id} is from before runs kept what auto stands for, "
            "so that it may have been computed in another type; set precision to float32 or bfloat16 and run "
            "again, which begins a new run"
        )
    else:
        known = here()
    experiment = plan.experiment.model_copy(update={"precision": known})
    context.experiment = experiment
    ready = context.ready
    context.ready = replace(ready, setting=replace(ready.setting, experiment=experiment))
    return replace(plan, experiment=experiment)


def worker_type(setting: Setting, report: Callable[..., None]) -> Type:
    """In a worker: the type of products that the setting has on its device."""
    return "bfloat16" if setting.share().dtype == torch.bfloat16 else "float32"


def _here(context: Context) -> Callable[[], Type]:
    """Asks, when it is called, what `auto` is for the workers. On a machine by itself without an accelerator
    they are as this process is, and no Ray is started for it. Asked once: each stage that works wants to know."""
    setting, cluster = context.ready.setting, context.cluster

    @cache
    def ask() -> Type:
        if cluster_address(cluster.settings) is None and not torch.cuda.is_available():
            return worker_type(setting, lambda *told, **fields: None)
        [found] = cluster.map(worker_type, [setting])
        answer: Type = found
        return answer

    return ask


def _begun(context: Context) -> str | None:
    """A stage that an earlier attempt has begun and whose results depend on the precision."""
    rows: list[dict[str, Any]] = context.run.store.read("stages").to_pylist()
    return next((row["stage"] for row in rows if row["stage"] not in BEFORE), None)


def _check(context: Context, known: Type, ask: Callable[[], Type]) -> None:
    if (here := ask()) != known:
        raise ConfigError(
            f"precision: auto is {here} on these devices, but run {context.run.run_id} was begun in {known}, and "
            f"the two cannot be compared; go on where auto is {known}, or set precision: {known} or precision: "
            f"{here}, which begins another run and takes over what was finished in that type"
        )
