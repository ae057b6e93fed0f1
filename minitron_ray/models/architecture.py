"""`Architecture`: the sizes of one network, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Self, get_args

Axis = Literal[
    "layers",
    "hidden",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "experts",
    "expert_mlp",
    "vocab",
    "positions",
]

AXES: Final[tuple[Axis, ...]] = get_args(Axis)
"""The named axes of a decoder; a tensor's dimension is a sum of products of them."""

CUT_AXES: Final[tuple[Axis, ...]] = (
    "layers",
    "hidden",
    "heads",
    "kv_heads",
    "mlp",
    "experts",
    "expert_mlp",
)
"""The axes that a cut may shorten, where a family has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A network on paper: its family, the size of every axis, and the flags that add or drop tensors.

    `heads` counts query heads and `kv_heads` KV groups; `mlp` is the intermediate size. `head_dim` is
    a size of its own: after a cut it is no longer `hidden / heads`. Axes that a network does not have
    are 0.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    experts: int = 0
    """Routed experts a layer."""
    expert_mlp: int = 0
    """Intermediate size of each expert."""
    active_experts: int = 0
    """How many experts the router sends a token to; no cut changes it."""
    positions: int = 0
    """Rows of a learned table of positions."""
    tied: bool = False
    """Whether the LM head is the embedding."""
    attention_bias: bool = False
    mlp_bias: bool = False
    long_rope: bool = False
    """Stock transformers counts a list of rotary factors against hidden / heads, which must stay head_dim."""

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    def with_sizes(
        self,
        *,
        layers: int | None = None,
        hidden: int | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
        mlp: int | None = None,
        experts: int | None = None,
        expert_mlp: int | None = None,
    ) -> Self:
        """The same network with other sizes on the axes that a cut may shorten."""
        # Spelled out, since `dataclasses.replace` would be half the cost of enumerating a search space.
        return type(self)(
            family=self.family,
            layers=self.layers if layers is None else layers,
            hidden=self.hidden if hidden is None else hidden,
            heads=self.heads if heads is None else heads,
            kv_heads=self.kv_heads if kv_heads is None else kv_heads,
            head_dim=self.head_dim,
            mlp=self.mlp if mlp is None else mlp,
            vocab=self.vocab,
            experts=self.experts if experts is None else experts,
            expert_mlp=self.expert_mlp if expert_mlp is None else expert_mlp,
            active_experts=self.active_experts,
            positions=self.positions,
            tied=self.tied,
            attention_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            long_rope=self.long_rope,
        )

    def shape_text(self) -> str:
        """For people: `24L 576H 9h 1024m` (layers, hidden, query heads, MLP), see `shape_text`."""
        return shape_text(
            self.layers, self.hidden, self.heads, self.kv_heads, self.mlp, self.experts, self.expert_mlp
        )


def shape_text(
    layers: int, hidden: int, heads: int, kv_heads: int, mlp: int, experts: int = 0, expert_mlp: int = 0
) -> str:
    """For people: `24L 576H 9h/3 1024m`: layers, hidden size, query heads / KV groups, MLP size. Of a
    mixture of experts the end is `64e 512m`: experts, and the size of each."""
    attention = f"{heads}h" if kv_heads == heads else f"{heads}h/{kv_heads}"
    network = f"{experts}e {expert_mlp}m" if experts else f"{mlp}m"
    return f"{layers}L {hidden}H {attention} {network}"
