"""A distillation step here and in the trainers that others use, the same job for all, in turns.

Each peer runs in an environment of its own, which this script builds with pip: the packages of this
environment (one build of torch for all), and over them what the peer asks for. The job is forward KL
over the whole vocabulary from a running teacher, the same student, sequences, optimizer and micro-batches;
losses are compared at every step, and a peer whose losses differ by more than 1 % is marked.
Here the job is also done from stored final hidden states (`cached`), as in a search.

All processes stay alive and make one optimizer step each a round, in changing order; nothing but the step
whose turn it is runs. Printed are the medians of the rounds' ratios to the fastest peer, by processor and
by wall time, and the memory above the weights: the peak less imports and both models' weights (gradients,
optimizer state, activations and logits remain).

    python benchmarks/peers.py --scale tiny --rounds 5
    python benchmarks/peers.py --folder DIR                    # 88M, kept environments in DIR
    python benchmarks/peers.py --scale 400m --device cuda --dtype bfloat16 --folder DIR
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any, Final

import numpy as np
from small_models import llama
from turns import MIB, Child, take_turns

from minitron_ray.weights.model import initialized

HERE: Final = Path(__file__).parent
PEERS: Final = {
    "huggingface": ("a Trainer with F.kl_div", ["transformers", "accelerate", "datasets"]),
    "trl": ("TRL's GKDTrainer", ["trl==1.16.0"]),
    "modelopt": ("ModelOpt's KDTrainer", ["nvidia-modelopt[hf]==0.47.0"]),
    "distillkit": (
        "DistillKit",
        ["git+https://github.com/arcee-ai/DistillKit@a61c2e7d25c2e990d45832e12bd8542bdee9c810"],
    ),
}
"""What each is, and what pip is asked for."""
OURS: Final = ("online", "cached")
LIMITS: Final = {"online": (0.95, 0.65), "cached": (0.80, None)}
"""At most so much of the fastest peer's time, and of its memory above the weights."""
SCALES: Final[dict[str, dict[str, Any]]] = {
    "tiny": {
        "teacher": {"layers": 2, "hidden": 64, "heads": 4, "mlp": 128},
        "student": {"layers": 2, "hidden": 32, "heads": 4, "mlp": 64},
        "vocabulary": 512,
        "batch": 4,
        "length": 64,
    },
    "88m": {
        "teacher": {"layers": 12, "hidden": 512, "heads": 8, "mlp": 1536},
        "student": {"layers": 12, "hidden": 352, "heads": 8, "mlp": 1024},
        "vocabulary": 49152,
        "batch": 4,
        "length": 256,
    },
    "400m": {
        "teacher": {"layers": 24, "hidden": 1024, "heads": 16, "mlp": 4096},
        "student": {"layers": 24, "hidden": 768, "heads": 16, "mlp": 2560},
        "vocabulary": 49152,
        "batch": 16,
        "length": 1024,
    },
}


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        environments = (options.folder or folder) / "environments"
        job = _job(folder, options)
        file = folder / "job.json"
        file.write_text(json.dumps(job))
        subprocess.run([sys.executable, HERE / "peer_ours.py", "store", file], check=True)
        children: dict[str, Child] = {}
        missing: dict[str, str] = {}
        for name in options.only:
            python, why = _python(environments, name)
            if why:
                missing[name] = f"not installed: {why}"
                continue
            script = "peer_ours.py" if name in OURS else "peer_trainers.py"
            threads = str(options.threads)
            quiet = {
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_OFFLINE": "1",
                "WANDB_DISABLED": "true",
                "TOKENIZERS_PARALLELISM": "false",
            }
            print(f"starting {name}", file=sys.stderr, flush=True)
            children[name] = Child([python, HERE / script, name, file], quiet, folder / f"{name}.log")
        try:
            take_turns(children, options.rounds)
        finally:
            for child in children.values():
                child.close()
        missing |= {name: f"failed: {child.failed}" for name, child in children.items() if child.failed}
        _report({name: child for name, child in children.items() if not child.failed}, missing, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [*OURS, *PEERS]
    parser.add_argument("--scale", choices=tuple(SCALES), default="88m")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="take part, of all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--micro-batch", type=int, help="sequences a pass; else the whole batch")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keeps the environments; else they are built anew")
    options = parser.parse_args()
    if options.folder is not None:
        options.folder = options.folder.resolve()
        options.folder.mkdir(parents=True, exist_ok=True)
    return options


