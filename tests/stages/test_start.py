"""`plan A B`: B is planned for the student of that very A, or for none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron_ray.cli.planning import plan_files
from minitron_ray.plan import Inputs, Plan, run_fingerprint
from minitron_ray.results.run import Run
from minitron_ray.stages.reuse import finished, run_of

EXPERIMENT = """
name: {name}
teacher: {{path: {teacher}}}
data: {{source: {{kind: files, path: t}}, sequence_length: 32}}
{more}
distill: {{tokens: 16_384}}
"""
SEARCH = "budget: {parameters: 60k..90k}\nsearch: {space: {layers: 3..4, mlp: 48..96 by 16}, trials: 2}"
MORE = {
    "a": SEARCH,
    "b": "start: {experiment: a}\nshape: {mlp: 32}",
    "c": "start: {experiment: b}\nshape: {mlp: 16}",
}


@pytest.fixture
def files(tmp_path: Path, tiny_llama: Path) -> dict[str, Path]:
    found = {}
    for name, more in MORE.items():
        found[name] = tmp_path / f"{name}.yaml"
        found[name].write_text(EXPERIMENT.format(name=name, teacher=tiny_llama, more=more))
    return found


def plans(files: dict[str, Path], results: Path, *overrides: str) -> dict[str, Plan]:
    return {plan.experiment.name: plan for _, plan in plan_files(files.values(), results, overrides)}


def run(results: Path, plan: Plan, layers: int, start: str | None = None) -> Run:
    """A finished run of a plan, with a student of so many layers; it cut `start`."""
    digest = None if start is None else f"digest of {start}"
    made = Run.open(
        results,
        plan.experiment.name,
        run_fingerprint(plan, Inputs(teacher="t", data="d", start=digest)),
        source=b"",
        resolved=plan.experiment.model_dump(mode="json"),
        environment={},
        stages=plan.stages,
    )
    cut = {} if start is None else {"start": start, "start_digest": digest}
    made.finish_stage("prepare", "p", {"teacher_digest": "t", "data_digest": "d", **cut}, "", 0.0)
    folder = made.folder / "exports" / "x"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(plan.start_config | {"num_hidden_layers": layers}))
    row = {"subject": "x", "phase": "distilled", "metric": "val_loss", "value": 1.0, "stderr": None}
    counts = {"sequences": 1, "tokens": 1, "distill_tokens": 1}
    made.store.append("evaluations", [row | counts], writer="evaluate-x", sequence=0)
    made.finish_stage("export", "f", {"paths": {"x": "exports/x"}}, "", 0.0)
    made.set_status("succeeded")
    return made


def test_only_a_run_of_the_plan_in_the_command_is_its_student(files: dict[str, Path], tmp_path: Path) -> None:
    results, largest = tmp_path / "results", "the largest shape of a, which has no student yet"
    first = plans(files, results)
    assert first["b"].start_source == largest
    made = run(results, first["a"], layers=3)
    found = plans(files, results)
    assert found["b"].start_source == f"student of a/{made.run_id}, x" and found["b"].start.layers == 3
    other = plans(files, results, "seed=1")  # of another experiment by that name
    assert other["b"].start_source == largest and other["b"].start.layers == 4
    # Alone, b starts from what there is, as a run of it does.
    [(_, alone)] = plan_files([files["b"]], results, ("seed=1",))
    assert alone.start_source == f"student of a/{made.run_id}, x"
    again = run(results, other["a"], layers=4)
    assert plans(files, results, "seed=1")["b"].start_source == f"student of a/{again.run_id}, x"
    assert plans(files, results)["b"].start_source == f"student of a/{made.run_id}, x"


def test_what_was_cut_from_another_student_is_another_run(files: dict[str, Path], tmp_path: Path) -> None:
    results = tmp_path / "results"
    made = run(results, plans(files, results)["a"], layers=3)
    second = plans(files, results)["b"]
    stale = run(results, second, layers=2, start="a/of-long-ago, x")
    found = plans(files, results)
    assert found["c"].start_source == "the largest shape of b, which has no student yet"
    assert run_of(results, second, tmp_path) is None and finished(results, second, tmp_path) == {}
    cut = run(results, second, layers=3, start=f"a/{made.run_id}, x")
    assert cut.run_id != stale.run_id
    assert run_of(results, second, tmp_path) == cut.run_id
    assert plans(files, results)["c"].start_source == f"student of b/{cut.run_id}, x"


def test_a_run_that_has_not_exported_is_no_student(files: dict[str, Path], tmp_path: Path) -> None:
    results = tmp_path / "results"
    made = run(results, plans(files, results)["a"], layers=3)
    (made.folder / "stages" / "export.json").unlink()
    assert plans(files, results)["b"].start_source == "the largest shape of a, which has no student yet"
