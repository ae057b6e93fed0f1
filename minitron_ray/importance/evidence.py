"""`Evidence`: what the listening metrics gathered at every tap of a teacher, and how it is heard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minitron_ray.core.errors import MinitronError
from minitron_ray.importance.metric import (
    ListeningLayerMetric,
    ListeningUnitMetric,
    StreamEvidence,
    UnitEvidence,
)
from minitron_ray.importance.routed import RoutedEvidence
from minitron_ray.importance.units import UnitScores, of_groups
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.family import Family, Tap

Add = Callable[[Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """What is to be heard, of which network; None for a metric that does not listen."""

    family: Family
    architecture: Architecture
    width: ListeningUnitMetric | None
    depth: ListeningLayerMetric | None

    def fresh(self) -> Evidence:
        """Evidence of nothing yet."""
        layers = self.architecture.layers
        width, depth = self.width, self.depth
        return Evidence(
            layers=[] if width is None else [self._layer(width) for _ in range(layers)],
            final=width.evidence() if width is not None and width.final_norm else None,
            stream=depth.evidence(layers) if depth is not None else None,
        )

    def _layer(self, width: ListeningUnitMetric) -> LayerSites:
        taps = self.family.taps
        neurons = [width.evidence() for _ in range(self.architecture.experts)]
        return LayerSites(
            hidden=[width.evidence() for _ in taps["hidden"]],
            heads=width.evidence(),
            mlp=width.evidence() if "mlp" in taps else None,
            routed=RoutedEvidence(neurons) if "experts" in taps else None,
        )

    @contextmanager
    def at(self, sites: LayerSites, block: nn.Module, layer: int, samples: int) -> Iterator[None]:
        """Hooks at the taps inside `block`, the decoder layer `layer`, until the context ends; batches have
        `samples` sequences each."""
        taps = self.family.taps
        with ExitStack() as stack:

            def module(tap: Tap) -> nn.Module:
                return block.get_submodule(
                    tap.at(layer).removeprefix(f"{self.family.decoder_layers}.{layer}.")
                )

            def listen(tap: Tap, add: Add) -> None:
                if tap.side == "input":
                    stack.callback(module(tap).register_forward_pre_hook(_input_to(add)).remove)
                else:
                    stack.callback(module(tap).register_forward_hook(_output_to(add)).remove)

            for tap, evidence in zip(taps["hidden"], sites.hidden, strict=True):
                listen(tap, evidence.add)
            for tap in taps["heads"]:
                listen(tap, self._heads(sites.heads))
            for tap in taps.get("mlp", ()):
                assert sites.mlp is not None
                listen(tap, sites.mlp.add)
            for tap in taps.get("experts", ()):
                assert sites.routed is not None
                hook = _call_to(sites.routed, samples)
                stack.callback(module(tap).register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _heads(self, evidence: UnitEvidence) -> Add:
        assert self.width is not None
        if self.width.heads == "channels":
            return evidence.add
        sizes = (self.architecture.heads, self.architecture.head_dim)

        def add(joined: Tensor) -> None:
            each = joined.unflatten(-1, sizes).float()
            evidence.add(torch.linalg.vecdot(each, each).sqrt_())

        return add

    def unit_scores(self, evidence: Evidence) -> dict[str, UnitScores]:
        """Under each of the width metric's labels, what the evidence says."""
        assert self.width is not None
        return {label: self._scores(evidence, label) for label in self.width.labels}

    def _scores(self, evidence: Evidence, label: str) -> UnitScores:
        layers, arch = evidence.layers, self.architecture
        sites = [site for layer in layers for site in layer.hidden]
        sites += [evidence.final] if evidence.final is not None else []
        heads = np.stack([layer.heads.scores()[label] for layer in layers])
        if self.width is not None and self.width.heads == "channels":
            heads = np.linalg.norm(heads.reshape(len(layers), arch.heads, arch.head_dim), axis=-1)
        neurons = [layer.mlp.scores()[label] for layer in layers if layer.mlp is not None]
        routed = [layer.routed for layer in layers if layer.routed is not None]
        return UnitScores(
            hidden=np.sum([site.scores()[label] for site in sites], axis=0),
            heads=heads,
            kv_heads=of_groups(heads, arch),
            mlp=np.stack(neurons) if neurons else None,
            experts=np.stack([experts.scores() for experts in routed]) if routed else None,
            expert_mlp=np.stack([experts.neuron_scores(label, arch.expert_mlp) for experts in routed])
            if routed
            else None,
        )


@dataclass(kw_only=True)
class LayerSites:
    """The evidence gathered inside one decoder layer."""

    hidden: Sequence[UnitEvidence]
    heads: UnitEvidence
    mlp: UnitEvidence | None
    routed: RoutedEvidence | None

    def named(self) -> list[tuple[str, Any]]:
        """Every gatherer with the axis it stands for, in the order of the forward pass."""
        found: list[tuple[str, Any]] = [("hidden", self.hidden[0]), ("heads", self.heads)]
        found += [("hidden", site) for site in self.hidden[1:]]
        found += [("mlp", self.mlp)] if self.mlp is not None else []
        return found + ([("experts", self.routed)] if self.routed is not None else [])


@dataclass(kw_only=True)
class Evidence:
    """What a group of calibration sequences says, at every site. Small, and picklable at rest."""

    layers: list[LayerSites]
    final: UnitEvidence | None
    stream: StreamEvidence | None

    def merge(self, later: Evidence) -> None:
        """Take in what other sequences say. Groups merged in one order give one result, to the bit."""
        for mine, theirs in zip(self._gatherers(), later._gatherers(), strict=True):
            mine.merge(theirs)

    def rest(self) -> None:
        """Leave the accelerator."""
        for gatherer in self._gatherers():
            gatherer.rest()

    def _gatherers(self) -> list[Any]:
        found = [gatherer for layer in self.layers for _, gatherer in layer.named()]
        return found + [gatherer for gatherer in (self.final, self.stream) if gatherer is not None]

    def check(self, layer: int, block: nn.Module) -> None:
        """Raises MinitronError, naming layer, axis and cause, where the activations heard in `block`, the
        decoder layer `layer`, hold NaN or infinity."""
        for axis, gatherer in self.layers[layer].named():
            found = gatherer.scores()
            values: list[NDArray] = [found] if isinstance(found, np.ndarray) else list(found.values())
            if not all(np.isfinite(each).all() for each in values):
                raise MinitronError(f"activations of layer {layer} ({axis}) are not finite: {_cause(block)}")


def _cause(block: nn.Module) -> str:
    for name, weight in block.named_parameters():
        if not torch.isfinite(weight).all():
            return f"its weights {name} hold NaN or infinity; the checkpoint is damaged, fetch it again"
    dtype = str(next(block.parameters()).dtype).removeprefix("torch.")
    if dtype == "float32":
        return "float32 overflows there, or a weight before it is NaN; check the teacher's weights"
    return f"{dtype} overflows there; set `precision: float32`"


def _input_to(add: Add) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        add(args[0])

    return hook


def _output_to(add: Add) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        add(output)

    return hook


def _call_to(routed: RoutedEvidence, samples: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        called = dict(zip(names, args, strict=False)) | kwargs
        hidden, chosen, weights = (called[name] for name in names)
        routed.add(module, hidden, chosen, weights, samples)

    return hook