def _job(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Writes both models, with random weights, and the sequences."""
    scale = SCALES[options.scale]
    shared = {"vocabulary": scale["vocabulary"], "length": max(2048, scale["length"])}
    for seed, name in enumerate(("teacher", "student")):
        config = {**llama(**scale[name], **shared), "tie_word_embeddings": False}
        model = initialized(config, seed=seed)
        model.get_output_embeddings().weight.data.mul_(4)  # else both predict next to nothing
        model.save_pretrained(folder / name)
    _write_tokenizer(folder / "student")
    steps = options.rounds + 1
    shape = (steps * scale["batch"], scale["length"])
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(1, scale["vocabulary"], shape))
    return {
        "folder": str(folder),
        "teacher": str(folder / "teacher"),
        "student": str(folder / "student"),
        "tokens": str(folder / "tokens.npy"),
        "signal": str(folder / "signal"),
        "batch": scale["batch"],
        "micro_batch": options.micro_batch or scale["batch"],
        "length": scale["length"],
        "steps": steps,
        "rate": 1e-3,
        "dtype": options.dtype,
        "device": options.device,
        "threads": options.threads,
    }


def _write_tokenizer(folder: Path) -> None:
    """Peers ask for one; the sequences are made of numbers, so it is never used."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<|end|>": 0}))
    names = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|end|>")
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


def _python(folder: Path, name: str) -> tuple[Path, str]:
    """The interpreter that runs `name`, and why there is none, or nothing."""
    if name in OURS:
        return Path(sys.executable), ""
    asked = PEERS[name][1]
    here = sysconfig.get_path("purelib")
    mark = hashlib.sha256(json.dumps([asked, here, sys.version]).encode()).hexdigest()[:12]
    place = folder / f"{name}-{mark}"
    python, done = place / "bin" / "python", place / "done"
    if done.exists():
        return python, ""
    print(f"building an environment for {name}: {' '.join(asked)}", file=sys.stderr, flush=True)
    venv.create(place, with_pip=True, clear=True)
    own = next(place.glob("lib/python*/site-packages"))
    (own / "below.pth").write_text(f"{here}\n")  # behind its own packages
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *asked]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
    )
    if result.returncode:
        lines = [line.strip() for line in result.stderr.splitlines()]
        told = [line for line in lines if "fatal:" in line] or [
            line for line in lines if "error" in line.lower()
        ]
        return python, told[0] if told else f"pip ended with {result.returncode}"
    done.touch()
    return python, ""


def _report(children: dict[str, Child], missing: dict[str, str], options: argparse.Namespace) -> None:
    load = os.getloadavg()[0]
    if load > 1.5 + options.threads:
        print(f"load average {load:.1f}: not a quiet machine", file=sys.stderr)
    for name, why in missing.items():
        print(f"{name}: {why}")
    rows = {
        name: {
            "processor": [step.processor for step in child.steps],
            "wall": [step.wall for step in child.steps],
            "losses": [step.loss for step in child.steps],
            "above": max(step.above for step in child.steps),
            **child.about,
        }
        for name, child in children.items()
    }
    clock = "processor" if options.device == "cpu" else "wall"
    peers = {name: statistics.median(row[clock]) for name, row in rows.items() if name in PEERS}
    fastest = min(peers, key=lambda name: peers[name]) if peers else next(iter(rows))
    _table(rows, fastest, clock)
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    result = {"benchmark": "peers", "machine": platform.machine(), "load": load, "fastest": fastest}
    print("\n" + json.dumps({**result, **shown, "missing": missing, "rows": rows}))


def _table(rows: dict[str, dict[str, Any]], fastest: str, clock: str) -> None:
    best = rows[fastest]
    print(f"ratios to {fastest}, the fastest peer by {clock} time")
    heads = f"{'processor s':>12}{'ratio':>8}{'lowest':>8}{'highest':>9}{'wall s':>9}{'ratio':>8}"
    print(f"{'':<13}{heads}{'MiB above':>11}{'ratio':>8}{'last loss':>11}")
    for name, row in rows.items():
        line = f"{name:<13}"
        for each in ("processor", "wall"):
            ratios = [own / other for own, other in zip(row[each], best[each], strict=True)]
            decimals = 4 if statistics.median(row[each]) < 0.1 else 2
            seconds = f"{statistics.median(row[each]):.{decimals}f}"
            if each == "processor":
                line += (
                    f"{seconds:>12}{statistics.median(ratios):>8.3f}{min(ratios):>8.3f}{max(ratios):>9.3f}"
                )
            else:
                line += f"{seconds:>9}{statistics.median(ratios):>8.3f}"
        line += f"{row['above'] / MIB:>11.0f}{row['above'] / best['above']:>8.3f}{row['losses'][-1]:>11.5f}"
        off = max(abs(own - other) / other for own, other in zip(row["losses"], best["losses"], strict=True))
        if off > 0.01:
            line += f"  losses differ by {off:.1%}: not the same job"
        if name in LIMITS:
            limits = [f"{limit}" for limit in LIMITS[name] if limit is not None]
            line += f"  (at most {', '.join(limits)})"
        print(line)
    for name, row in rows.items():
        told = PEERS[name][0] if name in PEERS else "this program"
        print(f"  {name}: {told}; {row['versions']}")


if __name__ == "__main__":
    main()
