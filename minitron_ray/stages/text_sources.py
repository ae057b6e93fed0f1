"""What each source of the text gave, for the table `sources`."""

from __future__ import annotations

from typing import Any

from minitron_ray.data.packing import rows_of_each
from minitron_ray.data.source import Source
from minitron_ray.data.splits import Splits
from minitron_ray.data.tokens import TokenStore


def source_rows(source: Source, tokens: TokenStore, splits: Splits) -> list[dict[str, Any]]:
    """A row a source of the mixture, or the one of a text that is none."""
    sources, weights = source.sources, source.weights
    held_out = len(splits.calibration) + len(splits.validation)
    calibration = rows_of_each(weights, len(splits.calibration))
    behind = rows_of_each(weights, held_out)
    rows = []
    for number, (one, counts) in enumerate(zip(sources, tokens.parts, strict=True)):
        rows.append(
            {
                "part": number,
                "kind": type(one).model_fields["kind"].default,
                "title": one.title,
                "weight": weights[number],
                **counts,
                "calibration": calibration[number],
                "validation": behind[number] - calibration[number],
                "train": counts["sequences"] - behind[number],
            }
        )
    return rows
