"""A `Comparison` for people (`render`, `markdown`) and for programs (`csv_text`)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Final, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minitron_ray.core.units import format_count
from minitron_ray.report.ablation import Comparison, Row, perplexity

NONE: Final = "-"


@dataclass(frozen=True, slots=True)
class Column:
    """`text` of a row under a header of one or two lines."""

    header: str
    text: Callable[[Row], str]
    right: bool = True


_VARIANT = Column("variant", lambda row: row.variant, right=False)
_MEASURED: Final = (
    Column("status", lambda row: row.status, right=False),
    Column("params", lambda row: NONE if row.parameters is None else format_count(row.parameters)),
    Column("cut\nloss", lambda row: _number(row.cut_loss, 4)),
    Column("cut per-\nplexity", lambda row: _number(row.cut_perplexity, 2)),
    Column("final\nloss", lambda row: _number(row.distilled_loss, 4)),
    Column("final per-\nplexity", lambda row: _number(row.distilled_perplexity, 2)),
)
_COMPARED: Final = (
    Column("KL to\nteacher", lambda row: _number(_divergence(row), 4)),
    Column("above the best\n± std. error", lambda row: _difference(row)),
    Column("rank", lambda row: _number(row.rank, 0)),
    Column("paper", lambda row: NONE if row.paper is None else f"{row.paper:g}"),
    Column("paper's\nrank", lambda row: _number(row.paper_rank, 0)),
)


def render(comparison: Comparison, console: Console) -> None:
    """Prints the question, the figures, how they compare, and what a reader should take away."""
    console.print(f"[bold]{escape(comparison.ablation)}[/]  {escape(comparison.question)}", soft_wrap=True)
    for columns in ((_VARIANT, *_MEASURED), (_VARIANT, *_COMPARED)):
        console.print()
        console.print(_table(columns, comparison))
    console.print()
    for line in sentences(comparison):
        console.print(escape(line), soft_wrap=True, highlight=False)


def markdown(comparison: Comparison) -> str:
    """The same as a Markdown page."""
    columns = (_VARIANT, *_MEASURED, *_COMPARED)
    header = [column.header.replace("-\n", "").replace("\n", " ") for column in columns]
    rule = ["---:" if column.right else "---" for column in columns]
    rows = [[column.text(row).replace("|", r"\|") for column in columns] for row in comparison.rows]
    table = ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]
    notes = [f"- {line}" for line in sentences(comparison)]
    return "\n".join([f"## {comparison.ablation}", "", comparison.question, "", *table, "", *notes]) + "\n"


def csv_text(comparison: Comparison) -> str:
    """One line a variant, in the fields of `Row`, figures to six decimals; what is not known is empty."""
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(Row.__dataclass_fields__)
    for row in comparison.rows:
        rows.writerow(_cell(value) for value in asdict(row).values())
    return stream.getvalue()


def sentences(comparison: Comparison) -> Iterator[str]:
    """What a reader should take away, one fact a line."""
    best = next((row for row in comparison.rows if row.variant == comparison.best), None)
    when = "as cut" if comparison.measure == "cut" else "after distillation"
    if best is not None:
        loss = best.cut_loss if comparison.measure == "cut" else best.distilled_loss
        line = f"best {when}: {best.variant}, loss {_number(loss, 4)} on {comparison.sequences} sequences"
        if best.teacher_loss is not None:
            teacher = _number(perplexity(best.teacher_loss), 2)
            line += f"; the teacher's is {best.teacher_loss:.4f} (perplexity {teacher})"
        yield line
        yield from _close(comparison)
    if comparison.source is not None:
        yield f"paper: {comparison.source}; in {comparison.unit}"
        agreement = "has no value" if comparison.tau is None else f"is {comparison.tau:+.2f}"
        yield f"Kendall's tau between the two orders {agreement}, over {comparison.tau_variants} variants"
    for row in comparison.rows:
        if row.status not in ("succeeded", "not run"):
            reason = " ".join((row.reason or "run it again to go on").split())
            yield f"{row.status}: {row.variant}: {reason}"
    waiting = [row.variant for row in comparison.rows if row.status == "not run"]
    if waiting:
        yield f"not run: {', '.join(waiting)}"


def _close(comparison: Comparison) -> Iterator[str]:
    """The variants that the sequences at hand do not tell from the best."""
    near = [
        row.variant
        for row in comparison.rows
        if row.difference is not None
        and row.difference_stderr is not None
        and row.difference < 2 * row.difference_stderr
    ]
    if near:
        yield f"within two standard errors of the best: {', '.join(near)}"


def _divergence(row: Row) -> float | None:
    """After distillation where there was one."""
    return row.distilled_divergence if row.distilled_divergence is not None else row.cut_divergence


def _difference(row: Row) -> str:
    if row.difference is None:
        return NONE
    if row.difference_stderr is None:
        return f"{row.difference:.4f}"
    return f"{row.difference:.4f} ± {row.difference_stderr:.4f}"


def _number(value: float | None, decimals: int) -> str:
    if value is None:
        return NONE
    return f"{value:.{decimals}f}" if abs(value) < 1e6 else f"{value:.2e}"


def _cell(value: object) -> object:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else ""
    return "" if value is None else value


def _table(columns: Sequence[Column], comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        side: Literal["left", "right"] = "right" if column.right else "left"
        table.add_column(column.header, justify=side, vertical="bottom", no_wrap=True, overflow="fold")
    for row in comparison.rows:
        style = "green" if row.variant == comparison.best else None
        style = "red" if row.status == "failed" else style
        table.add_row(*(escape(column.text(row)) for column in columns), style=style)
    return table
