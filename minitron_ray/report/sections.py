"""What a report has beside its ranking: a titled table with sentences under it, at any width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """`rows` of text under `header`; a section may have only `notes`, one fact each."""

    title: str
    header: tuple[str, ...] = ()
    """Of one or two lines each; a first line that ends in a hyphen is one word with the second."""
    rows: tuple[tuple[str, ...], ...] = ()
    styles: tuple[str | None, ...] | None = None
    """Rich's name for the look of each row."""
    words: frozenset[int] = frozenset({0})
    """Columns of words, which stand to the left; figures stand to the right."""
    keys: int = 1
    """Columns that each of several tables begins with."""
    notes: tuple[str, ...] = ()


def show(section: Section, console: Console) -> None:
    """Prints title, table and notes."""
    console.print()
    console.print(f"[bold]{escape(section.title)}[/]", highlight=False)
    for page, table in enumerate(tables(section, console)):
        if page:
            console.print()
        console.print(table)
    for note in section.notes:
        console.print(escape(note), soft_wrap=True, highlight=False)


def tables(section: Section, console: Console) -> Iterator[Table]:
    """The rows in as few tables as the console's width allows: no figure is ever cut off."""
    if not section.rows:
        return
    page = list(range(section.keys))
    for column in range(section.keys, len(section.header)):
        if len(page) > section.keys and not _fits(_table(section, [*page, column]), console):
            yield _table(section, page)
            page = list(range(section.keys))
        page.append(column)
    yield _table(section, page)


def markdown_table(section: Section) -> list[str]:
    """The lines of the table as Markdown."""
    header = [text.replace("-\n", "").replace("\n", " ") for text in section.header]
    rule = ["---" if at in section.words else "---:" for at in range(len(header))]
    lines = [header, rule, *([cell.replace("|", r"\|") or " " for cell in row] for row in section.rows)]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def markdown(section: Section) -> str:
    """The section under a heading of the third level."""
    table = [*markdown_table(section), ""] if section.rows else []
    return (
        "\n".join(["", f"### {section.title}", "", *table, *(f"- {note}" for note in section.notes)]) + "\n"
    )


def _table(section: Section, columns: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        side: Literal["left", "right"] = "left" if column in section.words else "right"
        name = section.header[column]
        table.add_column(name, justify=side, vertical="bottom", no_wrap=True, overflow="fold")
    styles = section.styles or (None,) * len(section.rows)
    for row, style in zip(section.rows, styles, strict=True):
        table.add_row(*(escape(row[column]) for column in columns), style=style)
    return table


def _fits(table: Table, console: Console) -> bool:
    unbounded = console.options.update(max_width=10_000)
    return console.measure(table, options=unbounded).maximum <= console.width
