"""`plan`: what a user sees in narrow and wide terminals and in a pipe, and what `--json` says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from minitron_ray.cli import main

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
CLUSTER = EXPERIMENTS.parent / "cluster"
PAPER = [str(EXPERIMENTS / name) for name in ("15b_to_8b.yaml", "8b_to_4b.yaml")]
QUICKSTART = str(EXPERIMENTS / "quickstart.yaml")
SMOLLM = str(EXPERIMENTS / "smollm2_135m_to_90m.yaml")
STAGES = ("importance", "teacher", "search", "distill", "evaluate", "export")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*arguments: str, columns: int = 80, code: int = 0) -> Result:
        monkeypatch.setenv("COLUMNS", str(columns))
        result = CliRunner().invoke(main, ["plan", *arguments, "--results", str(tmp_path / "results")])
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def eight_h100s(tmp_path: Path) -> str:
    path = tmp_path / "h100.yaml"
    path.write_text("devices: {kind: h100, count: 8}\n")
    return str(path)


def tables(text: str) -> list[str]:
    """The lines that rich has laid out: those between two rules of a table or under one, not sentences."""
    return [line for line in text.splitlines() if line.startswith(" ")]


@pytest.mark.parametrize("columns", [80, 120])
def test_no_figure_is_cut_off(plan: Any, eight_h100s: str, columns: int) -> None:
    text = plan(*PAPER, "--cluster", eight_h100s, columns=columns).stdout
    assert "…" not in text
    assert max(map(len, tables(text))) <= columns
    for stage in STAGES:
        assert f"\n {stage} " in text and f"\n{stage} " in text


def test_the_papers_saving_stands_under_the_two_files(plan: Any) -> None:
    text = plan(*PAPER).stdout
    assert "family      15.6B + 8.272B + " in text and ": 1.79 times less compute" in text
    assert "family" not in plan(PAPER[0]).stdout


def test_the_searchs_saving_at_twenty_trials(plan: Any) -> None:
    text = plan(PAPER[0], "--set", "search.signal.kind=sampled").stdout
    [row] = [line.split() for line in text.splitlines() if line.startswith("     20 ")]
    online, exact, sampled, halved = float(row[1]), *map(float, row[4::2])
    assert online == 2.8e21 and 1.4 < exact < 1.6 < sampled + 0.1 and halved > 4


def test_the_papers_experiments_fit_the_gpus_of_a_shipped_file(plan: Any) -> None:
    """Held against a file that is made for fewer, with which they do not."""
    for path in PAPER:
        assert "too large" in plan(path, "--cluster", str(CLUSTER / "remote.yaml")).stdout
        text = plan(path, "--cluster", str(CLUSTER / "gpu.yaml")).stdout
        assert "too large" not in text
        assert "spread over 8..16 workers" in text and "hardware    16 x h100" in text


def test_device_time_needs_devices(plan: Any, eight_h100s: str) -> None:
    without = plan(PAPER[0]).stdout
    assert "device time" not in without and "--probe" in without
    timed = plan(PAPER[0], "--cluster", eight_h100s).stdout
    assert "device time" in timed
    assert "hardware    8 x h100 at 396 TFLOP/s each (40% of 989 TFLOP/s)" in timed
    assert "h100 has 80.0 GiB: in the cluster file lower micro_batch (now 4)" in timed


@pytest.mark.parametrize(
    ("signal", "memory", "stages"), [("sampled", 28, "teacher and evaluate"), ("online", 36, "evaluate")]
)
def test_a_teacher_that_fits_no_device_is_said_with_what_helps(
    plan: Any, tmp_path: Path, signal: str, memory: int, stages: str
) -> None:
    """15.6B weights in bfloat16. Where the teacher runs in trials, it is `evaluate` that holds it again."""
    path = tmp_path / "devices.yaml"

    def told(settings: str) -> str:
        path.write_text(f"devices: {{flops: 400T, memory: {memory}GiB, count: 8}}\n{settings}\n")
        text = plan(
            PAPER[0], "--set", f"search.signal.kind={signal}", "--cluster", str(path), columns=2000
        ).stdout
        [line] = [line for line in text.splitlines() if line.startswith("too large")]
        return line  # a student in training is, in any case

    for now in ("auto", "whole"):
        text = told(f"teacher: {now}")
        assert f"; {stages}: teacher: sharded, now {now}, spreads them over all workers" in text
        assert all(f"{stage} " in text.split(";")[0] for stage in stages.split(" and "))
    for helps in ("teacher: sharded", "trial_workers: 8"):
        text = told(helps)
        assert "teacher" not in text and "evaluate" not in text and "distill" in text


def test_budgets_and_serving_are_said_and_judged(plan: Any) -> None:
    budget = "budget={parameters: 7.8B..8.5B, memory: <= 20GiB, flops: <= 15.2B, at: {batch: 8}}"
    serving = "search.serving={tensor_parallel: 2, kernels: [int4], gguf: k_quants}"
    text = plan(PAPER[0], "--set", budget, "--set", "search.trials=3", "--set", serving).stdout
    assert (
        "7.800B to 8.500B parameters, at most 20.0 GiB of memory, at most 15.2B FLOPs a token "
        "(8 x 4096 tokens in bfloat16)" in text
    )
    assert "2 devices a layer, int4 kernels, gguf k_quants: 0 shapes that can be cut do not fit" in text
    assert "9 of 160 shapes are inside" in text and "18.6 GiB" in text


def test_json_has_the_same(plan: Any, eight_h100s: str) -> None:
    sampled = ("--set", "search.signal.kind=sampled")
    first, second = json.loads(plan(*PAPER, *sampled, "--cluster", eight_h100s, "--json").stdout)
    distill = next(cost for cost in first["costs"] if cost["stage"] == "distill")
    assert distill["device_seconds"] == pytest.approx(distill["flops"] / (0.4 * 989e12))
    assert {"what", "tokens", "memory_bytes", "disk_bytes"} <= set(distill)
    assert first["hardware"]["count"] == 8
    assert [saving["trials"] for saving in first["savings"]] == [15, 15, 20, 20]
    assert round(second["family_saving"]["papers_times"], 1) == 1.8


def test_a_halving_before_ranks_mean_anything_is_warned_of(plan: Any) -> None:
    """12,288 tokens in three rungs: the first after 3072, of 4 x 256 tokens a step."""
    larger = ("--set", "search.retrain.batch=4")
    text = plan(SMOLLM, *larger).stdout
    [early] = [line for line in text.splitlines() if line.startswith("too early")]
    assert "after 3 optimizer steps of 12" in early and "search.retrain.rungs" in early
    assert "of which 2 go to the end, the first halving after 3 optimizer steps; " in text
    [found] = json.loads(plan(SMOLLM, *larger, "--json").stdout)
    assert found["first_halving_steps"] == 3 and len(found["warnings"]) == 1
    quickstart = plan(str(EXPERIMENTS / "quickstart.yaml")).stdout
    assert "the first halving after 5 optimizer steps; " in quickstart and "too early" not in quickstart
    assert "halving after" not in plan(PAPER[0]).stdout, "nothing is halved there"


def test_a_sampler_that_learns_nothing_is_said(plan: Any) -> None:
    """Six trials in one cohort; in two of three the second still knows three results, and needs four."""

    def line(*more: str) -> str:
        return next(
            one for one in plan(QUICKSTART, *more).stdout.splitlines() if one.startswith("candidates")
        )

    nothing = "6 will be tried, all chosen before tpe knows results enough: the best undistilled cuts and others by lot"
    assert line().endswith(nothing)
    assert line("--set", "search.halving.cohort=3").endswith(nothing)
    learns = line("--set", "search.halving.cohort=3", "--set", "search.sampler={kind: tpe, startup: 3}")
    assert learns.endswith("6 will be tried")
    assert line("--set", "search.sampler={kind: random}").endswith("6 will be tried")
    assert line("--set", "search.trials=8").endswith("8 will be tried (all of them)")


def test_devices_that_a_cohort_leaves_idle_are_said(plan: Any, eight_h100s: str) -> None:
    """8 trials in two cohorts of 4; one of 8 keeps all devices busy, and so do pairs of them where one device is too
    small."""

    def idle(*more: str) -> list[str]:
        lines = plan(SMOLLM, "--cluster", eight_h100s, *more).stdout.splitlines()
        return [line for line in lines if line.startswith("idle")]

    [line] = idle()
    assert (
        "at most 4 of 8 devices busy" in line and "a cohort is 4 trials" in line and "halving.cohort" in line
    )
    assert idle("--set", "search.halving.cohort=8") == [] == idle("--set", "search.sampler={kind: random}")
    [few] = idle("--set", "search.sampler={kind: random}", "--set", "search.trials=6")
    assert few.endswith("at most 6 of 8 devices busy: it has 6 trials in all")
    Path(eight_h100s).write_text("devices: {kind: h100, count: 8}\ntrial_workers: 2\n")
    assert idle() == [line], "each of these students trains in one process: one device holds it"
    Path(eight_h100s).write_text("devices: {flops: 100T, memory: 1GiB, count: 8}\ntrial_workers: 2\n")
    assert idle() == []


def test_a_wrong_cluster_file_is_a_mistake_of_the_user(plan: Any, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("devices: {kind: tpu}\n")
    result = plan(SMOLLM, "--cluster", str(path), code=2)
    assert "devices.kind: 'tpu' is not known here" in result.stderr


def test_a_plan_loads_no_tensor_library_and_is_plain_in_a_pipe(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom minitron_ray.cli import main\n"
        f"main(['plan', {SMOLLM!r}, '--results', {str(tmp_path)!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'ray', 'transformers', 'optuna'} & set(sys.modules)))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.endswith("[]\n")
    assert "\x1b" not in done.stdout and "…" not in done.stdout
