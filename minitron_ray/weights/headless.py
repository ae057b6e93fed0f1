"""`Headless`: a causal language model whose LM head is applied by the caller.

Importance needs no LM head, a cached teacher needs only the head, and the losses form their
gradients chunk by chunk: all of them want the final hidden states and the head's weight, never the
(tokens x vocabulary) logits. The head is used *inside* `forward`, because under FSDP2 that is where
its weight is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from minitron_ray.models.families import family_of
from minitron_ray.weights.documents import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Result = TypeVar("Result")


class Headless(nn.Module):
    """Wraps a `*ForCausalLM`; `model.base_model` is the body and the output embedding the head.

    With a `separator`, the id that ends a document, every document of a sequence is seen by itself.
    """

    def __init__(self, model: PreTrainedModel, separator: int | None = None) -> None:
        super().__init__()
        self.model, self.separator = model, separator
        self.projection: nn.Linear | None = None
        """Lifts hidden states to the teacher's width where both are compared; no part of the model."""

    def lift(self, initial: Tensor) -> None:
        """Learn a projection from `initial`, (teacher's hidden, own hidden), which it takes over."""
        width, own = initial.shape
        self.projection = nn.Linear(own, width, bias=False, device="meta")
        self.projection.weight = nn.Parameter(initial)

    @property
    def head(self) -> Tensor:
        """The LM head's weight, (vocabulary, hidden); the embedding's where they are tied."""
        return self.model.get_output_embeddings().weight

    @property
    def softcap(self) -> float | None:
        """The soft cap c of the logits, which are c * tanh(hidden · head / c); None for none."""
        config = self.model.config
        name = family_of({"model_type": config.model_type}).softcap
        return None if name is None else getattr(config, name)

    def forward(self, input_ids: Tensor, use: Callable[[Tensor, Tensor], Result]) -> Result:
        """`use(hidden, head)` on the final hidden states (samples, tokens, hidden) of `input_ids` (samples, tokens)."""
        places = positions(input_ids, self.separator)
        body = self.model.base_model
        hidden = body(input_ids=input_ids, position_ids=places, use_cache=False).last_hidden_state
        return use(hidden, self.head)


def final_hidden(hidden: Tensor, head: Tensor) -> Tensor:
    """For `Headless.forward`: the final hidden states themselves."""
    return hidden
