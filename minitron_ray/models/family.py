"""`Family`: a kind of network as a table of tensors with named axes.

Counting a candidate's parameters, cutting weights, writing the student's `config.json` and knowing
where to listen for importance are readings of this one table. Nothing here loads a tensor.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from minitron_ray.core.errors import ConfigError
from minitron_ray.models.architecture import AXES, CUT_AXES, Architecture, Axis
from minitron_ray.models.configuration import Attributes
from minitron_ray.models.kept import Kept

if TYPE_CHECKING:
    import torch

Flag = Literal["tied", "attention_bias", "mlp_bias"]
Flags = tuple[bool, bool, bool]
Product = tuple[str, ...]
"""Factors of one block of a dimension: axes, and whole numbers written out."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row: a tensor's name, and its dimensions in terms of the axes, outermost first."""

    name: str
    """As in the checkpoint, with `{layer}` where every layer has one, `{expert}` where every expert."""
    dims: tuple[str, ...]
    """Each a sum of products of axes and numbers, laid out in that order: `"heads*head_dim"`, or for
    queries, keys and values in one matrix `"heads*head_dim + kv_heads*head_dim + kv_heads*head_dim"`."""
    needs: Flag | None = None
    """The tensor exists only where this flag is set."""
    unless: Flag | None = None
    """The tensor does not exist where this flag is set."""
    makes_heads: bool = False
    """Queries, keys or values come out of it: where heads are merged, it is what is merged."""
    rescaled: Callable[[torch.Tensor, Architecture, Architecture], torch.Tensor] | None = None
    """Given the cut tensor, the teacher and the student: corrects for a factor that the network takes
    from its own sizes. It must change nothing where the two are equal."""

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.name

    @property
    def blocks(self) -> tuple[tuple[Product, ...], ...]:
        """Of each dimension the blocks it is made of, one after the other."""
        return tuple(
            tuple(tuple(factor.strip() for factor in block.split("*")) for block in dim.split("+"))
            for dim in self.dims
        )

    @property
    def is_embedding(self) -> bool:
        """Whether it is the embedding or the LM head: left out of the non-embedding count (paper §7)."""
        return "vocab" in self.dims

    def exists(self, arch: Architecture) -> bool:
        needed = self.needs is None or getattr(arch, self.needs)
        return needed and not (self.unless is not None and getattr(arch, self.unless))


class Row(NamedTuple):
    """One tensor of a network."""

    name: str
    layer: int | None
    """None outside layers."""
    expert: int | None
    """None outside experts."""
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Tap:
    """A module where the activations of an axis can be heard: the input or the output of its forward."""

    module: str
    """Module path with `{layer}`."""
    side: Literal["input", "output"]

    def at(self, layer: int) -> str:
        """The module's path in one layer."""
        return self.module.format(layer=layer)


