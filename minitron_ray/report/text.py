"""A `Ranking` for people: `render` to a terminal or pipe of any width, `markdown` for a page.

Where the columns do not all fit side by side they go on in a second table under the first. No
figure is ever cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minitron_ray.core.units import format_count, format_seconds
from minitron_ray.report.ranking import Entry, Ranking

NONE = "-"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Column:
    """`text` of an entry under a header of one or two lines."""

    header: str
    text: Callable[[Entry], str]
    right: bool = True
    shown: Callable[[Sequence[str]], bool] = lambda stages: True
    """Whether a run of these stages has something to say under it that no other column says."""


def _trains(stages: Sequence[str]) -> bool:
    return "search" in stages or "distill" in stages


COLUMNS = (
    Column("#", lambda e: _or_none(e.rank, str)),
    Column("shape", lambda e: _name(e), right=False),
    Column("status", lambda e: e.status, right=False),
    Column("params", lambda e: _or_none(e.parameters, format_count)),
    Column("cut\nloss", lambda e: _or_none(e.cut_loss, _loss), shown=_trains),
    Column("loss", lambda e: _or_none(e.loss, _loss), shown=lambda s: "distill" not in s),
    Column(
        "search\nloss",
        lambda e: _or_none(e.search_loss, _loss),
        shown=lambda s: "search" in s and "distill" in s,
    ),
    Column("final\nloss", lambda e: _or_none(e.final_loss, _loss), shown=lambda s: "distill" in s),
    Column("per-\nplexity", lambda e: _or_none(e.perplexity, _perplexity)),
    Column("of\nteacher", lambda e: _or_none(e.recovery, lambda v: f"{100 * v:.1f}%")),
    Column(
        "off\nbudget",
        lambda e: _or_none(e.budget_distance, lambda v: f"{100 * v:+.1f}%"),
        shown=lambda s: "search" in s,
    ),
    Column("tokens", lambda e: _or_none(e.tokens, format_count), shown=_trains),
    Column("time", lambda e: _or_none(e.seconds, format_seconds), shown=_trains),
    Column("candidate", lambda e: NONE if e.status == "teacher" else e.subject, right=False),
)
_KEYS = 2
"""Columns that every one of several tables begins with."""


def render(ranking: Ranking, console: Console) -> None:
    """Prints the ranking, what is still missing, and why trials failed."""
    console.print(
        f"[bold]{escape(ranking.experiment)}[/]  run {ranking.run_id}  {ranking.status}", style=None
    )
    if ranking.budget:
        console.print(f"budget {ranking.budget}")
    for table in _tables(columns_of(ranking), ranking.entries, console):
        console.print()
        console.print(table)
    console.print()
    for line in sentences(ranking):
        console.print(escape(line), soft_wrap=True, highlight=False)


def columns_of(ranking: Ranking) -> list[Column]:
    """The columns that a run of these stages fills."""
    return [column for column in COLUMNS if column.shown(ranking.stages)]


def markdown(ranking: Ranking) -> str:
    """The same as a Markdown page."""
    columns = columns_of(ranking)
    header = [column.header.replace("-\n", "").replace("\n", " ") for column in columns]
    rule = ["---:" if column.right else "---" for column in columns]
    rows = [[column.text(entry) or " " for column in columns] for entry in ranking.entries]
    table = ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]
    title = [f"## {ranking.experiment}, run {ranking.run_id} ({ranking.status})", ""]
    budget = [f"Budget: {ranking.budget}", ""] if ranking.budget else []
    notes = [f"- {line}" for line in sentences(ranking)]
    return "\n".join([*title, *budget, *table, "", *notes]) + "\n"


def sentences(ranking: Ranking) -> Iterator[str]:
    """What a reader should take away, one fact a line."""
    best = next((entry for entry in ranking.entries if entry.rank == 1), None)
    if best and best.loss is not None and (best.final_loss is not None or "distill" not in ranking.stages):
        yield from _verdict(best)
    for entry in ranking.entries:
        if entry.export:
            yield f"exported: {_name(entry)} in {ranking.folder}/{entry.export}"
    for entry in ranking.entries:
        if entry.status == "failed":
            reason = " ".join((entry.reason or "no reason was recorded").split())
            yield f"failed: {_name(entry)}: {reason}"
    if not ranking.missing and "export" not in ranking.stages:
        yield (
            "nothing is exported: trials keep no weights; add distill to the experiment to train the best of "
            "them, the search is then reused"
        )
    for missing in ranking.missing:
        yield f"not yet: {missing}"
    if ranking.missing and ranking.status != "running":
        yield f"the run is {ranking.status}: `minitron-ray run` on its experiment goes on where it ended"


def _verdict(best: Entry) -> Iterator[str]:
    assert best.loss is not None
    line = f"best: {_name(best)}, loss {_loss(best.loss)}"
    if best.status == "cut":
        line = f"student: {_name(best)}, loss {_loss(best.loss)} as cut"
    elif best.cut_loss is not None:
        trained = "distillation" if best.final_loss is not None else "its trial"
        line += f" after {trained} against {_loss(best.cut_loss)} as cut"
    if best.recovery is not None:
        line += f"; {100 * best.recovery:.1f}% of the teacher by perplexity"
    yield line


def _name(entry: Entry) -> str:
    return entry.shape or entry.subject


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e6 else f"{value:.2e}"


def _or_none(value: _T | None, text: Callable[[_T], str]) -> str:
    return NONE if value is None else text(value)


def _table(columns: Sequence[Column], entries: Sequence[Entry]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        side: Literal["left", "right"] = "right" if column.right else "left"
        table.add_column(column.header, justify=side, vertical="bottom", no_wrap=True, overflow="fold")
    for entry in entries:
        style = {"teacher": "bold", "failed": "red", "stopped": "dim"}.get(entry.status)
        style = "green" if entry.rank == 1 else style
        table.add_row(*(escape(column.text(entry)) for column in columns), style=style)
    return table


def _tables(columns: list[Column], entries: Sequence[Entry], console: Console) -> Iterator[Table]:
    """The columns in as few tables as the console's width allows."""
    keys, rest = columns[:_KEYS], columns[_KEYS:]
    page = list(keys)
    for column in rest:
        if len(page) > _KEYS and not _fits(_table([*page, column], entries), console):
            yield _table(page, entries)
            page = list(keys)
        page.append(column)
    yield _table(page, entries)


def _fits(table: Table, console: Console) -> bool:
    unbounded = console.options.update(max_width=10_000)
    return console.measure(table, options=unbounded).maximum <= console.width
