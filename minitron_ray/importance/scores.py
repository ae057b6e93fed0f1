"""`Scores`: one score per axis, layer and unit; to and from the rows of the `importance` table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from minitron_ray.core.errors import ConfigError, MinitronError
from minitron_ray.results.schemas import TABLES

_INDICES = {
    "hidden": ("unit",),
    "heads": ("layer", "unit"),
    "kv_heads": ("layer", "unit"),
    "mlp": ("layer", "unit"),
    "experts": ("layer", "unit"),
    "expert_mlp": ("layer", "expert", "unit"),
}
"""Width axes in the order of the table, with the columns that tell one score from another."""

_ALWAYS = ("hidden", "heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """float64 arrays, the larger the more important; None for an axis that was not scored."""

    hidden: NDArray
    """(hidden,)"""
    heads: NDArray
    """(layers, heads)"""
    layers: NDArray
    """(layers,); all NaN where only blocks were scored."""
    mlp: NDArray | None = None
    """(layers, mlp)"""
    kv_heads: NDArray | None = None
    """(layers, kv_heads)"""
    experts: NDArray | None = None
    """(layers, experts)"""
    expert_mlp: NDArray | None = None
    """(layers, experts, expert_mlp)"""
    blocks: Mapping[int, NDArray] = field(default_factory=dict)
    """Length n of 2 or more to (layers - n + 1,): the score of removing layers i..i+n-1 at once."""

    def table(self, width_metric: str, depth_metric: str) -> pa.Table:
        """The columns of `importance`, without the store's envelope, one row a score."""
        parts = []
        for axis, indices in _INDICES.items():
            values: NDArray | None = getattr(self, axis)
            if values is not None:
                places: dict[str, NDArray] = dict(zip(indices, np.indices(values.shape), strict=True))
                parts.append(_part(axis, width_metric, values, **places))
        if not np.isnan(self.layers).all():
            parts.append(_blocks(1, depth_metric, self.layers))
        parts += [_blocks(length, depth_metric, values) for length, values in sorted(self.blocks.items())]
        return pa.concat_tables(parts)

    def rows(self, width_metric: str, depth_metric: str) -> Iterator[dict[str, Any]]:
        """The same as rows. For mixtures of experts, with millions of them, `table` is much lighter."""
        for batch in self.table(width_metric, depth_metric).to_batches(max_chunksize=65_536):
            yield from batch.to_pylist()

    @classmethod
    def from_table(
        cls, table: pa.Table, width_metric: str | None = None, depth_metric: str | None = None
    ) -> Self:
        """The inverse of `rows`. Rows may come in any order, and of several metrics.

        A metric of None takes the only one that an axis was scored with. Raises ConfigError where
        there is no such metric or, for None, more than one; MinitronError where rows are missing or
        doubled.
        """
        columns = _Columns.of(table)
        widths = {axis: columns.grid(axis, indices, width_metric) for axis, indices in _INDICES.items()}
        if width_metric is not None or any(values is None for values in map(widths.get, _ALWAYS)):
            columns.demand(_ALWAYS, width_metric)
        blocks = columns.blocks(depth_metric)
        columns.demand(("layers",), depth_metric)
        layers = blocks.pop(1, None)
        if layers is None:
            length, values = next(iter(blocks.items()))
            layers = np.full(len(values) + length - 1, np.nan)
        return cls(**widths, layers=layers, blocks=blocks)  # type: ignore[arg-type]


def _part(axis: str, metric: str, values: NDArray, **indices: NDArray) -> pa.Table:
    """The rows of one axis; an index that does not tell them apart is -1, a length 1."""
    schema = TABLES["importance"]
    count = values.size
    given = {name: pa.array(index.reshape(-1)) for name, index in indices.items()}
    rest = {
        "axis": pa.repeat(axis, count),
        "metric": pa.repeat(metric, count),
        "score": pa.array(values.reshape(-1), pa.float64()),
        "layer": pa.repeat(-1, count),
        "expert": pa.repeat(-1, count),
        "length": pa.repeat(1, count),
    }
    columns = rest | given
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _blocks(length: int, metric: str, values: NDArray) -> pa.Table:
    starts = np.arange(len(values))
    lengths = np.full(len(values), length)
    return _part("layers", metric, values, layer=starts, unit=starts, length=lengths)


