"""What a run's text is made of: a section of the report, and a line of the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from minitron_ray.core.units import format_count
from minitron_ray.data.packing import rows_of_each
from minitron_ray.data.source import MixedSource
from minitron_ray.experiment import Experiment
from minitron_ray.plan.tokens import sequences_needed
from minitron_ray.report.sections import Section
from minitron_ray.results.store import Store

_HEADER: Final = ("source", "kind", "share\nasked", "share", "documents", "tokens", "valida-\ntion", "train")


def read_sources(store: Store) -> tuple[dict[str, Any], ...]:
    """Rows of the table `sources`, without experiment and run; none for a run from before there was one."""
    names = [name for name in store.read("sources").column_names if name not in ("experiment", "run_id")]
    return tuple(sorted(store.read("sources").select(names).to_pylist(), key=lambda row: row["part"]))


def sources_section(rows: Sequence[dict[str, Any]]) -> tuple[Section, ...]:
    """One section where the text is a mixture, else none. Validation and train are in sequences."""
    if len(rows) < 2:
        return ()
    total = sum(row["tokens"] for row in rows)
    cells = tuple(
        (
            row["title"],
            row["kind"],
            f"{row['weight']:.1%}",
            f"{row['tokens'] / total:.1%}" if total else "-",
            f"{row['documents']:,}",
            format_count(row["tokens"]),
            f"{row['validation']:,}",
            f"{row['train']:,}",
        )
        for row in rows
    )
    notes = tuple(
        f"the text ends where {row['title']} had no more: nothing is read twice"
        for row in rows
        if row["ended"]
    )
    return (Section(title="text", header=_HEADER, rows=cells, words=frozenset({0, 1}), notes=notes),)


def planned_sources(experiment: Experiment) -> list[dict[str, Any]]:
    """Of a mixture: what each source gives of the tokens that are held out and those that the longest
    training sees, none of them twice."""
    data, source = experiment.data, experiment.data.source
    if not isinstance(source, MixedSource):
        return []
    sequences = sequences_needed(experiment)
    return [
        {
            "kind": type(one).model_fields["kind"].default,
            "title": one.title,
            "weight": weight,
            "tokens": rows * data.sequence_length,
        }
        for one, weight, rows in zip(
            source.sources, source.weights, rows_of_each(source.weights, sequences), strict=True
        )
    ]


def planned_text(experiment: Experiment) -> str | None:
    """The same in a line; None where the text is no mixture."""
    parts = planned_sources(experiment)
    if not parts:
        return None
    return " + ".join(
        f"{part['weight']:.0%} {part['title']} ({format_count(part['tokens'])} tokens)" for part in parts
    )
