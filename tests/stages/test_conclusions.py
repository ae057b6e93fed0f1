"""When a run writes its conclusions: after the search, and after what is trained beside it."""

from __future__ import annotations

from pathlib import Path

from minitron_ray.core.events import Event, EventBus
from minitron_ray.data.splits import Splits
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.execution.stop import StopSignal
from minitron_ray.pipeline import _chosen
from minitron_ray.plan import Inputs
from minitron_ray.results.cache import Cache
from minitron_ray.results.run import Run
from minitron_ray.stages.context import Context
from minitron_ray.stages.prepare import Prepared
from minitron_ray.stages.setting import Setting
from tests.stages.test_choice import CONFIG, LAST, Table, plan_of


def test_baselines_are_compared_as_soon_as_they_are_trained(tmp_path: Path) -> None:
    """Before anything is evaluated: of two stages that are done, in a run that has come no further."""
    plan = plan_of(baselines=["scratch"])
    experiment, events, stop = plan.experiment, EventBus(), StopSignal()
    run = Run.open(tmp_path, experiment.name, "f" * 64, b"", {}, {}, plan.stages)
    table = Table(plan, tmp_path)
    table.store = run.store
    winner = table.trial(0, 9.0, 4.0, 3.0)
    table.trial(1, 9.0, 4.2, 3.4)

    def listen(event: Event) -> None:
        if (event.kind, event.fields.get("stage")) == ("stage_reused", "baselines"):
            table.trial(0, 11.0, 8.0, 7.5, origin="scratch")  # its rows come no earlier than it does

    events.add(listen)
    marks = {"search": "s" * 64, "baselines": "b" * 64}
    run.finish_stage("search", marks["search"], {"chosen": [winner]}, "searched", 1.0)
    run.finish_stage("baselines", marks["baselines"], {"best": {"scratch": winner}}, "trained", 1.0)
    setting = Setting(
        experiment=experiment,
        teacher_folder=tmp_path,
        tokens_folder=tmp_path,
        splits=Splits(calibration=range(40), validation=range(40, 56), train=range(56, 99)),
        micro_batch=1,
    )
    ready = Prepared(
        setting=setting,
        config=CONFIG,
        inputs=Inputs(teacher="t", data="d"),
        base=tmp_path,
        output={},
        summary="",
        seconds=0.0,
    )
    context = Context(
        experiment=experiment,
        ready=ready,
        run=run,
        cache=Cache(tmp_path / "cache"),
        cluster=Cluster(ClusterSettings(), run.folder, events, stop),
        events=events,
        stop=stop,
    )
    marks |= {"zero_shot": "z" * 64}
    run.finish_stage("zero_shot", marks["zero_shot"], {"cuts": 0}, "scored", 1.0)
    assert _chosen(context, plan, marks, None) == [winner]
    rows = run.store.read("comparisons").to_pylist()
    [behind] = [row for row in rows if row["phase"] == "baseline" and row["tokens"] == LAST]
    assert behind["subject"] == f"scratch:{winner}" and behind["other"] == winner
    assert abs(behind["difference"] - 4.5) < 1e-9 and behind["low"] > 4.0
