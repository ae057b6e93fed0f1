"""What scoring the teacher takes: passes that listen, rounds of them, and passes without some layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minitron_ray.experiment import Experiment
from minitron_ray.importance.metric import ListeningLayerMetric, ListeningUnitMetric, RemovalMetric
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.cost import body_flops, head_flops
from minitron_ray.models.family import Family
from minitron_ray.search.rounds import round_shapes
from minitron_ray.search.shape import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """Some passes over `tokens` tokens, and the operations of one token in all of them."""

    what: str
    tokens: int
    flops_a_token: int
    outputs: int = 1
    """Networks that run side by side."""

    @property
    def flops(self) -> float:
        return float(self.tokens * self.flops_a_token)


@dataclass(frozen=True, slots=True, kw_only=True)
class Removals:
    """How much of a network is computed to have it without each of many sets of layers, see
    `importance/removal.py`."""

    layers: int
    """Layers applied, those that sets have in common once."""
    outputs: int
    """Final hidden states that go through the LM head: of the whole network and of each set."""


def scoring_passes(
    experiment: Experiment, family: Family, model: Architecture, students: Sequence[Candidate]
) -> Iterator[Passes]:
    """The passes of stage `importance` over the calibration sequences, none of them with a backward pass.

    A depth metric with examples of its own, a downstream task, has as many tokens as the calibration
    sequences here: how many it really has is not known before they are read.
    """
    section, data = experiment.importance, experiment.data
    calibration = data.calibration * data.sequence_length
    listens = isinstance(section.width, ListeningUnitMetric)
    if listens or isinstance(section.depth, ListeningLayerMetric):
        flops = body_flops(family, model, data.sequence_length)
        yield Passes(
            what=f"{data.calibration} calibration sequences, forward", tokens=calibration, flops_a_token=flops
        )
    if section.iterations > 1 and listens:
        shapes = round_shapes(family, model, students, section.iterations)
        flops = sum(body_flops(family, shape.architecture(model), data.sequence_length) for shape in shapes)
        rounds = f"{len(shapes)} more round{'s' if len(shapes) > 1 else ''}"
        yield Passes(what=rounds, tokens=calibration, flops_a_token=flops)
    if isinstance(section.depth, RemovalMetric):
        fewest = min(student.layers for student in students)
        found = depth_removals(section.depth, model.layers, fewest)
        layer = body_flops(family, model, data.sequence_length) // model.layers
        own = type(section.depth).examples is not RemovalMetric.examples
        as_many = " (questions of its own, counted as so many)" if own else ""
        yield Passes(
            what=f"{found.outputs:,} passes without layers{as_many}",
            tokens=calibration,
            flops_a_token=found.layers * layer + found.outputs * head_flops(model),
            outputs=model.layers + 1 if section.depth.iterative else found.outputs,
        )


def depth_removals(metric: RemovalMetric, layers: int, fewest: int) -> Removals:
    """All that a removal metric computes to rank `layers` layers.

    Of an iterative metric, which stops where `fewest` layers would be left, it is the most: which layers
    go first is not known, and sets share the least where it is the first ones.
    """
    if not metric.iterative:
        lengths = (1, *metric.blocks)
        return removals([tuple(range(i, i + n)) for n in lengths for i in range(layers - n + 1)], layers)
    applied = outputs = 0
    for gone in range(min(max(layers - fewest, 1), layers - 1)):
        found = removals([(*range(gone), layer) for layer in range(gone, layers)], layers)
        applied, outputs = applied + found.layers, outputs + found.outputs
    return Removals(layers=applied, outputs=outputs)


def removals(sets: Sequence[tuple[int, ...]], layers: int) -> Removals:
    """What the whole network and `sets` of removed layers take, all of them side by side."""
    removed = [frozenset(one) for one in {(), *sets}]
    prefixes: list[tuple[int, ...]] = [()] * len(removed)
    applied = 0
    for layer in range(layers):
        applied += len({p for p, one in zip(prefixes, removed, strict=True) if layer not in one})
        prefixes = [(*p, layer) if layer in one else p for p, one in zip(prefixes, removed, strict=True)]
    return Removals(layers=applied, outputs=len(removed))
