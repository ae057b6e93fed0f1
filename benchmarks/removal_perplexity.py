"""Perplexity without each layer: prefixes reused, against one whole forward pass for each layer.

    python benchmarks/removal_perplexity.py
    python benchmarks/removal_perplexity.py --vocabularies 8192 --layers 12 --rounds 3     for trying out

Both ways measure the same random Llama on the same tokens, in turn, with the same code for the LM head.
The ratio of their times is compared with what counting says. Of L layers, a head that costs as much as
h of them, and L + 1 networks (the whole one, and without each layer):

    naive    L² layers and (L + 1) heads      the whole network, L networks of L - 1 layers
    reused   L(L + 1)/2 layers and as many heads      without layer i only the layers behind it are new

h is counted in floating-point operations (models/cost.py). A head's softmax is not counted there, so
`measured h`, the time of a head over that of a layer, says how much of a gap to the prediction it explains.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from minitron_ray.evaluation.task import Batch
from minitron_ray.importance.depth.perplexity import Perplexity
from minitron_ray.importance.removal import removal_values
from minitron_ray.models.cost import forward_flops
from minitron_ray.models.families import family_of
from minitron_ray.weights.layerwise import Layerwise
from minitron_ray.weights.model import build
from minitron_ray.weights.vocabulary import sequence_scores

GOAL = 1.05
"""Measured (CPU seconds) over predicted ratio."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One way, once: seconds by the clock and of this process on all cores, and what it found."""

    wall: float
    cpu: float
    losses: NDArray
    """(1 + layers, sequences), nats a token."""


def timed(work: Callable[[], NDArray]) -> Timed:
    wall, cpu = time.perf_counter(), time.process_time()
    losses = work()
    return Timed(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu, losses=losses)


def random_llama(layers: int, vocabulary: int) -> PreTrainedModel:
    """Layers of SmolLM2-135M's shape; weights wide enough for every layer to matter."""
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
    family = family_of(config)
    source = torch.Generator().manual_seed(0)
    shapes = family.shapes(family.read(config))
    return build(config, {name: _random(shape, source) for name, shape in shapes.items()})


def _random(shape: tuple[int, ...], source: torch.Generator) -> torch.Tensor:
    return torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=source) * 0.04


@contextmanager
def without(model: PreTrainedModel, layer: int) -> Iterator[None]:
    """The stock model has one layer less inside the block."""
    decoder, config = model.base_model, model.config
    layers = decoder.layers
    decoder.layers = torch.nn.ModuleList([block for number, block in enumerate(layers) if number != layer])
    config.num_hidden_layers = len(decoder.layers)
    try:
        yield
    finally:
        decoder.layers, config.num_hidden_layers = layers, len(layers)


@torch.no_grad()
def naive(model: PreTrainedModel, batches: list[Batch]) -> NDArray:
    def losses() -> NDArray:
        head = model.get_output_embeddings().weight
        found = []
        for batch in batches:
            ids = torch.from_numpy(batch.ids)
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            found.append(sequence_scores(hidden, head, ids)[0].numpy())
        return np.concatenate(found)

    rows = [losses()]
    for layer in range(model.config.num_hidden_layers):
        with without(model, layer):
            rows.append(losses())
    return np.stack(rows)


def reused(network: Layerwise, batches: list[Batch]) -> NDArray:
    return removal_values(network, batches, Perplexity(), [(layer,) for layer in range(network.layers)])


def counted_head(model: PreTrainedModel, tokens: int) -> float:
    """What the head costs in layers, by floating-point operations."""
    family = family_of({"model_type": model.config.model_type})
    arch = family.read(model.config.to_diff_dict() | {"vocab_size": model.config.vocab_size})
    whole = forward_flops(family, arch, tokens)
    layer = whole - forward_flops(family, arch.with_sizes(layers=arch.layers - 1), tokens)
    return whole / layer - arch.layers


def measured_head(network: Layerwise, batch: Batch, rounds: int) -> float:
    """What the head, softmax and all, costs in layers, by the median CPU seconds of each."""
    ids = torch.from_numpy(batch.ids)
    state = network.start(ids)
    heads, layers = [], []
    for _ in range(rounds):
        start = time.process_time()
        sequence_scores(state.hidden, network.head, ids)
        heads.append(time.process_time() - start)
        start = time.process_time()
        for layer in range(network.layers):
            network.apply(layer, state.hidden, state)
        layers.append((time.process_time() - start) / network.layers)
    return statistics.median(heads) / statistics.median(layers)


def predicted(layers: int, head: float) -> float:
    heads = (layers + 1) * head
    return (layers * (layers + 1) / 2 + heads) / (layers**2 + heads)


def compare(vocabulary: int, layers: int, rounds: int, sequences: int, tokens: int, batch: int) -> bool:
    """Prints one vocabulary's figures. Whether the goal is met."""
    model = random_llama(layers, vocabulary)
    network = Layerwise(model, family_of({"model_type": "llama"}))
    ids = np.random.default_rng(0).integers(0, vocabulary, (sequences, tokens))
    batches = [Batch(ids=ids[start : start + batch]) for start in range(0, sequences, batch)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    h = counted_head(model, tokens)
    print(
        f"vocabulary {vocabulary:,}: {parameters / 1e6:.1f}M parameters, {layers} layers, "
        f"{sequences} x {tokens} tokens in batches of {batch}, {torch.get_num_threads()} threads",
        flush=True,
    )
    pairs = []
    for number in range(rounds):
        ways: list[Callable[[], NDArray]] = [lambda: naive(model, batches), lambda: reused(network, batches)]
        runs = [timed(way) for way in (ways if number % 2 == 0 else reversed(ways))]
        pairs.append(runs if number % 2 == 0 else runs[::-1])
        (slow, fast), one = pairs[-1], np.abs(pairs[-1][0].losses - pairs[-1][1].losses).max()
        print(
            f"  pair {number + 1}: naive {slow.wall:.2f} s wall {slow.cpu:.2f} s CPU, reused {fast.wall:.2f} s "
            f"wall {fast.cpu:.2f} s CPU, ratio {fast.wall / slow.wall:.4f} wall {fast.cpu / slow.cpu:.4f} CPU, "
            f"largest difference of a loss {one:.2e} nats",
            flush=True,
        )
    wall = statistics.median(fast.wall / slow.wall for slow, fast in pairs)
    cpu = statistics.median(fast.cpu / slow.cpu for slow, fast in pairs)
    theory, h_time = predicted(layers, h), measured_head(network, batches[0], 5)
    print(
        f"  median ratio {wall:.4f} wall, {cpu:.4f} CPU; predicted {theory:.4f} (h = {h:.2f} layers); "
        f"measured / predicted {wall / theory:.3f} wall, {cpu / theory:.3f} CPU (goal {GOAL}); "
        f"measured h = {h_time:.2f} would predict {predicted(layers, h_time):.4f}",
        flush=True,
    )
    return cpu / theory <= GOAL  # by the clock, what else the machine does would decide


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 49152])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of each sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences a forward pass")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    met = [
        compare(vocabulary, given.layers, given.rounds, given.sequences, given.tokens, given.batch)
        for vocabulary in given.vocabularies
    ]
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
