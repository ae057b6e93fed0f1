"""`Family`: a kind of network as a table of tensors with named axes.

Counting a candidate's parameters, cutting weights, writing the student's `config.json` and knowing
where to listen for importance are readings of this one table. Nothing here loads a tensor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from minitron_ray.core.errors import ConfigError
from minitron_ray.models.architecture import AXES, Architecture
from minitron_ray.models.configuration import Attributes
from minitron_ray.models.kept import Kept

Flag = Literal["tied", "attention_bias", "mlp_bias"]
Flags = tuple[bool, bool, bool]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row: a tensor's name, and its dimensions as products of axes, outermost first."""

    name: str
    """With `{layer}` where every layer has one."""
    dims: tuple[str, ...]
    """E.g. `("heads*head_dim", "hidden")`."""
    needs: Flag | None = None
    """The tensor exists only where this flag is set."""
    unless: Flag | None = None
    """The tensor does not exist where this flag is set."""

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    @property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """The axes whose product each dimension is."""
        return tuple(tuple(dim.split("*")) for dim in self.dims)

    @property
    def is_embedding(self) -> bool:
        """Whether it is the embedding or the LM head: left out of the non-embedding count (paper §7)."""
        return "vocab" in self.dims

    def exists(self, arch: Architecture) -> bool:
        needed = self.needs is None or getattr(arch, self.needs)
        return needed and not (self.unless is not None and getattr(arch, self.unless))


@dataclass(frozen=True, slots=True)
class Tap:
    """A module where the activations of an axis can be heard: the input or the output of its forward."""

    module: str
    """Module path with `{layer}`."""
    side: Literal["input", "output"]

    def at(self, layer: int) -> str:
        """The module's path in one layer."""
        return self.module.format(layer=layer)


