"""The ranking and the list of runs as people see them, at the widths they have."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from minitron_ray.report import listing
from minitron_ray.report.ranking import Ranking, rank
from minitron_ray.report.text import columns_of, markdown, render
from minitron_ray.results.runs import RunInfo

FIGURES = [
    "134.5M", "98.0M", "103.0M", "4.2500", "3.7000", "3.6000", "36.60", "77.9%", "-2.0%", "65.5K", "1:12",
]  # fmt: skip


def shown(ranking: Ranking, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    render(ranking, console)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def tables(lines: list[str]) -> int:
    return sum(set(line) == {"─"} for line in lines)


@pytest.mark.parametrize(("width", "count"), [(80, 2), (100, 2), (120, 1), (200, 1)])
def test_every_figure_is_whole_at_every_width(info: RunInfo, width: int, count: int) -> None:
    lines = shown(rank(info), width)
    assert tables(lines) == count
    words = " ".join(lines).split()
    assert [figure for figure in FIGURES if figure not in words] == []
    assert not any("…" in line or "..." in line for line in lines)
    assert all(len(line) <= width for line in lines if not re.match("best:|exported:|failed:", line))


@pytest.mark.parametrize("width", [80, 120])
def test_big_models_fit_as_well(info: RunInfo, width: int) -> None:
    ranking = rank(info)
    big = [
        replace(
            entry,
            shape="32L 4096H 48h 16384m",
            parameters=8_271_699_968,
            tokens=94_000_000_000,
            seconds=987_654.0,
        )
        for entry in ranking.entries
    ]
    lines = shown(replace(ranking, entries=tuple(big)), width)
    assert all(len(line) <= width for line in lines if not re.match("best:|exported:|failed:", line))
    words = " ".join(lines).split()
    assert words.count("8.272B") == 5 and words.count("94.000B") + words.count("94.0B") == 5
    assert words.count("274:20:54") == 5


def test_what_a_reader_takes_away(info: RunInfo) -> None:
    lines = shown(rank(info), 120)
    assert (
        "best: 24L 576H 9h/3 1024m, loss 3.6000 after distillation against 4.2500 as cut; "
        "77.9% of the teacher by perplexity" in lines
    )
    assert f"exported: 24L 576H 9h/3 1024m in {info.folder}/exports/aaaaaaaaaa" in lines
    assert "failed: 28L 576H 9h/3 896m: loss became NaN at step 3" in lines


def test_an_unfinished_run_says_how_to_go_on(info: RunInfo) -> None:
    ranking = replace(rank(info), missing=("no student is exported",), status="interrupted")
    lines = shown(ranking, 80)
    assert "not yet: no student is exported" in lines
    assert lines[-1].startswith("the run is interrupted: `minitron-ray run` on its experiment goes on")
    assert "goes on" not in shown(replace(ranking, status="running"), 80)[-1]


def test_brackets_are_text_and_not_markup(info: RunInfo) -> None:
    ranking = rank(info)
    failed = replace(ranking.entries[-1], reason="shape [bold]9[/] is [/wrong]")
    lines = shown(replace(ranking, entries=(*ranking.entries[:-1], failed)), 120)
    assert "failed: 28L 576H 9h/3 896m: shape [bold]9[/] is [/wrong]" in lines


def test_markdown_has_a_cell_for_every_column(info: RunInfo) -> None:
    lines = markdown(rank(info)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 7 and len({row.count("|") for row in rows}) == 1
    assert rows[0].startswith(
        "| # | shape | status | params | cut loss | search loss | final loss | perplexity |"
    )
    assert rows[3].startswith(
        "| 1 | 24L 576H 9h/3 1024m | distilled | 98.0M | 4.2500 | 3.7000 | 3.6000 | 36.60 |"
    )


@pytest.mark.parametrize("width", [80, 120])
def test_runs_are_listed_whole(info: RunInfo, width: int) -> None:
    line = listing.summarise(info)
    assert (line.best_loss, line.status, len(line.stages_done)) == (3.6, "succeeded", 7)
    console = Console(file=io.StringIO(), width=width)
    long = replace(line, experiment="smollm2_135m_to_90m_with_a_very_long_name_indeed_0123456789")
    listing.render([line, long], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    assert text.count(info.run_id) == 2 and text.count("7/7") == 2 and text.count("3.6000") == 2
    assert f"{info.created:%Y-%m-%d}" in text and f"{info.created:%H:%M}" in text and "…" not in text


SHAPE_ONLY = ("prepare", "importance", "teacher", "evaluate", "export")


def headers(ranking: Ranking) -> set[str]:
    return {column.header.replace("\n", " ") for column in columns_of(ranking)}


def test_a_fixed_shape_that_is_not_trained_has_one_loss(info: RunInfo) -> None:
    teacher, best, *_ = rank(info).entries
    cut = replace(best, status="cut", search_loss=None, final_loss=None, tokens=None, seconds=None)
    ranking = replace(rank(info), stages=SHAPE_ONLY, budget=None, entries=(teacher, cut))
    assert headers(ranking) == {
        "#",
        "shape",
        "status",
        "params",
        "loss",
        "per- plexity",
        "of teacher",
        "candidate",
    }
    text = "\n".join(shown(ranking, 80))
    assert "student: 24L 576H 9h/3 1024m, loss 4.2500 as cut; 77.9% of the teacher" in text
    assert "None" not in text and "budget" not in text and "distillation" not in text


def test_a_search_alone_says_that_nothing_is_exported(info: RunInfo) -> None:
    stages = ("prepare", "importance", "teacher", "search", "evaluate")
    teacher, best, *others = rank(info).entries
    best = replace(best, status="completed", final_loss=None, export=None)
    ranking = replace(rank(info), stages=stages, entries=(teacher, best, *others))
    assert {"cut loss", "loss", "off budget", "tokens"} <= headers(ranking)
    assert not {"search loss", "final loss"} & headers(ranking)
    lines = shown(ranking, 120)
    assert any("loss 3.7000 after its trial against 4.2500 as cut" in line for line in lines)
    assert any(line.startswith("nothing is exported: trials keep no weights") for line in lines)
    unfinished = replace(ranking, missing=("the search has not finished",), status="running")
    assert not any("nothing is exported" in line for line in shown(unfinished, 120))
