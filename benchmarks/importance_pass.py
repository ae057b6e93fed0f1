"""What the importance pass costs over a plain forward without LM head.

Both run the same model in one process, turn by turn in changing order, so that what else the machine
does hits both. Printed are the medians of the rounds' ratios: by processor time, which other processes
leave alone, and by wall time.

    python benchmarks/importance_pass.py
    python benchmarks/importance_pass.py --model ./a-checkpoint --sequences 16 --length 1024
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron_ray.importance.capture import gather, grouped
from minitron_ray.importance.depth.block_importance import BlockImportance
from minitron_ray.importance.evidence import Listeners
from minitron_ray.importance.width.activation import Activation
from minitron_ray.models.families import family_of
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.headless import Headless, final_hidden
from minitron_ray.weights.model import build


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    teacher, config = _teacher(options)
    family = family_of(config)
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (options.sequences, options.length))
    groups = grouped(range(options.sequences), options.micro_batch)
    read = tokens.__getitem__
    ears = Listeners(
        family=family,
        architecture=family.read(config),
        width=Activation(gather=options.gather),
        depth=BlockImportance(),
    )

    def plain() -> None:
        with torch.no_grad():
            for group in groups:
                for batch in group:
                    teacher(torch.from_numpy(read(batch)).to(teacher.head.device), final_hidden)

    def importance() -> None:
        gather(teacher, ears, groups, read, lambda done: None)

    timings = _measure(plain, importance, options.rounds)
    _report(timings, family.parameters(family.read(config)), options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; else a random Llama")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--mlp", type=int, default=1536)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--gather", choices=("chosen", "all"), default="chosen")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _teacher(options: argparse.Namespace) -> tuple[Headless, dict[str, Any]]:
    if options.model is not None:
        checkpoint = Checkpoint(options.model)
        config, weights = checkpoint.config, checkpoint
    else:
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": options.layers,
            "hidden_size": options.hidden,
            "intermediate_size": options.mlp,
            "num_attention_heads": options.heads,
            "num_key_value_heads": options.kv_heads,
            "head_dim": options.hidden // options.heads,
            "vocab_size": options.vocab,
            "max_position_embeddings": max(2048, options.length),
        }
        family = family_of(config)
        shapes = family.shapes(family.read(config))
        weights = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    model = build(config, weights, dtype=options.dtype, device=options.device, trainable=False)
    return Headless(model.eval()), config


def _measure(
    plain: Callable[[], None], importance: Callable[[], None], rounds: int
) -> list[dict[str, tuple[float, float]]]:
    """Of each round, (processor seconds, wall seconds) of either."""
    jobs = {"plain": plain, "importance": importance}
    for job in jobs.values():
        job()
    found = []
    for number in range(rounds):
        order = list(jobs) if number % 2 else list(jobs)[::-1]
        found.append({name: _timed(jobs[name]) for name in order})
    return found


def _timed(job: Callable[[], None]) -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    processor, wall = time.process_time(), time.perf_counter()
    job()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() - processor, time.perf_counter() - wall


def _report(
    timings: list[dict[str, tuple[float, float]]], parameters: int, options: argparse.Namespace
) -> None:
    print(
        f"{parameters:,} parameters, {options.sequences} sequences of {options.length} tokens, {options.dtype}"
    )
    print(f"{len(timings)} rounds, {options.threads} thread(s), gather {options.gather}\n")
    print(f"{'clock':<12}{'plain s':>10}{'importance s':>14}{'ratio':>8}{'lowest':>9}{'highest':>9}")
    result: dict[str, Any] = {"parameters": parameters, "machine": platform.machine()}
    for place, clock in enumerate(("processor", "wall")):
        ratios = [t["importance"][place] / t["plain"][place] for t in timings]
        plain = statistics.median(t["plain"][place] for t in timings)
        importance = statistics.median(t["importance"][place] for t in timings)
        ratio = statistics.median(ratios)
        print(
            f"{clock:<12}{plain:>10.3f}{importance:>14.3f}{ratio:>8.3f}{min(ratios):>9.3f}{max(ratios):>9.3f}"
        )
        result[clock] = {"plain": plain, "importance": importance, "ratio": ratio, "ratios": ratios}
    options.model = str(options.model) if options.model else None
    print("\n" + json.dumps({"benchmark": "importance_pass", **vars(options), **result}))


if __name__ == "__main__":
    main()
