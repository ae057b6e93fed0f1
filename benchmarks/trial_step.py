"""What a trial's optimizer step costs with each of the teacher's signals, over plain cross entropy.

The same student takes the same steps through `distillation/loop.py`: with cross entropy alone, with the
running teacher, and with every signal that is stored, read from files that were written by the code of
the stage `teacher`. Variants take turns in changing order, one step each, so that what else the machine
does hits all of them. Printed are the medians of the rounds' ratios, by processor and by wall time.

    python benchmarks/trial_step.py
    python benchmarks/trial_step.py --vocab 49152 --rounds 7
    python benchmarks/trial_step.py --model ./a-checkpoint --layers 12 --hidden 384 --mlp 1024
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron_ray.distillation.blocks import block_bytes
from minitron_ray.distillation.loop import Data, Recipe, Share, Step, make_optimizer, train
from minitron_ray.distillation.losses.cross_entropy import CrossEntropy
from minitron_ray.distillation.losses.forward_kl import ForwardKL
from minitron_ray.distillation.schedule import Schedule
from minitron_ray.distillation.signal import StoredSignal
from minitron_ray.distillation.signals.final_hidden import FinalHidden
from minitron_ray.distillation.signals.sampled import Sampled
from minitron_ray.distillation.signals.top_k import TopK
from minitron_ray.distillation.teacher import (
    OnlineTeacher,
    SignalBlock,
    StoredTeacher,
    TeacherSignal,
    compute_block,
    write_signal,
)
from minitron_ray.models.cost import body_flops, head_flops, training_flops
from minitron_ray.models.families import family_of
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.headless import Headless
from minitron_ray.weights.model import build

STORED: tuple[StoredSignal, ...] = (FinalHidden(), FinalHidden(dtype="int8"), Sampled(), TopK())
LIMITS = {"final_hidden": 1.08, "sampled 50": 1.02}
"""What the ratios are to stay below."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    teacher, config = _teacher(options)
    tokens = np.random.default_rng(0).integers(
        0, config["vocab_size"], ((options.rounds + 1) * options.batch, options.length)
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        signals: dict[str, TeacherSignal | None] = {"cross_entropy": None, "online": OnlineTeacher(teacher)}
        bytes_a_token = {}
        for kind in STORED:
            signals[kind.label] = _stored(kind, teacher, tokens, Path(folder) / kind.label, options)
            bytes_a_token[kind.label] = block_bytes(Path(folder) / kind.label) / tokens.size
        steps = {name: _steps(signal, config, tokens, options) for name, signal in signals.items()}
        timings = _measure({name: _next(iterator) for name, iterator in steps.items()}, options.rounds)
    _report(timings, bytes_a_token, _theory(config, options), options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="folder of the teacher; else a random Llama of 12 layers of 512"
    )
    parser.add_argument("--vocab", type=int, default=8192, help="of the random teacher")
    parser.add_argument("--layers", type=int, default=12, help="of the student, as the next three")
    parser.add_argument("--hidden", type=int, default=352)
    parser.add_argument("--mlp", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where signals are written meanwhile")
    return parser.parse_args()


def _llama(layers: int, hidden: int, mlp: int, heads: int, vocab: int, length: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": max(2048, length),
        "tie_word_embeddings": False,
    }


def _random(config: dict[str, Any], *, dtype: str, device: str, trainable: bool) -> Headless:
    family = family_of(config)
    shapes = family.shapes(family.read(config))
    weights = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    return Headless(build(config, weights, dtype=dtype, device=device, trainable=trainable))


def _teacher(options: argparse.Namespace) -> tuple[Headless, dict[str, Any]]:
    if options.model is not None:
        checkpoint = Checkpoint(options.model)
        model = build(checkpoint.config, checkpoint, dtype=options.dtype, device=options.device)
        return Headless(model.eval()), checkpoint.config
    config = _llama(12, 512, 1536, 8, options.vocab, options.length)
    return _random(config, dtype=options.dtype, device=options.device, trainable=False), config


def _student(config: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    return _llama(
        options.layers, options.hidden, options.mlp, options.heads, config["vocab_size"], options.length
    )


def _stored(
    kind: StoredSignal, teacher: Headless, tokens: np.ndarray, folder: Path, options: argparse.Namespace
) -> StoredTeacher:
    folder.mkdir()
    block = SignalBlock(folder=folder, signal=kind, sequences=range(len(tokens)))
    dtype = getattr(torch, options.dtype)
    compute_block(block, folder, teacher, tokens.__getitem__, dtype=dtype, batch=options.batch, seed=0)
    write_signal(folder, [block])
    return StoredTeacher(folder, teacher.head.detach(), teacher.softcap)


def _steps(
    signal: TeacherSignal | None, config: dict[str, Any], tokens: np.ndarray, options: argparse.Namespace
) -> Iterator[Step]:
    torch.manual_seed(0)
    student = _random(_student(config, options), dtype="float32", device=options.device, trainable=True)
    recipe = Recipe(
        loss=CrossEntropy() if signal is None else ForwardKL(),
        schedule=Schedule(peak=1e-4, minimum=0.0, warmup=0.1, tokens=tokens.size),
        batch=options.batch,
        sequence_length=options.length,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        clip=1.0,
    )
    data = Data(
        batch=lambda step: np.arange((step - 1) * options.batch, step * options.batch),
        sequences=tokens.__getitem__,
    )
    share = Share(
        device=torch.device(options.device), dtype=getattr(torch, options.dtype), micro_batch=options.batch
    )
    return train(student, make_optimizer(student, recipe), signal, data, recipe, share)


def _next(steps: Iterator[Step]) -> Callable[[], None]:
    def job() -> None:
        next(steps)

    return job


def _measure(jobs: dict[str, Callable[[], None]], rounds: int) -> list[dict[str, tuple[float, float]]]:
    """Of each round, (processor seconds, wall seconds) of every job; a first one is not counted."""
    for job in jobs.values():
        job()
    found, names = [], list(jobs)
    for number in range(rounds):
        turned = names[number % len(names) :] + names[: number % len(names)]
        order = turned if number % 2 else turned[::-1]
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


def _theory(config: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Ratios by matrix products alone, optimizer and softmax left out."""
    family = family_of(config)
    arch, small = family.read(config), family_of({"model_type": "llama"}).read(_student(config, options))
    own = training_flops(family_of({"model_type": "llama"}), small, options.length)
    body, head = body_flops(family, arch, options.length), head_flops(arch)
    added = {"cross_entropy": 0, "online": body + head}
    for kind in STORED:
        added[kind.label] = 0 if kind.sparse else head
    return {name: 1 + flops / own for name, flops in added.items()}


def _report(
    timings: list[dict[str, tuple[float, float]]],
    bytes_a_token: dict[str, float],
    theory: dict[str, float],
    options: argparse.Namespace,
) -> None:
    load = os.getloadavg()[0]
    if load > 1.5:
        print(f"load average {load:.1f}: not a quiet machine", file=sys.stderr)
    print(f"{options.batch} x {options.length} tokens a step, {options.dtype}, {options.threads} thread(s), "
          f"{len(timings)} rounds; ratios to cross_entropy")  # fmt: skip
    print(
        f"{'signal':<20}{'seconds':>9}{'ratio':>8}{'lowest':>9}{'highest':>9}{'wall':>8}{'theory':>9}{'B/token':>10}"
    )
    result: dict[str, Any] = {}
    for name in theory:
        ratios, walls = ([t[name][clock] / t["cross_entropy"][clock] for t in timings] for clock in (0, 1))
        seconds = statistics.median(t[name][0] for t in timings)
        ratio, wall = statistics.median(ratios), statistics.median(walls)
        size = f"{bytes_a_token[name]:.1f}" if name in bytes_a_token else ""
        limit = f"  (at most {LIMITS[name]})" if name in LIMITS else ""
        print(
            f"{name:<20}{seconds:>9.3f}{ratio:>8.3f}{min(ratios):>9.3f}{max(ratios):>9.3f}{wall:>8.3f}"
            f"{theory[name]:>9.3f}{size:>10}{limit}"
        )
        result[name] = {"seconds": seconds, "ratio": ratio, "ratios": ratios, "wall": wall}
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    print("\n" + json.dumps({"benchmark": "trial_step", "machine": platform.machine(), **shown, **result}))


if __name__ == "__main__":
    main()
