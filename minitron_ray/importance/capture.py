"""Teacher over the calibration sequences, with the listening metrics at their taps; no LM head.

The sequences are split into a fixed number of groups, each gathered on its own, so that however many
processes share the groups, merging in order gives the same bits. `gather` runs a whole model and lets
go of every activation behind its layer; `gather_streamed` has one layer's weights in memory and the
hidden states of all sequences between two layers. Both give the same scores. Hooks are removed before
a function returns, also when it raises.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minitron_ray.importance.activations import Activations
from minitron_ray.importance.evidence import Evidence, Listeners
from minitron_ray.importance.metric import StreamEvidence
from minitron_ray.weights.headless import Headless, final_hidden
from minitron_ray.weights.layerwise import Layerwise, State

GROUPS: Final = 16
"""Of calibration sequences: the finest that the work can be shared out."""

Group = tuple[NDArray, ...]
"""Micro-batches: indices of sequences, int64 (samples,)."""
Read = Callable[[NDArray], NDArray]
"""Indices of sequences to their tokens, int64 (samples, tokens)."""
Progress = Callable[[int], None]
"""Told how many sequences are done."""


def grouped(indices: Sequence[int], micro_batch: int) -> list[Group]:
    """The calibration sequences in whole micro-batches, those in at most `GROUPS` groups, in order."""
    whole = np.asarray(indices, dtype=np.int64)
    batches = [whole[start : start + micro_batch] for start in range(0, len(whole), micro_batch)]
    count = min(GROUPS, len(batches))
    bounds = [len(batches) * number // count for number in range(count + 1)]
    return [tuple(batches[low:high]) for low, high in itertools.pairwise(bounds)]


def merged(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of all groups, given in order. Changes the first."""
    first, *others = parts
    for later in others:
        first.merge(later)
    return first


def gather(
    teacher: Headless, ears: Listeners, groups: Sequence[Group], read: Read, progress: Progress
) -> list[Evidence]:
    """The evidence of each group, from a model that is in memory.

    Raises MinitronError naming layer and axis where activations are not finite.
    """
    device, done, found = teacher.head.device, 0, []
    for group in groups:
        evidence = ears.fresh()
        for batch in group:
            with _listening(teacher.model, ears, evidence, len(batch)), torch.no_grad():
                teacher(torch.from_numpy(read(batch)).to(device), final_hidden)
            done += len(batch)
            progress(done)
        for layer in range(len(evidence.layers)):
            evidence.check(layer, teacher.model.get_submodule(f"{ears.family.decoder_layers}.{layer}"))
        evidence.rest()
        found.append(evidence)
    return found


@contextmanager
def _listening(model: nn.Module, ears: Listeners, evidence: Evidence, samples: int) -> Iterator[None]:
    """Hooks at every tap of `model` until the context ends."""
    blocks = list(model.get_submodule(ears.family.decoder_layers).children())
    with ExitStack() as stack:
        for layer, (sites, block) in enumerate(zip(evidence.layers, blocks, strict=False)):
            stack.enter_context(ears.at(sites, block, layer, samples))
        norm = model.get_submodule(ears.family.final_norm)
        if evidence.stream is not None:
            relay = _Relay(evidence.stream)
            for layer, block in enumerate(blocks):
                stack.callback(block.register_forward_pre_hook(relay.before(layer), with_kwargs=True).remove)
            stack.callback(norm.register_forward_pre_hook(relay.before(len(blocks)), with_kwargs=True).remove)
        if (final := evidence.final) is not None:
            stack.callback(norm.register_forward_hook(lambda _module, _args, out: final.add(out)).remove)
        yield


class _Relay:
    """Hands a pass's residual stream on in pairs: before and behind each block of layers asked for."""

    def __init__(self, evidence: StreamEvidence) -> None:
        self._evidence = evidence
        self._kept: dict[int, Tensor] = {}

    def before(self, position: int) -> Callable[..., None]:
        """A forward pre-hook of the module that takes the stream at `position`."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            for length in self._evidence.lengths:
                if position >= length:
                    start = position - length
                    self._evidence.add(start, length, self._kept[start], stream)
            self._kept[position] = stream
            self._kept.pop(position - self._evidence.lengths[-1], None)

        return hook


def gather_streamed(
    teacher: Layerwise,
    ears: Listeners,
    groups: Sequence[Group],
    read: Read,
    progress: Progress,
    folder: Path | None,
    separator: int | None = None,
) -> list[Evidence]:
    """The same evidence, layer by layer. `folder` takes the hidden states; None keeps them in memory.
    `separator` as in `Headless`.

    Raises as `gather` does, at the first layer where activations are not finite.
    """
    found = [ears.fresh() for _ in groups]
    work = [(evidence, batch) for evidence, group in zip(found, groups, strict=True) for batch in group]
    lengths = found[0].stream.lengths if found[0].stream is not None else (1,)
    sequences = sum(len(batch) for _, batch in work)

    def started(batch: NDArray) -> State:
        return teacher.start(torch.from_numpy(read(batch)).to(teacher.device), separator)

    with Activations(len(work), lengths[-1], folder) as streams:
        states: dict[tuple[int, ...], State] = {}
        for number, (_, batch) in enumerate(work):
            state = started(batch)
            streams.put(0, number, state.hidden)
            # Sequences are packed, not padded: how a layer is called depends on a batch's shape alone. Not
            # where documents are apart; of masks only one batch's are held then, made again for every layer.
            if separator is None:
                kept = replace(state, hidden=state.hidden.new_empty(0))
                states.setdefault(tuple(state.hidden.shape[:2]), kept)
        for layer in range(teacher.layers):
            for number, (evidence, batch) in enumerate(work):
                before = streams.get(layer, number, teacher.device)
                state = states.get(tuple(before.shape[:2])) or started(batch)
                with ExitStack() as stack:
                    if evidence.layers:
                        sites, block = evidence.layers[layer], teacher.module(layer)
                        stack.enter_context(ears.at(sites, block, layer, len(batch)))
                    after = teacher.apply(layer, before, state)
                if evidence.stream is not None:
                    _pair_up(evidence.stream, streams, number, layer + 1, after)
                streams.put(layer + 1, number, after)
                if layer + 1 == teacher.layers and evidence.final is not None:
                    evidence.final.add(teacher.finish(after))
            for evidence in found if ears.width is not None else ():
                evidence.check(layer, teacher.module(layer))
            progress(sequences * (layer + 1) // teacher.layers)
    for evidence in found:
        evidence.rest()
    return found


def _pair_up(
    evidence: StreamEvidence, streams: Activations, batch: int, position: int, after: Tensor
) -> None:
    for length in evidence.lengths:
        if position >= length:
            start = position - length
            evidence.add(start, length, streams.get(start, batch, after.device), after)
