"""What the routed experts of a mixture say about themselves (paper §8.6).

Stock transformers runs all experts of a layer in one module, whose outputs are already summed over
experts. What each of them did is computed a second time, from the arguments of that module's call.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear

from minitron_ray.importance.metric import UnitEvidence


class RoutedEvidence:
    """One layer's experts: the norm of each one's weighted output, and the activations of its neurons.

    An expert's score is the mean, over the tokens routed to it, of the norm of its output times the
    router's weight; 0 where none was. Its neurons are heard over the same tokens.
    """

    def __init__(self, neurons: Sequence[UnitEvidence]) -> None:
        """`neurons` has the evidence of each expert's neurons."""
        self.neurons = tuple(neurons)
        self._norms = torch.zeros(len(self.neurons), dtype=torch.float64)
        self._tokens = torch.zeros(len(self.neurons), dtype=torch.int64)

    def add(self, experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor, samples: int) -> None:
        """One call of the module `experts`: hidden states (samples*tokens, hidden), samples one after the
        other, and for each token the experts it goes to with their weights, (samples*tokens, k)."""
        hidden = hidden.reshape(-1, hidden.shape[-1])
        length = len(hidden) // samples
        self._norms = self._norms.to(hidden.device)
        self._tokens = self._tokens.to(hidden.device)
        for expert in range(len(self.neurons)):
            token, place = torch.where(chosen == expert)
            if not len(token):
                continue
            neurons = experts._apply_gate(linear(hidden[token], experts.gate_up_proj[expert]))  # type: ignore[operator, index]
            self.neurons[expert].add_routed(neurons, token // length, samples)
            output = linear(neurons, experts.down_proj[expert])  # type: ignore[index]
            norm = torch.linalg.vector_norm((output * weights[token, place, None]).float(), dim=-1)
            self._norms[expert] += norm.sum(dtype=torch.float64)
            self._tokens[expert] += len(token)

    def merge(self, later: RoutedEvidence) -> None:
        """Take in the evidence of other sequences."""
        self._norms = self._norms + later._norms
        self._tokens = self._tokens + later._tokens
        for mine, theirs in zip(self.neurons, later.neurons, strict=True):
            mine.merge(theirs)

    def rest(self) -> None:
        """Leave the accelerator."""
        self._norms, self._tokens = self._norms.cpu(), self._tokens.cpu()
        for neurons in self.neurons:
            neurons.rest()

    def scores(self) -> NDArray:
        """float64 (experts,)."""
        norms, tokens = self._norms.cpu().numpy(), self._tokens.cpu().numpy()
        return np.asarray(norms / np.maximum(tokens, 1))

    def neuron_scores(self, label: str, size: int) -> NDArray:
        """float64 (experts, `size`); 0 for the neurons of an expert that no token went to."""
        found = [neurons.scores().get(label) for neurons in self.neurons]
        return np.stack([np.zeros(size) if values is None else values for values in found])
