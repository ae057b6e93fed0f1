"""An ablation's table against figures worked out by hand, and what it reads from a run's tables."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from minitron_ray.ablation import Ablation
from minitron_ray.report.ablation import (
    Comparison,
    Outcome,
    compare,
    outcome_of,
    paired,
    ranks,
    recorded_run,
)
from minitron_ray.report.ablation_text import csv_text, markdown, render, sentences
from minitron_ray.results.runs import read_info
from tests.report.conftest import RESOLVED, MakeRun

ABLATION = Ablation.model_validate(
    {
        "name": "pages",
        "question": "Which?",
        "base": {},
        "variants": {"a": {}, "b": {}, "c": {}, "random": {}},
        "measure": "cut",
        "paper": {"source": "Table 0", "unit": "loss", "figures": {"a": 2.0, "b": 3.0, "c": 1.0}},
    }
)


def outcome(variant: str, *losses: float, **more: object) -> Outcome:
    known = Outcome(
        variant=variant,
        status="succeeded",
        run_id=f"run-{variant}",
        parameters=1_500_000,
        losses={"cut": math.fsum(losses) / len(losses)},
        divergences={"cut": 0.5},
        sequences={"cut": dict(enumerate(losses))},
        teacher_loss=1.0,
    )
    return replace(known, **more)  # type: ignore[arg-type]


@pytest.fixture
def comparison() -> Comparison:
    failed = Outcome(variant="c", status="failed", reason="prepare: no\ntext")
    return compare(
        ABLATION,
        [
            outcome("a", 4.0, 5.0, 6.0),
            outcome("b", 2.0, 3.0, 4.0),
            failed,
            outcome("random", 3.0, 5.0, 7.0),
        ],
    )


def test_ranks_share_ties() -> None:
    assert ranks({"a": 2.0, "b": 1.0, "c": 2.0, "d": 3.0}) == {"a": 2, "b": 1, "c": 2, "d": 4}


def test_sequences_are_compared_in_pairs() -> None:
    """Differences 2, 2, 2 and 1, 2, 3: the same mean, errors 0 and sqrt(1 / 3)."""
    best = {0: 2.0, 1: 3.0, 2: 4.0}
    assert paired({2: 6.0, 0: 4.0, 1: 5.0}, best) == (2.0, 0.0)
    mean, error = paired({0: 3.0, 1: 5.0, 2: 7.0}, best)
    assert (mean, error) == (2.0, pytest.approx(math.sqrt(1 / 3)))
    assert paired({0: 3.0}, {0: 1.0}) == (2.0, None)
    assert paired({0: 3.0, 1: 1.0}, best) == (None, None)  # other sequences
    assert paired({}, {}) == (None, None)


def test_the_comparison(comparison: Comparison) -> None:
    a, b, c, random = comparison.rows
    assert (comparison.best, comparison.sequences) == ("b", 3)
    assert [row.rank for row in comparison.rows] == [2, 1, None, 2]
    assert [row.paper_rank for row in comparison.rows] == [2, 3, 1, None]
    assert (a.difference, a.difference_stderr) == (2.0, 0.0)
    assert (b.difference, b.difference_stderr) == (0.0, None)
    assert (random.difference, random.difference_stderr) == (2.0, pytest.approx(math.sqrt(1 / 3)))
    assert (c.cut_loss, c.difference, c.status) == (None, None, "failed")
    assert b.cut_perplexity == pytest.approx(math.e**3)
    assert (comparison.tau, comparison.tau_variants) == (-1.0, 2)  # a and b, in the other order


def test_a_paper_may_want_more_instead_of_less() -> None:
    assert ABLATION.paper is not None
    accuracy = ABLATION.model_copy(update={"paper": ABLATION.paper.model_copy(update={"better": "higher"})})
    found = compare(accuracy, [outcome("a", 4.0), outcome("b", 2.0), outcome("c", 5.0)])
    assert [row.paper_rank for row in found.rows] == [2, 1, 3]
    assert found.tau == 1 and [row.paper for row in found.rows] == [2.0, 3.0, 1.0]


def test_without_a_paper_there_is_no_order_to_agree_with() -> None:
    found = compare(ABLATION.model_copy(update={"paper": None}), [outcome("a", 4.0), outcome("b", 2.0)])
    assert (found.tau, found.source) == (None, None)
    assert not any("tau" in line for line in sentences(found))


def test_nothing_ran() -> None:
    found = compare(
        ABLATION, [Outcome(variant="a", status="not run"), Outcome(variant="b", status="not run")]
    )
    assert (found.best, found.tau) == (None, None)
    assert "not run: a, b" in list(sentences(found))


def test_the_sentences(comparison: Comparison) -> None:
    assert list(sentences(comparison)) == [
        "best as cut: b, loss 3.0000 on 3 sequences; the teacher's is 1.0000 (perplexity 2.72)",
        "paper: Table 0; in loss",
        "Kendall's tau between the two orders is -1.00, over 2 variants",
        "failed: c: prepare: no text",
    ]
    near = compare(ABLATION, [outcome("a", 2.0, 3.1), outcome("b", 2.1, 3.0)])
    assert "within two standard errors of the best: b" in list(sentences(near))


def test_the_page_holds_every_figure(comparison: Comparison) -> None:
    lines = markdown(comparison).splitlines()
    assert lines[0] == "## pages" and lines[2] == "Which?"
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    header = dict(zip(table[0], table[2], strict=True))
    assert header == {
        "variant": "a",
        "status": "succeeded",
        "params": "1.5M",
        "cut loss": "5.0000",
        "cut perplexity": "148.41",
        "final loss": "-",
        "final perplexity": "-",
        "KL to teacher": "0.5000",
        "above the best ± std. error": "2.0000 ± 0.0000",
        "rank": "2",
        "paper": "2",
        "paper's rank": "2",
    }
    assert len(table) == 2 + 4


def test_a_terminal_of_eighty_columns_cuts_nothing(comparison: Comparison) -> None:
    console = Console(file=io.StringIO(), width=80)
    render(comparison, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for value in ("148.41", "2.0000 ± 0.5774", "random", "1.5M", "paper's"):
        assert value in text
    assert "…" not in text


def test_the_csv_is_read_back(comparison: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(comparison))))
    assert [row["variant"] for row in rows] == ["a", "b", "c", "random"]
    assert set(rows[0]) == set(asdict(comparison.rows[0]))
    assert rows[0]["cut_perplexity"] == "148.413159" and rows[2]["cut_loss"] == ""
    assert rows[2]["reason"] == "prepare: no\ntext"


# --- From a run -----------------------------------------------------------------------------------------


def test_what_a_run_says(make_run: MakeRun) -> None:
    run = make_run()
    rows = [
        {"subject": subject, "phase": phase, "sequence": sequence, "loss": 3.0 + sequence}
        for subject, phase in (
            ("teacher", "teacher"),
            ("aaaaaaaaaa", "distilled"),
            ("bbbbbbbbbb", "distilled"),
        )
        for sequence in (7, 9)
    ]
    run.store.append("sequence_losses", rows, writer="evaluate", sequence=0)
    found = outcome_of("x", read_info(run.folder), "distilled")
    assert (found.status, found.reason, found.run_id) == ("succeeded", None, run.run_id)
    assert found.losses == {"cut": 4.25, "distilled": 3.6} and found.teacher_loss == 3.35
    assert found.sequences == {"distilled": {7: 10.0, 9: 12.0}}
    assert found.parameters == 98_000_000 and found.shape is not None and "24L" in found.shape


def test_a_run_that_stopped_has_no_figures_and_a_loss_that_is_nan_is_none(make_run: MakeRun) -> None:
    run = make_run("search")
    run.note_stage("distill", "f", "failed", "loss nan at step 3", 1.0)
    run.set_status("failed")
    found = outcome_of("x", read_info(run.folder), "distilled")
    assert (found.status, found.reason) == ("failed", "distill: loss nan at step 3")
    assert found.losses == {} and found.parameters is None

    row = {"subject": "aaaaaaaaaa", "phase": "distilled", "metric": "val_loss", "value": math.nan}
    run.store.append("evaluations", [row], writer="late", sequence=0)
    assert outcome_of("x", read_info(run.folder), "distilled").losses == {}


def test_the_run_of_an_experiment_is_found_again(make_run: MakeRun, results: Path) -> None:
    from minitron_ray.experiment import Experiment

    experiment = Experiment.model_validate(
        {
            "name": "quickstart",
            "teacher": {"path": "./t"},
            "data": {"source": {"kind": "files", "path": "x"}},
            "shape": {"mlp": 64},
        }
    )
    assert recorded_run(results, experiment) is None
    make_run(resolved=RESOLVED)  # of the same name, but another experiment
    assert recorded_run(results, experiment) is None


def test_the_run_of_exactly_this_experiment_is_preferred_if_it_succeeded(results: Path) -> None:
    from minitron_ray.experiment import Experiment
    from minitron_ray.results.run import Run

    experiment = Experiment.model_validate(
        {
            "name": "small",
            "teacher": {"path": "./t"},
            "data": {"source": {"kind": "files", "path": "x"}},
            "shape": {"mlp": 64},
            "distill": {"tokens": 4096, "learning_rate": 1e-05},
        }
    )
    resolved = experiment.model_dump(mode="json")
    done, later = (
        Run.open(results, "small", mark * 32, b"", resolved=resolved, environment={}) for mark in ("ab", "cd")
    )
    done.set_status("succeeded")
    later.set_status("interrupted")
    found = recorded_run(results, experiment)
    assert found is not None and found.folder == done.folder
