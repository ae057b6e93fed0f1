"""One type of products in all of a run: settled when it begins, and looked at when it is gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest
import torch

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.events import EventBus
from minitron_ray.execution.cluster import Cluster
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.execution.stop import StopSignal
from minitron_ray.pipeline import execute
from minitron_ray.plan import stage_fingerprints
from minitron_ray.stages.precision import settle, worker_type
from minitron_ray.stages.reuse import finished, settled_precision
from minitron_ray.weights.device import compute_dtype
from tests.stages.test_reuse import Lab, lab  # noqa: F401  # a fixture

AUTO: Final = "precision=auto"
NATIVE: Final = str(compute_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
OTHER: Final = "float32" if NATIVE == "bfloat16" else "bfloat16"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="asks the workers, and so starts Ray")


def record(run: Path, precision: str | None) -> None:
    """What `prepare` left when the run began."""
    path = run / "stages" / "prepare.json"
    found = json.loads(path.read_bytes())
    found["output"] = {**found["output"], **({} if precision is None else {"precision": precision})}
    path.write_text(json.dumps(found))


def test_auto_is_the_type_that_it_stands_for(lab: Lab) -> None:  # noqa: F811
    """To all that computes, and to fingerprints: what was made under its name is taken over."""
    context, plan = lab.open(AUTO)
    found = settle(context, plan)
    named, same = lab.open(f"precision={NATIVE}")
    assert stage_fingerprints(found, context.ready.inputs) == stage_fingerprints(same, named.ready.inputs)
    assert (
        not stage_fingerprints(plan, context.ready.inputs).items()
        & stage_fingerprints(found, context.ready.inputs).items()
    )
    for experiment in (found.experiment, context.experiment, context.ready.setting.experiment):
        assert experiment.precision == NATIVE
    assert settle(named, same) is same and named.before_work() is None  # type: ignore[func-returns-value]


def test_a_run_goes_on_where_auto_is_the_same(lab: Lab) -> None:  # noqa: F811
    context, plan = lab.open(AUTO)
    record(context.run.folder, NATIVE)
    context.run.begin_stage("importance", "f")
    assert settle(context, plan).experiment.precision == NATIVE
    context.before_work()
    assert context.stage("importance", "f", lambda: ({"rows": 1}, "made")) == {"rows": 1}


def test_a_run_of_another_type_shows_what_it_has_and_computes_nothing(lab: Lab) -> None:  # noqa: F811
    context, plan = lab.open(AUTO)
    record(context.run.folder, OTHER)
    context.run.finish_stage("importance", "f", {"rows": 1}, "made", 1.0)
    assert settle(context, plan).experiment.precision == OTHER
    assert context.stage("importance", "f", lambda: ({"rows": 2}, "again")) == {"rows": 1}
    with pytest.raises(ConfigError, match=f"auto is {NATIVE} on these devices, but run .* begun in {OTHER}"):
        context.stage("search", "g", lambda: ({"chosen": []}, "made"))
    assert context.run.record("search", "g") is None


def test_the_whole_run_refuses_before_it_starts_ray(lab: Lab) -> None:  # noqa: F811
    context, plan = lab.open(AUTO)
    record(context.run.folder, OTHER)
    with pytest.raises(ConfigError, match=f"set precision: {OTHER} or precision: {NATIVE}, which begins"):
        execute(context, plan)
    assert settled_precision(context.run.folder) == OTHER, "an attempt that was refused changes nothing"


def test_a_run_that_does_not_say_its_type_does_not_go_on(lab: Lab) -> None:  # noqa: F811
    context, plan = lab.open(AUTO)
    assert settle(context, plan).experiment.precision == NATIVE, "it has computed nothing yet"
    context, plan = lab.open(AUTO)
    context.run.begin_stage("importance", "f")
    with pytest.raises(ConfigError, match=f"importance of run {context.run.run_id} is from before runs kept"):
        settle(context, plan)


def test_a_plan_knows_what_auto_was(lab: Lab) -> None:  # noqa: F811
    context, plan = lab.open(AUTO)
    record(context.run.folder, OTHER)
    mark = stage_fingerprints(lab.open(f"precision={OTHER}")[1], context.ready.inputs)["importance"]
    context.run.finish_stage("importance", mark, {"rows": 1}, "made", 1.0)
    assert list(finished(lab.folder / "results", plan, lab.folder)) == ["importance"]


@pytest.mark.ray
def test_the_type_is_asked_of_the_workers(lab: Lab, tmp_path: Path) -> None:  # noqa: F811
    setting = lab.open(AUTO)[0].ready.setting
    with Cluster(ClusterSettings(workers=1), tmp_path / "run", EventBus(), StopSignal()) as cluster:
        assert cluster.map(worker_type, [setting]) == [NATIVE]