Monomials = tuple[tuple[int, tuple[str, ...]], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A table, what the config's attributes mean, and what stock transformers admits."""

    model_type: str
    causal_lm: str
    """The class in transformers, as written under `architectures`."""
    tensors: tuple[Tensor, ...]
    taps: Mapping[Literal["mlp", "heads", "hidden"], tuple[Tap, ...]]
    """Where each width axis is scored (paper §2.2): the last dimension of the tapped tensor is the
    axis itself, for heads `heads * head_dim`."""
    attributes: Attributes
    multiples: tuple[tuple[str, str], ...] = ()
    """Pairs (a, b) where stock transformers demands that a be a multiple of b."""

    backbone: str = "model"
    """Module path of the decoder without its LM head; calling it gives the final hidden states."""
    decoder_layers: str = "model.layers"
    final_norm: str = "model.norm"
    embedding: str = "model.embed_tokens"
    lm_head: str = "lm_head"
    ignored_tensors: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Endings of tensors that old checkpoints hold and the network computes itself."""

    _compiled: dict[Flags, tuple[Monomials, Monomials]] = field(default_factory=dict, init=False, repr=False)

    def read(self, config: Mapping[str, Any]) -> Architecture:
        """The sizes a `config.json` states. Raises ConfigError for an attribute that is missing, out of
        range, or unknown to this table, by name."""
        arch = self.attributes.read(config, self.model_type, self.causal_lm)
        if problems := self.problems(arch):
            raise ConfigError(f"the model's config cannot be built: {'; '.join(problems)}")
        return arch

    def canonical(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The same config with every size written out, as stock transformers must see it."""
        return self.attributes.write(config, self.read(config), self.causal_lm)

    def student_config(self, config: Mapping[str, Any], arch: Architecture, kept: Kept) -> dict[str, Any]:
        """The `config.json` of the student `arch` cut out of a teacher with `config`.

        Sizes are written out, lists with one entry a layer are sliced, everything else is carried over.
        Raises ValueError where `kept` does not lead from the teacher to `arch`.
        """
        if kept.architecture(self.read(config)) != arch:
            raise ValueError(f"the kept units do not give {arch.shape_text()}")
        return self.attributes.write(config, arch, self.causal_lm, kept.layers)

    def parameters(self, arch: Architecture) -> int:
        """How many parameters, a tied LM head counted once."""
        return _evaluate(self._counts(arch)[0], arch)

    def non_embedding_parameters(self, arch: Architecture) -> int:
        """How many parameters without the embedding and the LM head (the paper's convention)."""
        return self.parameters(arch) - self.embedding_parameters(arch)

    def embedding_parameters(self, arch: Architecture) -> int:
        """Parameters of the embedding and of the LM head, where that is not the embedding."""
        return _evaluate(self._counts(arch)[1], arch)

    def rows(self, arch: Architecture) -> Iterator[tuple[str, int | None, Tensor]]:
        """Every tensor of `arch`, layer by layer: its name, its layer (None outside layers), its row."""
        present = [tensor for tensor in self.tensors if tensor.exists(arch)]
        layered = [tensor for tensor in present if tensor.per_layer]
        for tensor in present:
            if not tensor.per_layer:
                yield tensor.name, None, tensor
            elif tensor is layered[0]:
                for layer in range(arch.layers):
                    yield from ((row.name.format(layer=layer), layer, row) for row in layered)

    def shape(self, tensor: Tensor, arch: Architecture) -> tuple[int, ...]:
        """The sizes of one row's dimensions."""
        return tuple(math.prod(getattr(arch, axis) for axis in axes) for axes in tensor.axes)

    def shapes(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor in the checkpoint, by name, layer by layer."""
        shapes = {tensor: self.shape(tensor, arch) for tensor in self.tensors}
        return {name: shapes[tensor] for name, _, tensor in self.rows(arch)}

    def problems(self, arch: Architecture) -> list[str]:
        """Why stock transformers would refuse or break `arch`; empty if it would not."""
        found = []
        for axis in AXES:
            if getattr(arch, axis) < 1:
                return [f"{axis} is {getattr(arch, axis)}, must be at least 1"]
        if arch.heads % arch.kv_heads:
            found.append(f"{arch.heads} heads do not divide into {arch.kv_heads} KV groups")
        if arch.head_dim % 2:
            found.append(f"head_dim {arch.head_dim} is odd, rotary positions need pairs")
        for multiple, divisor in self.multiples:
            if getattr(arch, multiple) % getattr(arch, divisor):
                found.append(
                    f"{self.model_type} needs {multiple} to be a multiple of {divisor}, "
                    f"{getattr(arch, multiple)} is none of {getattr(arch, divisor)}"
                )
        return found

    def _counts(self, arch: Architecture) -> tuple[Monomials, Monomials]:
        flags = (arch.tied, arch.attention_bias, arch.mlp_bias)
        counts = self._compiled.get(flags)
        if counts is None:
            present = [tensor for tensor in self.tensors if tensor.exists(arch)]
            counts = (_monomials(present), _monomials([tensor for tensor in present if tensor.is_embedding]))
            self._compiled[flags] = counts
        return counts


def _monomials(tensors: list[Tensor]) -> Monomials:
    """The count of `tensors` as a polynomial in the axes, like terms collected: a search space of tens
    of thousands of shapes is counted in a fraction of a second."""
    terms: Counter[tuple[str, ...]] = Counter()
    for tensor in tensors:
        axes = [axis for dim in tensor.axes for axis in dim]
        terms[tuple(sorted([*axes, "layers"] if tensor.per_layer else axes))] += 1
    return tuple((factor, axes) for axes, factor in terms.items())


def _evaluate(monomials: Monomials, arch: Architecture) -> int:
    total = 0
    for factor, axes in monomials:
        for axis in axes:
            factor *= getattr(arch, axis)
        total += factor
    return total


HIDDEN_TAPS: Final = (
    Tap("model.layers.{layer}.input_layernorm", "output"),
    Tap("model.layers.{layer}.post_attention_layernorm", "output"),
)
"""Both norms of every layer; the final norm is not heard, as in the reference implementation."""
