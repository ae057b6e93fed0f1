"""Error bars, agreement of ranks, lessons and baselines as people and programs read them."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from minitron_ray.cli import main
from minitron_ray.report.findings import interval_text
from minitron_ray.report.ranking import rank
from minitron_ray.report.sections import Section, markdown, show
from minitron_ray.report.text import markdown as page
from minitron_ray.report.text import render
from minitron_ray.results.run import Run
from minitron_ray.results.runs import read_info
from tests.report.conftest import MakeRun, rung

A, B, C, D = "aaaaaaaaaa", "bbbbbbbbbb", "cccccccccc", "dddddddddd"
SHAPE_A, SHAPE_B, SHAPE_C = "24L 576H 9h/3 1024m", "26L 576H 9h/3 1024m", "22L 576H 9h/3 1152m"


def comparison(subject: str, difference: float, width: float, **more: Any) -> dict[str, Any]:
    ends = {"low": difference - width, "high": difference + width}
    row = {"subject": subject, "other": A, "against": "best", "phase": "search", "tokens": 8192}
    return row | ends | {"difference": difference, "tied": width >= abs(difference), "sequences": 32} | more


def size(axis: str, of: int, trials: int, tokens: int, loss: float, **more: Any) -> dict[str, Any]:
    row = {"kind": "size", "axis": axis, "size": of, "tokens": tokens, "trials": trials, "dead_zone": False}
    return row | {"best_loss": loss, "mean_loss": loss + 0.1} | more


def flip(winner: str, loser: str, *, certain: bool = True) -> dict[str, Any]:
    row = {"kind": "flip", "winner": winner, "loser": loser, "from_tokens": 0, "tokens": 8192}
    return row | {"before": 0.25, "after": -0.0312, "certain": certain}


COMPARISONS = [comparison(B, 0.1, 0.2), comparison(C, 0.3, 0.1, tokens=4096)]
CORRELATIONS = [
    {"comparing": kind, "from_tokens": a, "to_tokens": b, "tau": tau, "p_value": p, "candidates": n}
    for kind, a, b, tau, p, n in [
        ("rung", 0, 4096, 0.666, 0.0004, 12),
        ("rung", 4096, 8192, 1.0, 0.333, 3),
        ("last", 0, 8192, -0.333, 1.0, 3),
        ("last", 4096, 8192, 1.0, 0.333, 3),
        ("zero_shot", 0, 8192, -0.2, 0.81, 5),
    ]
]
LESSONS = [
    size("layers", 22, 2, 4096, 3.9, dead_zone=True),
    size("layers", 24, 3, 4096, 3.5),
    size("mlp", 1024, 5, 4096, 3.4),
    size("mlp", 1152, 1, 8192, 3.3),
    {"kind": "importance", "axis": "layers", "tokens": 4096, "importance": 0.74},
    {"kind": "importance", "axis": "layers", "tokens": 8192, "importance": 0.11},
    flip(A, B),
    flip(A, C, certain=False),
]


@pytest.fixture
def concluded(make_run: MakeRun) -> Run:
    """The run of the other tests, with what its search found."""
    run: Run = make_run()
    written = {"comparisons": COMPARISONS, "rank_correlations": CORRELATIONS, "lessons": LESSONS}
    for table, rows in written.items():
        run.store.append(table, rows, writer="conclusion", sequence=0)
    baselines = [
        rung(B, 2, 3.9, origin="random", status="completed", final=True),
        rung(C, 2, 3.8, origin="random", status="completed", final=True),
        rung(D, 1, None, origin="random", status="failed", final=True, reason="loss became\nNaN"),
        rung(A, 2, 3.7, origin="largest_first", status="completed", final=True),
        rung(B, 0, 4.2, origin="largest_first", status="stopped", final=True),
        rung(A, 2, 3.2, origin="scratch", status="completed", final=True),
    ]
    run.store.append("trials", baselines, writer="baselines", sequence=0)
    compared = [
        comparison(f"random:{C}", 0.1, 0.02, phase="baseline"),
        comparison(f"random:{B}", 0.2, 0.02, phase="baseline"),
        comparison(f"largest_first:{A}", 0.0, 0.0, phase="baseline"),
        comparison(f"scratch:{A}", -0.5, 0.1, phase="baseline"),
    ]
    run.store.append("comparisons", compared, writer="conclusion", sequence=1)
    return run


def shown(run: Run, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    render(rank(read_info(run.folder)), console)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def part(lines: list[str], title: str) -> list[str]:
    """The lines of one section."""
    start = next(at for at, line in enumerate(lines) if line.startswith(title))
    rest = lines[start:]
    return rest[: rest.index("")] if "" in rest else rest


def test_error_bars_and_ties_stand_in_the_ranking(concluded: Run) -> None:
    entries = {entry.subject: entry for entry in rank(read_info(concluded.folder)).entries}
    assert entries[B].tied and entries[B].behind and entries[B].behind["difference"] == 0.1
    assert not entries[C].tied and entries[A].behind is None
    lines = shown(concluded, 200)
    assert any(
        line.startswith("2=") and "+0.1000 [-0.1000, +0.3000] =" in line and SHAPE_B in line for line in lines
    )
    assert any("+0.3000 [+0.2000, +0.4000]" in line and SHAPE_C in line for line in lines)


def test_a_tie_with_the_search_says_nothing_of_the_distilled(concluded: Run) -> None:
    """Best is a distilled student, the tie is among those that only finished the search."""
    lines = shown(concluded, 200)
    assert not any(line.startswith(("tied with the best", "no other student ties")) for line in lines)
    left = "tied with the search's best on 32 validation sequences, and not distilled"
    assert f"{left}: {SHAPE_B} (search.keep: ties)" in lines
    second = [comparison(B, 0.01, 0.03, phase="distilled", tokens=65_536)]
    concluded.store.append("comparisons", second, writer="conclusion", sequence=2)
    more = [
        {"subject": B, "phase": "distilled", "metric": "val_loss", "value": 3.61, "distill_tokens": 65_536}
    ]
    concluded.store.append("evaluations", more, writer="driver", sequence=1)
    lines = shown(concluded, 200)
    assert f"tied with the best on 32 validation sequences: {SHAPE_B}" in lines
    assert not any(line.startswith(left) for line in lines)
    assert any(line.startswith("2=") and "+0.0100 [-0.0200, +0.0400] =" in line for line in lines)


def test_who_is_best_after_distillation_is_behind_nobody(concluded: Run) -> None:
    """Though it was behind in the search, which another won."""
    ahead = [comparison(A, 0.1, 0.03, phase="distilled", tokens=65_536)]
    concluded.store.append("comparisons", ahead, writer="conclusion", sequence=2)
    more = [
        {"subject": B, "phase": "distilled", "metric": "val_loss", "value": 3.41, "distill_tokens": 65_536}
    ]
    concluded.store.append("evaluations", more, writer="driver", sequence=1)
    entries = {entry.subject: entry for entry in rank(read_info(concluded.folder)).entries}
    assert (entries[B].rank, entries[B].behind, entries[B].tied) == (1, None, False)
    assert entries[A].rank == 2 and entries[A].behind and entries[A].behind["phase"] == "distilled"
    assert "no other student ties with the best on 32 validation sequences" in shown(concluded, 200)


def test_a_tie_of_one_that_halving_stopped_is_said(concluded: Run) -> None:
    said = f"where halving stopped them: {SHAPE_C} (search.keep: ties trains them to the end)"
    assert not any(line.endswith(said) for line in shown(concluded, 200))
    concluded.store.append("comparisons", [comparison(C, 0.3, 0.4)], writer="conclusion", sequence=2)
    assert any(entry.subject == C and entry.tied for entry in rank(read_info(concluded.folder)).entries)
    assert f"tied with the search's best on 32 validation sequences {said}" in shown(concluded, 200)


def test_agreement_of_ranks_tells_every_pair_of_rungs_once(concluded: Run) -> None:
    lines = part(shown(concluded, 120), "Agreement of ranks")
    assert [line.split() for line in lines[3:5]] == [
        ["zero-shot", "8.2K", "tokens", "search", "-0.20", "0.810", "5"],
        ["the", "cut", "4.1K", "tokens", "search", "+0.67", "<", "0.001", "12"],
    ]
    assert lines[5].startswith("over the candidates that were measured at both")
    assert lines[6] == (
        "no tau is told of fewer than 4 candidates: left out 2 over search (table rank_correlations)"
    )
    assert "+1.00" not in "".join(lines) and len(lines) == 7


def test_agreement_of_ranks_is_told_of_whom_it_is_over(concluded: Run) -> None:
    """Rows of one pair stand together; the search's own has too few candidates at the last rung."""
    more = [
        {"comparing": "last", "from_tokens": 0, "to_tokens": 8192, "tau": tau, "p_value": 0.5}
        | {"candidates": count, "over": over}
        for over, tau, count in [("random", 0.667, 4), ("search and random", 0.467, 6)]
    ]
    concluded.store.append("rank_correlations", more, writer="conclusion", sequence=1)
    lines = part(shown(concluded, 80), "Agreement of ranks")
    assert [line.split()[-6:] for line in lines[5:7]] == [
        ["search", "and", "random", "+0.47", "0.500", "6"],
        ["8.2K", "tokens", "random", "+0.67", "0.500", "4"],
    ]
    assert lines[8].startswith("random: drawn by lot and all trained to the end")


