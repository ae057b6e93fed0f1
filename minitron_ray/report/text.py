"""A `Ranking` and its sections for people: `render` to a terminal or pipe of any width, `markdown` for a
page. Where the columns do not all fit side by side they go on in a second table under the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.markup import escape

from minitron_ray.core.units import format_count, format_seconds
from minitron_ray.report import sections
from minitron_ray.report.findings import interval_text
from minitron_ray.report.ranking import Entry, Ranking
from minitron_ray.report.sections import Section
from minitron_ray.results.runs import REHEARSED

NONE = "-"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Column:
    """`text` of an entry under a header of one or two lines."""

    header: str
    text: Callable[[Entry], str]
    right: bool = True
    shown: Callable[[Ranking], bool] = lambda ranking: True
    """Whether a run of these stages has something to say under it that no other column says."""


def _has(*stages: str) -> Callable[[Ranking], bool]:
    return lambda ranking: any(stage in ranking.stages for stage in stages)


COLUMNS = (
    Column("#", lambda e: _or_none(e.rank, lambda rank: f"{rank}=" if e.tied else str(rank))),
    Column("shape", lambda e: _name(e), right=False),
    Column("status", lambda e: e.status, right=False),
    Column("params", lambda e: _or_none(e.parameters, format_count)),
    Column("cut\nloss", lambda e: _or_none(e.cut_loss, _loss), shown=_has("search", "distill")),
    Column("loss", lambda e: _or_none(e.loss, _loss), shown=lambda r: "distill" not in r.stages),
    Column(
        "search\nloss",
        lambda e: _or_none(e.search_loss, _loss),
        shown=lambda r: "search" in r.stages and "distill" in r.stages,
    ),
    Column("final\nloss", lambda e: _or_none(e.final_loss, _loss), shown=_has("distill")),
    Column(
        "behind the best\n[95 %]",
        lambda e: NONE if e.behind is None else interval_text(e.behind),
        shown=lambda r: any(e.behind is not None for e in r.entries),
    ),
    Column("per-\nplexity", lambda e: _or_none(e.perplexity, _perplexity)),
    Column("of\nteacher", lambda e: _or_none(e.recovery, lambda v: f"{100 * v:.1f}%")),
    Column(
        "off\nbudget",
        lambda e: _or_none(e.budget_distance, lambda v: f"{100 * v:+.1f}%"),
        shown=_has("search"),
    ),
    Column("tokens", lambda e: _or_none(e.tokens, format_count), shown=_has("search", "distill")),
    Column("time", lambda e: _or_none(e.seconds, format_seconds), shown=_has("search", "distill")),
    Column("candidate", lambda e: NONE if e.status == "teacher" else e.subject, right=False),
)
_KEYS = 2
"""Columns that every one of several tables begins with."""


def render(ranking: Ranking, console: Console) -> None:
    """Prints the ranking, what is still missing, and why trials failed."""
    console.print(
        f"[bold]{escape(ranking.experiment)}[/]  run {ranking.run_id}  {ranking.status}", style=None
    )
    if ranking.rehearsal:
        console.print(f"[bold red]{REHEARSED}[/]", soft_wrap=True)
    if ranking.budget:
        console.print(f"budget {ranking.budget}")
    for table in sections.tables(_table(ranking), console):
        console.print()
        console.print(table)
    console.print()
    for line in sentences(ranking):
        console.print(escape(line), soft_wrap=True, highlight=False)
    for section in ranking.sections:
        sections.show(section, console)


def columns_of(ranking: Ranking) -> list[Column]:
    """The columns that a run of these stages fills."""
    return [column for column in COLUMNS if column.shown(ranking)]


def markdown(ranking: Ranking) -> str:
    """The same as a Markdown page."""
    title = [f"## {ranking.experiment}, run {ranking.run_id} ({ranking.status})", ""]
    if ranking.rehearsal:
        title += [f"**This is {REHEARSED}.**", ""]
    budget = [f"Budget: {ranking.budget}", ""] if ranking.budget else []
    notes = [f"- {line}" for line in sentences(ranking)]
    page = "\n".join([*title, *budget, *sections.markdown_table(_table(ranking)), "", *notes]) + "\n"
    return page + "".join(sections.markdown(section) for section in ranking.sections)


def sentences(ranking: Ranking) -> Iterator[str]:
    """What a reader should take away, one fact a line."""
    best = next((entry for entry in ranking.entries if entry.rank == 1), None)
    if best and best.loss is not None and (best.final_loss is not None or "distill" not in ranking.stages):
        yield from _verdict(best)
        yield from _ties(best, ranking)
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


def _ties(best: Entry, ranking: Ranking) -> Iterator[str]:
    """Which students the validation sequences do not tell from the best, among those compared with one."""
    compared = [entry for entry in ranking.entries if entry.behind is not None]
    counts = {entry.behind["sequences"] for entry in compared if entry.behind is not None}
    if not counts:
        return
    after = f"on {max(counts)} validation sequences"
    same = [entry for entry in compared if entry.status == best.status]
    tied = [_name(entry) for entry in same if entry.tied]
    if tied:
        yield f"tied with the best {after}: {', '.join(tied)}"
    elif same:
        yield f"no other student ties with the best {after}"
    others = {
        status: [_name(entry) for entry in compared if entry.tied and entry.status == status]
        for status in ("completed", "stopped")
    }
    if best.status == "distilled" and (left := others["completed"]):
        yield f"tied with the search's best {after}, and not distilled: {', '.join(left)} (search.keep: ties)"
    if stopped := others["stopped"]:
        yield (
            f"tied with the search's best {after} where halving stopped them: {', '.join(stopped)} (search.keep: ties "
            "trains them to the end)"
        )
    yield (
        "behind the best: mean difference of losses with its 95 % interval (paired bootstrap), = where it "
        "holds zero; before distillation, at the last rung that both reached"
    )


def _name(entry: Entry) -> str:
    return entry.shape or entry.subject


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e6 else f"{value:.2e}"


def _or_none(value: _T | None, text: Callable[[_T], str]) -> str:
    return NONE if value is None else text(value)


def _table(ranking: Ranking) -> Section:
    columns = columns_of(ranking)
    return Section(
        title="",
        header=tuple(column.header for column in columns),
        rows=tuple(tuple(column.text(entry) for column in columns) for entry in ranking.entries),
        styles=tuple(_style(entry) for entry in ranking.entries),
        words=frozenset(at for at, column in enumerate(columns) if not column.right),
        keys=_KEYS,
    )


def _style(entry: Entry) -> str | None:
    style = {"teacher": "bold", "failed": "red", "stopped": "dim"}.get(entry.status)
    return "green" if entry.rank == 1 else style