@dataclass(frozen=True, slots=True)
class _Columns:
    """The table as numpy columns; texts as codes into lists, so that millions of rows take seconds."""

    axes: Sequence[str]
    metrics: Sequence[str]
    axis: NDArray
    metric: NDArray
    score: NDArray
    index: Mapping[str, NDArray]

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        axis, axes = _coded(table["axis"])
        metric, metrics = _coded(table["metric"])
        return cls(
            axes=axes,
            metrics=metrics,
            axis=axis,
            metric=metric,
            score=table["score"].to_numpy(),
            index={
                "layer": table["layer"].to_numpy(),
                "unit": table["unit"].to_numpy(),
                "expert": _or(table, "expert", -1),
                "length": _or(table, "length", 1),
            },
        )

    def grid(self, axis: str, indices: Sequence[str], metric: str | None) -> NDArray | None:
        """The scores of one axis by their indices; None where it has none."""
        chosen = self._chosen(axis, metric)
        return self._filled(axis, chosen, indices) if len(chosen) else None

    def blocks(self, metric: str | None) -> dict[int, NDArray]:
        """Length to the scores of the blocks of so many layers."""
        chosen = self._chosen("layers", metric)
        lengths = self.index["length"][chosen]
        return {
            int(length): self._filled("layers", chosen[lengths == length], ("layer",))
            for length in np.unique(lengths)
        }

    def demand(self, axes: Sequence[str], metric: str | None) -> None:
        """Raises ConfigError for an axis without a row of this metric (of any, for None)."""
        for axis in axes:
            if len(self._chosen(axis, metric)):
                continue
            named = "" if metric is None else f" by metric {metric!r}"
            known = self._metrics_of(axis)
            told = f"; it has {', '.join(known)}" if known else ""
            raise ConfigError(f"the importance table has no score of {axis}{named}{told}; score it again")

    def _chosen(self, axis: str, metric: str | None) -> NDArray:
        """Row numbers of an axis and a metric."""
        of_axis = self._rows_of(axis)
        if metric is None:
            known = self._metrics_of(axis)
            if len(known) > 1:
                raise ConfigError(
                    f"the importance table scores {axis} by {len(known)} metrics "
                    f"({', '.join(known)}); name the one to rank by"
                )
            return of_axis
        code = self.metrics.index(metric) if metric in self.metrics else -1
        return of_axis[self.metric[of_axis] == code]

    def _rows_of(self, axis: str) -> NDArray:
        code = self.axes.index(axis) if axis in self.axes else -1
        return np.flatnonzero(self.axis == code)

    def _metrics_of(self, axis: str) -> list[str]:
        return sorted(self.metrics[code] for code in np.unique(self.metric[self._rows_of(axis)]))

    def _filled(self, axis: str, chosen: NDArray, indices: Sequence[str]) -> NDArray:
        places = tuple(self.index[name][chosen] for name in indices)
        values = np.full(tuple(int(place.max()) + 1 for place in places), np.nan)
        if len(chosen) != values.size:
            raise MinitronError(
                f"the importance table has {len(chosen)} scores of {axis}, "
                f"{' x '.join(map(str, values.shape))} are needed; remove its folder and score again"
            )
        values[places] = self.score[chosen]
        return values


def _coded(column: pa.ChunkedArray) -> tuple[NDArray, list[str]]:
    """Every value as a number, and the list that it counts in."""
    encoded = pc.dictionary_encode(column).unify_dictionaries()
    texts = encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else []
    codes = [chunk.indices.to_numpy() for chunk in encoded.chunks]
    return np.concatenate(codes) if codes else np.zeros(0, int), texts


def _or(table: pa.Table, name: str, missing: int) -> NDArray:
    """A column that tables of older versions do not have."""
    if name not in table.column_names:
        return np.full(len(table), missing)
    return np.asarray(pc.fill_null(table[name], missing).to_numpy())