def test_lessons_are_of_the_rung_that_most_trials_reached(concluded: Run) -> None:
    lines = part(shown(concluded, 120), "Lessons")
    assert lines[0] == "Lessons: sizes after 4.1K tokens"
    assert [line.split() for line in lines[3:6]] == [
        ["layers", "22", "2", "3.9000", "4.0000", "74%", "dead"],
        ["24", "3", "3.5000", "3.6000"],
        ["mlp", "1024", "5", "3.4000", "3.5000"],
    ]
    assert (
        f"flipped: {SHAPE_A} was 0.2500 behind {SHAPE_B} as cut, and 0.0312 ahead after 8.2K tokens" in lines
    )
    assert "1 more changed places, none of them beyond the error bars (table lessons)" in lines


@pytest.mark.parametrize(
    ("flips", "said"),
    [
        ([], "no two candidates changed places"),
        ([flip(A, B, certain=False)], "one pair changed places, not beyond the error bars"),
        ([flip(A, B, certain=False)] * 2, "2 pairs changed places, none beyond the error bars"),
        ([flip(A, B)] * 7, "2 more changed places, 2 of them beyond the error bars"),
    ],
)
def test_flips_are_counted(make_run: MakeRun, flips: list[dict[str, Any]], said: str) -> None:
    run = make_run()
    run.store.append("lessons", [size("mlp", 64, 1, 4096, 3.0), *flips], writer="conclusion", sequence=0)
    lines = part(shown(run, 120), "Lessons")
    assert lines[-1].startswith(said)
    assert sum(line.startswith("flipped:") for line in lines) == min(5, sum(row["certain"] for row in flips))
    assert "zone" not in lines[1] and "importance" not in lines[1], "columns with nothing to say"


