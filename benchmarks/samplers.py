"""How fast samplers find good shapes, on landscapes of which every value is known.

No model is trained: on the shapes of a real search space, each landscape gives a shape a distilled
loss, smooth over the logarithms of its sizes with some roughness, and a loss of the undistilled cut,
whose rank correlation with the distilled one (Kendall's tau) is set. Every trial is trained to the end
and tells its distilled loss. What is printed is the regret after N trials: how much worse the best
shape tried is than the best there is, in standard deviations of the distilled loss over the feasible
shapes, mean over landscapes with its standard error.

    python benchmarks/samplers.py
    python benchmarks/samplers.py --landscapes 200 --trials 32 --cohort 8
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from minitron_ray.core.units import Choices
from minitron_ray.experiment import Space
from minitron_ray.models.budget import Band, Limits
from minitron_ray.models.families import family_of
from minitron_ray.search.proposals import ShapeProposals
from minitron_ray.search.propose import Told, propose
from minitron_ray.search.sampler import SearchSampler
from minitron_ray.search.samplers.random import Random
from minitron_ray.search.samplers.tpe import TPE
from minitron_ray.search.space import Candidate, enumerate_candidates

TEACHER: Final = Path(__file__).parents[1] / "experiments" / "models" / "smollm2-135m.json"
SPACE: Final = {"layers": "18..30", "hidden": "432..576 by 36", "heads": [6, 9], "mlp": "512..1536 by 64"}
BUDGET: Final = 90_000_000
CORRELATIONS: Final = (0.0, 0.4, 0.7)
"""Kendall's tau between undistilled and distilled losses."""
ROUGHNESS: Final = 0.3
"""Standard deviation of what no smooth function of the sizes explains, beside 1 of what one does."""


def main() -> None:
    options = _options()
    proposals, features = _shapes()
    print(f"{len(proposals.feasible)} feasible shapes, {options.landscapes} landscapes")
    for tau in CORRELATIONS:
        landscapes = [Landscape.draw(proposals, features, tau, seed) for seed in range(options.landscapes)]
        reached = np.mean([landscape.tau() for landscape in landscapes])
        print(f"\nKendall's tau of undistilled and distilled losses: {reached:.2f}")
        print(f"{'':<24}" + "".join(f"{n:>4} trials   " for n in options.after))
        for name, (sampler, seeded) in STRATEGIES.items():
            regrets = np.array(
                [
                    regret(landscape, proposals, sampler, seeded, seed, options)
                    for seed, landscape in enumerate(landscapes)
                ]
            )
            print(f"{name:<24}" + _text(regrets))


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """Losses of every feasible shape, standardised, by candidate id."""

    distilled: Mapping[str, float]
    zero_shot: Mapping[str, float]

    @classmethod
    def draw(cls, proposals: ShapeProposals, features: NDArray, tau: float, seed: int) -> Landscape:
        """`features` (shapes, axes) are standardised."""
        rng = np.random.default_rng(seed)
        true = _standardised(_smooth(features, rng) + ROUGHNESS * rng.standard_normal(len(features)))
        other = _standardised(_smooth(features, rng) + ROUGHNESS * rng.standard_normal(len(features)))
        other = _standardised(other - true * np.mean(other * true))
        correlation = np.sin(np.pi / 2 * tau)  # what gives normal variables this tau
        cut = correlation * true + np.sqrt(1 - correlation**2) * other
        return cls(
            distilled=dict(zip(proposals.feasible, true.tolist(), strict=True)),
            zero_shot=dict(zip(proposals.feasible, cut.tolist(), strict=True)),
        )

    def tau(self) -> float:
        cut, true = (np.array(list(losses.values())) for losses in (self.zero_shot, self.distilled))
        above = np.triu_indices(len(cut), 1)
        return float(np.mean(np.sign(np.subtract.outer(cut, cut) * np.subtract.outer(true, true))[above]))


def regret(
    landscape: Landscape,
    proposals: ShapeProposals,
    sampler: SearchSampler,
    seeded: bool,
    seed: int,
    options: argparse.Namespace,
) -> list[float]:
    """After each of `options.after` trials."""
    told: list[Told] = []
    scored = landscape.zero_shot if seeded else {}
    while len(told) < options.trials:
        cohort = len(told) // options.cohort
        for candidate_id in propose(proposals, sampler, seed, cohort, told, scored, options.cohort):
            loss = landscape.distilled[candidate_id]
            told.append(Told(candidate_id=candidate_id, rungs=((1, loss),), completed=True, values=(loss,)))
    best, losses = min(landscape.distilled.values()), [trial.values[0] for trial in told]
    return [min(losses[:count]) - best for count in options.after]


STRATEGIES: dict[str, tuple[SearchSampler, bool]] = {
    "random": (Random(), False),
    "tpe": (TPE(), False),
    "tpe, zero-shot": (TPE(), True),
}


def _smooth(features: NDArray, rng: np.random.Generator) -> NDArray:
    """A bowl with its optimum at some shape, differently steep along each axis, slightly turned."""
    optimum = features[rng.integers(len(features))]
    turned = np.eye(features.shape[1]) + 0.3 * rng.standard_normal((features.shape[1],) * 2)
    distances = (features - optimum) @ turned * rng.lognormal(0.0, 0.5, features.shape[1])
    return _standardised(np.sqrt(1 + np.square(distances).sum(axis=1)))


def _standardised(values: NDArray) -> NDArray:
    return (values - values.mean(axis=0)) / values.std(axis=0)


def _shapes() -> tuple[ShapeProposals, NDArray]:
    config = json.loads(TEACHER.read_text())
    family = family_of(config)
    teacher = family.read(config)
    space = Space(**{axis: Choices.parse(sizes) for axis, sizes in SPACE.items()})
    limits = Limits.on(Band.of(BUDGET, 0.02))
    rows = enumerate_candidates(family, teacher, space, limits)
    sizes = np.array([_sizes(row.candidate) for row in rows if row.in_budget], dtype=float)
    return ShapeProposals.of(rows, space, teacher.hidden), _standardised(np.log(sizes))


def _sizes(shape: Candidate) -> tuple[int, ...]:
    return shape.layers, shape.hidden, shape.heads, shape.mlp


def _text(regrets: NDArray) -> str:
    error = regrets.std(axis=0, ddof=1) / np.sqrt(len(regrets))
    return "".join(f"  {mean:.2f} ± {e:.2f}" for mean, e in zip(regrets.mean(axis=0), error, strict=True))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--landscapes", type=int, default=40)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--cohort", type=int, default=6)
    options = parser.parse_args()
    options.after = range(options.cohort, options.trials + 1, options.cohort)
    return options


if __name__ == "__main__":
    main()
