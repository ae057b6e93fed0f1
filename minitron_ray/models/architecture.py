"""`Architecture`: the sizes of one network, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Self

Axis = Literal["layers", "hidden", "heads", "kv_heads", "head_dim", "mlp", "vocab"]

AXES: Final[tuple[Axis, ...]] = ("layers", "hidden", "heads", "kv_heads", "head_dim", "mlp", "vocab")
"""The named axes of a decoder; a tensor's dimension is a product of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A network on paper: its family, the size of every axis, and the flags that add or drop tensors.

    `heads` counts query heads and `kv_heads` KV groups; `mlp` is the intermediate size. `head_dim` is
    a size of its own: after a cut it is no longer `hidden / heads`.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool = False
    """Whether the LM head is the embedding."""
    attention_bias: bool = False
    mlp_bias: bool = False

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
        mlp: int | None = None,
    ) -> Self:
        """The same network with other sizes on the axes that a cut may shorten."""
        # Spelled out, since `dataclasses.replace` would be half the cost of enumerating a search space.
        return type(self)(
            family=self.family,
            layers=self.layers if layers is None else layers,
            hidden=self.hidden if hidden is None else hidden,
            heads=self.heads if heads is None else heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            mlp=self.mlp if mlp is None else mlp,
            vocab=self.vocab,
            tied=self.tied,
            attention_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
        )

    def shape_text(self) -> str:
        """For people: `24L 576H 9h 1024m` (layers, hidden, query heads, MLP)."""
        return f"{self.layers}L {self.hidden}H {self.heads}h {self.mlp}m"
