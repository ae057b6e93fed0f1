"""One pass of the teacher over the calibration sequences, listening at the family's taps.

The LM head is not computed, and no activation outlives its layer. Hooks are removed before the
function returns, also when it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minitron_ray.core.errors import MinitronError
from minitron_ray.importance.metric import LayerMetric, UnitEvidence, UnitMetric
from minitron_ray.importance.scores import Scores
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.family import Family, Tap
from minitron_ray.weights.headless import Headless, final_hidden


def measure_importance(
    teacher: Headless,
    family: Family,
    architecture: Architecture,
    batches: Iterator[np.ndarray],
    width: UnitMetric,
    depth: LayerMetric,
    progress: Callable[[int], None] = lambda sequences: None,
) -> Scores:
    """Score every hidden channel, head, MLP neuron and layer of `teacher`.

    `batches` yields int64 (samples, tokens). A head's activation is the norm of its output before
    o_proj; a hidden channel's scores are summed over the norms of all layers (paper §2.2).
    Raises MinitronError naming the layer where an activation is not finite.
    """
    sites = _Sites(family, architecture, width, depth)
    device = teacher.head.device
    done = 0
    with sites.listening(teacher.model), torch.no_grad():
        for batch in batches:
            teacher(torch.from_numpy(batch).to(device), final_hidden)
            done += len(batch)
            progress(done)
    return sites.scores()


class _Sites:
    """The evidence gathered at each tap."""

    def __init__(
        self, family: Family, architecture: Architecture, width: UnitMetric, depth: LayerMetric
    ) -> None:
        self._family, self._architecture = family, architecture
        layers = range(architecture.layers)
        self._mlp = [width.evidence() for _ in layers]
        self._heads = [width.evidence() for _ in layers]
        self._hidden = [[width.evidence() for _ in family.taps["hidden"]] for _ in layers]
        self._layers = [depth.evidence() for _ in layers]

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Hooks at every tap of `model` until the block ends."""
        taps = self._family.taps
        with ExitStack() as stack:

            def listen(tap: Tap, layer: int, add: Callable[[Tensor], None]) -> None:
                module = model.get_submodule(tap.at(layer))
                if tap.side == "input":
                    stack.callback(module.register_forward_pre_hook(_input_to(add)).remove)
                else:
                    stack.callback(module.register_forward_hook(_output_to(add)).remove)

            for layer in range(self._architecture.layers):
                for tap in taps["mlp"]:
                    listen(tap, layer, self._mlp[layer].add)
                for tap in taps["heads"]:
                    listen(tap, layer, self._add_heads(self._heads[layer]))
                for tap, evidence in zip(taps["hidden"], self._hidden[layer], strict=True):
                    listen(tap, layer, evidence.add)
                block = model.get_submodule(f"{self._family.decoder_layers}.{layer}")
                stack.callback(block.register_forward_hook(self._block(layer), with_kwargs=True).remove)
            yield

    def _add_heads(self, evidence: UnitEvidence) -> Callable[[Tensor], None]:
        heads, head_dim = self._architecture.heads, self._architecture.head_dim

        def add(joined: Tensor) -> None:
            evidence.add(torch.linalg.vector_norm(joined.float().unflatten(-1, (heads, head_dim)), dim=-1))

        return add

    def _block(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            self._layers[layer].add(before, after)

        return hook

    def scores(self) -> Scores:
        scores = Scores(
            hidden=np.sum([site.scores() for sites in self._hidden for site in sites], axis=0),
            heads=np.stack([evidence.scores() for evidence in self._heads]),
            mlp=np.stack([evidence.scores() for evidence in self._mlp]),
            layers=np.asarray([evidence.score() for evidence in self._layers]),
        )
        for layer in range(self._architecture.layers):
            values = (scores.mlp[layer], scores.heads[layer], scores.layers[layer])
            if not all(np.isfinite(value).all() for value in values):
                raise MinitronError(
                    f"activations of layer {layer} are not finite; the weights hold NaN or infinity, or the "
                    "precision overflows: set `precision: float32`"
                )
        return scores


def _input_to(add: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        add(args[0])

    return hook


def _output_to(add: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        add(output)

    return hook