def test_baselines_show_the_best_of_each(concluded: Run) -> None:
    lines = part(shown(concluded, 80), "Baselines")
    assert [[line.split()[0], line.split()[-1]] for line in lines[4:7]] == [
        ["random", "20.5K"],
        ["largest_first", "8.2K"],
        ["scratch", "8.2K"],
    ]
    random, largest_first, scratch = lines[4:7]
    assert SHAPE_C in random and "3.8000" in random and "+0.1000 [+0.0800, +0.1200]" in random
    assert SHAPE_A in largest_first and "3.7000" in largest_first and "the same student" in largest_first
    assert SHAPE_A in scratch and "-0.5000 [-0.6000, -0.4000]" in scratch
    text = "\n".join(lines)
    assert "random: the best of 3 drawn by lot" in text
    assert "failed: random 28L 576H 9h/3 896m: loss became NaN" in text
    assert lines[-1] == "better than the search's best, beyond the error bars: scratch"


def test_baselines_are_not_ranked_among_the_trials(concluded: Run) -> None:
    entries = {entry.subject: entry for entry in rank(read_info(concluded.folder)).entries}
    assert (entries[A].search_loss, entries[B].search_loss, entries[C].search_loss) == (3.7, 3.8, 3.1)
    assert len(entries) == 5


