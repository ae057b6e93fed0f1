"""Processor seconds to enumerate, count and judge a search space, against building and counting shape by shape.

    python benchmarks/enumeration.py --repeats 9

The space is of the paper's teacher (Nemotron-4 15B) with steps small enough for tens of thousands of
shapes; budgets bound parameters, memory and operations, and the serving filter is on. The baseline does
the same with `Candidate`, `Refusals.of`, `Family.parameters`, `serving_bytes`, `forward_flops` and
`Serving.problem`, one shape at a time, and must find the same rows. Runs alternate; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from minitron_ray.experiment import Budget, Space
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.budget import Limits
from minitron_ray.models.cost import forward_flops, serving_bytes
from minitron_ray.models.families import family_of
from minitron_ray.models.family import Family
from minitron_ray.search.serving import SERVED_AXES, Serving
from minitron_ray.search.shape import Candidate, Refusals
from minitron_ray.search.space import CandidateRow, enumerate_candidates

TEACHER = Path(__file__).resolve().parent.parent / "experiments" / "models" / "nemotron-4-15b.json"
SPACE = {
    "layers": "17..32",
    "hidden": "2048..6144 by 256",
    "heads": "16..48 by 8",
    "mlp": "4096..24576 by 512",
}
BUDGET = {
    "parameters": "7.8B..8.5B",
    "memory": "<= 22GiB",
    "flops": "<= 17B",
    "at": {"batch": 8, "length": 4096},
}
SERVING = Serving(tensor_parallel=2, kernels=("int4", "fp8"), gguf="k_quants")


def main() -> None:
    options = _options()
    config = json.loads(TEACHER.read_text())
    family = family_of(config)
    teacher = family.read(config)
    space, limits = Space.model_validate(SPACE), Budget.model_validate(BUDGET).limits(4096)
    many: list[float] = []
    single: list[float] = []
    for repeat in range(options.repeats):
        start = time.process_time()
        rows = enumerate_candidates(family, teacher, space, limits, serving=SERVING)
        many.append(time.process_time() - start)
        if repeat < options.baseline_repeats:
            start = time.process_time()
            one_by_one = _one_by_one(family, teacher, [row.candidate for row in rows], limits)
            single.append(time.process_time() - start)
            assert one_by_one == rows, "the two ways differ"
    feasible = sum(row.in_budget for row in rows)
    print(f"{len(rows):,} shapes, {feasible:,} of them inside")
    print(f"at once      {statistics.median(many):.3f} s (median of {len(many)})")
    print(f"one by one   {statistics.median(single):.3f} s (median of {len(single)})")
    print(f"ratio        {statistics.median(single) / statistics.median(many):.1f}")


def _one_by_one(
    family: Family, teacher: Architecture, shapes: list[Candidate], limits: Limits
) -> list[CandidateRow]:
    refusals, load = Refusals(family, teacher), limits.load
    rows = []
    for shape in shapes:
        arch = shape.architecture(teacher)
        figures = {
            "parameters": family.parameters(arch),
            "non_embedding_parameters": family.non_embedding_parameters(arch),
            "memory_bytes": serving_bytes(family, arch, load.dtype, batch=load.batch, length=load.length),
            "flops_per_token": forward_flops(family, arch, load.length),
        }
        reason = refusals.of(shape, arch)
        for axis in SERVED_AXES:
            reason = reason or SERVING.problem(axis, getattr(shape, axis), teacher.head_dim)
        if reason is None:
            out = [(band, band.distance(figures[band.measure])) for band in limits.bands]
            reason = "; ".join(band.outside(distance) for band, distance in out if distance) or None
        rows.append(CandidateRow(candidate=shape, **figures, in_budget=reason is None, reason=reason))
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--baseline-repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
