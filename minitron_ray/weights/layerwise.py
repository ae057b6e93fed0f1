"""`Layerwise`: a stock causal language model run one decoder layer at a time.

What a family does before and between its layers (scaled embeddings, learned positions, rotary tables,
a mask for each type of layer) is not written down again here: the stock decoder runs once a batch with
recorders in place of its layers, which note how each layer would have been called. The real layers are
then called with the same arguments, so the result has the same bits as the model's own forward pass.

`Layerwise` runs a model that is in memory, `StreamedLayerwise` one that is not: of a memory-mapped
checkpoint it holds the weights of one layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from minitron_ray.models.families import family_of
from minitron_ray.models.family import Family
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.documents import positions
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import skeleton, stacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Call(NamedTuple):
    """The arguments of one layer besides the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A batch before its first layer: hidden states (samples, tokens, hidden), and each layer's call.

    Good for this batch only: masks may have its number of samples, or show where its documents begin.
    """

    hidden: Tensor
    calls: tuple[Call, ...]


class Layerwise:
    """A built model, layer by layer. Nothing of it is changed; hooks on its modules are heard.

    No gradients are kept. Use it from one thread at a time.
    """

    whole = True
    """All weights are in memory, so that no order of the work reads them more often than another."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model, self.family = model, family
        self._blocks = list(model.get_submodule(family.decoder_layers))
        self._calls: list[Call] = []
        self._before = self._recording_decoder(model.get_submodule(family.backbone))

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return len(self._blocks)

    @property
    def device(self) -> torch.device:
        """Where batches must lie, and where everything is computed."""
        return self.model.device

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's hidden state."""
        return int(self.model.config.hidden_size) * self.model.dtype.itemsize

    @property
    def head(self) -> Tensor:
        """The LM head's weight, (vocabulary, hidden); the embedding's where they are tied."""
        return Headless(self.model).head

    @property
    def softcap(self) -> float | None:
        """The c of the family's soft cap of logits, c * tanh(logits / c); None where there is none."""
        return Headless(self.model).softcap

    def module(self, layer: int) -> nn.Module:
        """One decoder layer, for hooks. Of a streamed model the weights are there while it is applied."""
        return self._blocks[layer]

    @torch.no_grad()
    def start(self, ids: Tensor, separator: int | None = None) -> State:
        """A batch before its first layer; `ids` int64 (samples, tokens) on `device`, `separator` as in
        `Headless`."""
        self._calls.clear()
        places = positions(ids, separator)
        hidden = self._before(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
        assert len(self._calls) == self.layers
        return State(hidden=hidden, calls=tuple(self._calls))

    @torch.no_grad()
    def apply(self, layer: int, hidden: Tensor, state: State) -> Tensor:
        """The output of one layer, (samples, tokens, hidden), for the batch that `state` is of."""
        call = state.calls[layer]
        output = self.module(layer)(hidden, *call.arguments, **call.keywords)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @torch.no_grad()
    def finish(self, hidden: Tensor) -> Tensor:
        """The final hidden states of the last layer's output: what the LM head is applied to."""
        result: Tensor = self.model.get_submodule(self.family.final_norm)(hidden)
        return result

    def _recording_decoder(self, decoder: nn.Module) -> nn.Module:
        """A shallow copy of the decoder whose layers only note their calls, without its final norm."""
        recorders = nn.ModuleList([_Recorder(self._calls) for _ in self._blocks])
        before = _with_submodule(decoder, self._inside(self.family.decoder_layers), recorders)
        return _with_submodule(before, self._inside(self.family.final_norm), nn.Identity())

    def _inside(self, path: str) -> str:
        """A module's path from the decoder on."""
        return path.removeprefix(f"{self.family.backbone}.")


class StreamedLayerwise(Layerwise):
    """A checkpoint, layer by layer, in `dtype` on `device`.

    In memory are the final norm, learned positions and, while a layer is applied, its weights; where
    they have the type and lie on the CPU, not even those, but pages of the file. Of the embedding the
    rows of a batch's tokens are read.
    """

    whole = False

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str) -> None:
        family = family_of(checkpoint.config)
        arch = family.read(checkpoint.config)
        checkpoint.check(family, arch)
        self._checkpoint, self._arch = checkpoint, arch
        self._dtype, self._device = dtype, torch.device(device)
        model = skeleton(checkpoint.config, dtype).eval().requires_grad_(False)
        _move_buffers(model, self._device)
        outside = {
            row.name: self._read(row.name)
            for row in family.rows(arch)
            if row.layer is None and not row.tensor.is_embedding
        }
        model.load_state_dict(outside, strict=False, assign=True)
        super().__init__(model, family)
        embedding = self._inside(family.embedding)
        rows = _ReadRows(model.get_submodule(family.embedding), self._embedding_rows)
        self._before = _with_submodule(self._before, embedding, rows)

    @property
    def device(self) -> torch.device:
        return self._device

    @cached_property
    def head(self) -> Tensor:
        name = self.family.embedding if self._arch.tied else self.family.lm_head
        return self._read(f"{name}.weight")

    def apply(self, layer: int, hidden: Tensor, state: State) -> Tensor:
        self._load(layer)
        return super().apply(layer, hidden, state)

    _loaded: int | None = None

    def _load(self, layer: int) -> None:
        """Brings in one layer's weights, and lets go of those of the layer before it."""
        if self._loaded == layer:
            return
        if self._loaded is not None:
            block = self._blocks[self._loaded]
            empty = {name: weight.to("meta") for name, weight in block.named_parameters()}
            block.load_state_dict(empty, strict=False, assign=True)
        rows = [row for row in self.family.rows(self._arch) if row.layer == layer]
        weights = stacked(((row, self._read(row.name)) for row in rows), self.family, self._arch)
        prefix = f"{self.family.decoder_layers}.{layer}."
        inside = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        missing, unexpected = self._blocks[layer].load_state_dict(inside, strict=False, assign=True)
        assert not missing and not unexpected, (missing, unexpected)
        self._loaded = layer

    def _read(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name).to(device=self._device, dtype=self._dtype)

    def _embedding_rows(self, ids: Tensor) -> Tensor:
        rows = self._checkpoint.tensor(f"{self.family.embedding}.weight")[ids.cpu()]
        return rows.to(device=self._device, dtype=self._dtype)


class _Recorder(nn.Module):
    """In a layer's place: notes the call and hands the hidden states on as they are."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls

    def forward(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        self._calls.append(Call(arguments, keywords))
        return hidden_states


class _ReadRows(nn.Module):
    """In the embedding's place: runs it on a table of only the rows that a batch asks for."""

    def __init__(self, embedding: nn.Module, rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._embedding = copy.copy(embedding)
        self._embedding._parameters = dict(embedding._parameters)
        setattr(self._embedding, "padding_idx", None)  # noqa: B010 - a row number of the whole table
        self._rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        present, places = ids.unique(return_inverse=True)
        self._embedding.weight = nn.Parameter(self._rows(present), requires_grad=False)
        result: Tensor = self._embedding(places)
        return result


def _with_submodule(module: nn.Module, path: str, replacement: nn.Module) -> nn.Module:
    """A shallow copy of `module` with one submodule replaced; everything else is shared with it."""
    name, _, rest = path.partition(".")
    shadow = copy.copy(module)
    shadow._modules = dict(module._modules)
    child = shadow._modules[name]
    assert child is not None
    shadow._modules[name] = _with_submodule(child, rest, replacement) if rest else replacement
    return shadow


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers are computed, not stored; parameters stay without content."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