@pytest.mark.parametrize("width", [80, 120])
def test_sections_fit_the_width_and_cut_nothing(concluded: Run, width: int) -> None:
    lines = shown(concluded, width)
    start = lines.index("Agreement of ranks (Kendall's tau-b)")
    tables = [line for line in lines[start:] if not line.startswith(("over the", "no tau", "flipped"))]
    assert max(map(len, tables)) <= width
    assert not any("…" in line for line in lines)


def test_a_front_is_shown_by_loss(make_run: MakeRun) -> None:
    run = make_run()
    front = {"kind": "front", "axis": "latency", "tokens": 8192}
    rows = [
        front | {"candidate_id": A, "best_loss": 3.7, "cost": 0.0125},
        front | {"candidate_id": B, "best_loss": 3.8, "cost": 0.0101},
    ]
    run.store.append("lessons", rows, writer="conclusion", sequence=0)
    lines = part(shown(run, 80), "Front of loss and latency")
    assert [line.split()[-3:] for line in lines[3:5]] == [["3.7000", "12.50", A], ["3.8000", "10.10", B]]


def test_json_has_the_rows_and_markdown_the_sections(concluded: Run, results: Path) -> None:
    def call(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["report", *arguments, "--results", str(results)])
        assert result.exit_code == 0, result.output
        return result.stdout

    found = json.loads(call("--json"))
    assert [row["tau"] for row in found["correlations"]] == [row["tau"] for row in CORRELATIONS]
    assert len(found["lessons"]) == len(LESSONS) and len(found["baselines"]) == 6
    assert [entry["tied"] for entry in found["entries"]] == [False, False, True, False, False]
    text = call("--md")
    for title in ("Baselines", "Agreement of ranks", "Lessons"):
        assert f"\n### {title}" in text
    assert "| zero-shot | 8.2K tokens | search | -0.20 | 0.810 | 5 |" in text


def test_a_run_from_before_these_tables_reads_as_it_did(make_run: MakeRun) -> None:
    ranking = rank(read_info(make_run().folder))
    assert ranking.sections == () and "behind" not in page(ranking)


def test_an_interval_without_ends_says_so() -> None:
    row = {"difference": 0.0712, "low": -math.inf, "high": math.inf, "tied": True}
    assert interval_text(row) == "+0.0712 [?, ?] ="


def test_a_section_goes_on_in_a_second_table_and_keeps_brackets() -> None:
    section = Section(
        title="Wide [things]",
        header=("name", "one-\ntwo", "other"),
        rows=(("[bold]x", "1" * 30, "2" * 30),),
        notes=("a | b",),
    )
    console = Console(file=io.StringIO(), width=50)
    show(section, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("[bold]x") == 2 and "1" * 30 in text and "2" * 30 in text and "Wide [things]" in text
    lines = markdown(section).splitlines()
    assert lines[3:6] == [
        "| name | onetwo | other |",
        "| --- | ---: | ---: |",
        f"| [bold]x | {'1' * 30} | {'2' * 30} |",
    ]