TapAxis = Literal["mlp", "heads", "hidden", "experts"]
Monomials = tuple[tuple[int, tuple[str, ...]], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A table, what the config's attributes mean, and what stock transformers admits."""

    model_type: str
    causal_lm: str
    """The class in transformers, as written under `architectures`."""
    tensors: tuple[Tensor, ...]
    taps: Mapping[TapAxis, tuple[Tap, ...]]
    """Where each width axis is scored (paper §2.2): the last dimension of the tapped tensor is the
    axis itself, for heads `heads * head_dim`. `experts` names the module that runs the routed experts,
    called with (hidden states, chosen experts, their weights)."""
    attributes: Attributes
    multiples: tuple[tuple[Axis, Axis | int], ...] = ()
    """Pairs (a, b) where stock transformers demands that a be a multiple of b, an axis or a number."""
    square_heads: bool = False
    """Stock transformers takes head_dim as hidden / heads: the two are cut together or not at all."""
    norms_inputs: bool = True
    """Attention and MLP take the residual stream behind a norm, the two taps of `hidden` in this order."""
    norm_over_heads: bool = False
    """A norm spans the queries of all heads (its statistics change when one goes, as with hidden channels)."""
    as_types: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Other model types that compute the identical function from the same tensors, for shapes that
    this one refuses: to what their configs must say where this one's is silent (see `families.rewritten`)."""
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parameters of the stock model that hold what a checkpoint keeps expert by expert: the parameter's
    name to the names of the tensors joined along their first dimension, then stacked over experts."""
    softcap: str | None = None
    """The attribute of the config with the soft cap c of the logits, c * tanh(logits / c)."""

    backbone: str = "model"
    """Module path of the decoder without its LM head; calling it gives the final hidden states."""
    decoder_layers: str = "model.layers"
    final_norm: str = "model.norm"
    embedding: str = "model.embed_tokens"
    lm_head: str = "lm_head"
    ignored_tensors: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Endings of tensors that old checkpoints hold and the network computes itself."""
    old_names: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors in published checkpoints to the ones of the table."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """The fastest implementation of attention that computes this network."""

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

    def softcap_of(self, config: Mapping[str, Any]) -> float | None:
        """The soft cap of the logits that a config states, or stock transformers takes; None for none."""
        if self.softcap is None:
            return None
        cap: float | None = {**self.attributes.defaults, **config}.get(self.softcap)
        return cap

    def parameters(self, arch: Architecture) -> int:
        """How many parameters, a tied LM head counted once."""
        return _evaluate(self.polynomials(arch)[0], arch)

    def non_embedding_parameters(self, arch: Architecture) -> int:
        """How many parameters without the embedding and the LM head (the paper's convention)."""
        return self.parameters(arch) - self.embedding_parameters(arch)

    def embedding_parameters(self, arch: Architecture) -> int:
        """Parameters of the embedding and of the LM head, where that is not the embedding."""
        return _evaluate(self.polynomials(arch)[1], arch)

    def polynomials(self, arch: Architecture) -> tuple[Monomials, Monomials]:
        """All parameters, and those of the embedding and the LM head, in terms of the axes, for networks
        with the flags of `arch`."""
        flags = (arch.tied, arch.attention_bias, arch.mlp_bias)
        counts = self._compiled.get(flags)
        if counts is None:
            present = [tensor for tensor in self.tensors if tensor.exists(arch)]
            counts = (monomials(present), monomials([tensor for tensor in present if tensor.is_embedding]))
            self._compiled[flags] = counts
        return counts

    def related_axes(self, arch: Architecture) -> frozenset[str]:
        """The axes whose sizes `problems` holds against each other, or against a number, in networks with
        the flags of `arch`; of any other it only asks that there be one."""
        named = {axis for pair in self.multiples for axis in pair if isinstance(axis, str)}
        square = {"hidden"} if self.square_heads or arch.long_rope else set()
        return frozenset({"heads", "kv_heads", "experts"} | named | square)

    @cached_property
    def cut_axes(self) -> tuple[Axis, ...]:
        """The axes of this family that a cut may shorten."""
        named = {
            factor for tensor in self.tensors for dim in tensor.blocks for block in dim for factor in block
        }
        named |= {"layers", *(["experts"] if any(tensor.per_expert for tensor in self.tensors) else [])}
        return tuple(axis for axis in CUT_AXES if axis in named)

    def rows(self, arch: Architecture) -> Iterator[Row]:
        """Every tensor of `arch`, layer by layer, expert by expert."""
        present = [tensor for tensor in self.tensors if tensor.exists(arch)]
        layered = [tensor for tensor in present if tensor.per_layer]
        for tensor in present:
            if not tensor.per_layer:
                yield Row(tensor.name, None, None, tensor)
            elif tensor is layered[0]:
                for layer in range(arch.layers):
                    yield from _layer_rows(layered, layer, arch.experts)

    def shape(self, tensor: Tensor, arch: Architecture) -> tuple[int, ...]:
        """The sizes of one row's dimensions."""
        return tuple(sum(_product(block, arch) for block in dim) for dim in tensor.blocks)

    def shapes(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor in the checkpoint, by name, layer by layer."""
        shapes = {tensor: self.shape(tensor, arch) for tensor in self.tensors}
        return {row.name: shapes[row.tensor] for row in self.rows(arch)}

    def problems(self, arch: Architecture) -> list[str]:
        """Why stock transformers would refuse or break `arch`; empty if it would not."""
        found = []
        for axis in AXES:
            least = 1 if axis not in OPTIONAL_AXES or axis in self.cut_axes else 0
            if getattr(arch, axis) < least:
                return [f"{axis} is {getattr(arch, axis)}, must be at least {least}"]
        if arch.heads % arch.kv_heads:
            found.append(f"{arch.heads} heads do not divide into {arch.kv_heads} KV groups")
        if arch.head_dim % 2 and not arch.positions:
            found.append(f"head_dim {arch.head_dim} is odd, rotary positions need pairs")
        if arch.experts < arch.active_experts:
            found.append(f"{arch.experts} experts are fewer than the {arch.active_experts} a token goes to")
        if self.square_heads and arch.heads * arch.head_dim != arch.hidden:
            found.append(
                f"{self.model_type} takes head_dim as hidden / heads, so hidden must be heads * "
                f"{arch.head_dim} = {arch.heads * arch.head_dim}, {arch.hidden} is not"
            )
        if arch.long_rope and arch.hidden // arch.heads // 2 != arch.head_dim // 2:
            found.append(
                f"{self.model_type} with LongRoPE needs hidden / heads to be {arch.head_dim}, "
                f"{arch.hidden} / {arch.heads} is not"
            )
        for multiple, divisor in self.multiples:
            number = divisor if isinstance(divisor, int) else getattr(arch, divisor)
            if getattr(arch, multiple) % number:
                found.append(
                    f"{self.model_type} needs {multiple} to be a multiple of {divisor}, "
                    f"{getattr(arch, multiple)} is none"
                    + ("" if isinstance(divisor, int) else f" of {number}")
                )
        return found


def _layer_rows(layered: list[Tensor], layer: int, experts: int) -> Iterator[Row]:
    of_experts = [tensor for tensor in layered if tensor.per_expert]
    for tensor in layered:
        if not tensor.per_expert:
            yield Row(tensor.name.format(layer=layer), layer, None, tensor)
        elif tensor is of_experts[0]:
            for expert in range(experts):
                for row in of_experts:
                    yield Row(row.name.format(layer=layer, expert=expert), layer, expert, row)


def _product(block: Product, arch: Architecture) -> int:
    return math.prod(int(factor) if factor.isdigit() else getattr(arch, factor) for factor in block)


def monomials(tensors: list[Tensor], experts: str = "experts") -> Monomials:
    """The count of `tensors` as a polynomial in the axes, like terms collected: a search space of tens
    of thousands of shapes is counted in a fraction of a second. `experts` is how many of them count."""
    terms: Counter[Product] = Counter()
    for tensor in tensors:
        repeated = (["layers"] if tensor.per_layer else []) + ([experts] if tensor.per_expert else [])
        for blocks in itertools.product(*tensor.blocks):
            factors = [factor for block in blocks for factor in block]
            axes = sorted([factor for factor in factors if not factor.isdigit()] + repeated)
            terms[tuple(axes)] += math.prod(int(factor) for factor in factors if factor.isdigit())
    return tuple((factor, axes) for axes, factor in terms.items())


def _evaluate(monomials: Monomials, arch: Architecture) -> int:
    total = 0
    for factor, axes in monomials:
        for axis in axes:
            factor *= getattr(arch, axis)
        total += factor
    return total


OPTIONAL_AXES: Final = frozenset({"mlp", "experts", "expert_mlp", "positions"})
"""Axes that a family may lack; they are 0 there."""
