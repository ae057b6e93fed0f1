"""The same bits as cutting tensor by tensor in memory, in any slices; values that are no numbers by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_ray.core.errors import ConfigError
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.families import family_of
from minitron_ray.models.family import Family
from minitron_ray.models.kept import Kept
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.slicing import all_finite, cut_slices
from minitron_ray.weights.surgery import cut
from minitron_ray.weights.writing import layout

MERGED = {
    "kv_heads": (((0, 1), (2,)),) * 3,
    "heads": ((0, 2, 4, 5),) * 3,
    "merged_heads": ((((0, 2.0), (1, -1.0)), ((2, 1.0),), ((4, 0.5), (5, 0.5)), ((5, 1.0),)),) * 3,
}


def parts(folder: Path) -> tuple[Checkpoint, Family, Architecture]:
    source = Checkpoint(folder)
    family = family_of(source.config)
    return source, family, family.read(source.config)


def kept_units(**changed: object) -> Kept:
    source = np.random.default_rng(1)

    def some(size: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(source.permutation(size)[:count].tolist()))

    units = {
        "layers": (0, 2, 3),
        "hidden": some(48, 36),
        "heads": ((1, 2, 5),) * 3,
        "mlp": tuple(some(96, 40) for _ in range(3)),
    }
    return Kept(**(units | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("slice_bytes", [1, 1000, 2**30])
@pytest.mark.parametrize("changed", [{}, MERGED], ids=["plain", "merged"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slices_put_together_are_the_cut(
    tiny_llama: Path, slice_bytes: int, changed: dict[str, object], dtype: str
) -> None:
    source, family, teacher = parts(tiny_llama)
    kept = kept_units(**changed)
    expected = cut(load_file(tiny_llama / "model.safetensors"), family, teacher, kept, dtype=dtype)
    found: dict[str, list[torch.Tensor]] = {}
    for one in cut_slices(source, family, teacher, kept, dtype=dtype, slice_bytes=slice_bytes):
        assert one.first == sum(len(part) for part in found.get(one.name, []))
        found.setdefault(one.name, []).append(one.values)
    assert list(found) == list(expected)
    assert all(torch.equal(torch.cat(found[name]), expected[name]) for name in expected)
    assert max(len(rows) for rows in found.values()) > 1 or slice_bytes == 2**30


def test_only_the_tensors_asked_for(tiny_llama: Path) -> None:
    source, family, teacher = parts(tiny_llama)
    wanted = {"model.norm.weight", "model.layers.2.mlp.up_proj.weight"}
    slices = cut_slices(source, family, teacher, kept_units(), dtype="float32", only=wanted)
    assert {one.name for one in slices} == wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_all_finite_agrees_with_torch(dtype: torch.dtype) -> None:
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    for value in (0.0, -0.0, 1.5, largest, -largest, smallest, float("inf"), float("-inf"), float("nan")):
        for sign in (1, -1):
            values = torch.tensor([[0.25, sign * value], [-1.0, 0.0]], dtype=torch.float64).to(dtype)
            assert all_finite(values) == bool(torch.isfinite(values).all()), (value, sign)


@pytest.mark.parametrize(
    ("name", "value", "dtype", "message"),
    [
        (
            "model.layers.2.mlp.up_proj.weight",
            float("nan"),
            "float32",
            r"up_proj.weight holds nan at \[\d+, 3\]",
        ),
        (
            "model.embed_tokens.weight",
            float("-inf"),
            "bfloat16",
            r"embed_tokens.weight holds -inf at \[\d+, 3\]",
        ),
        (
            "model.layers.0.self_attn.q_proj.weight",
            1e6,
            "float16",
            r"q_proj.weight reaches 1e\+06, .* float16",
        ),
    ],
)
def test_values_that_cannot_be_kept(
    tiny_llama: Path, tmp_path: Path, name: str, value: float, dtype: str, message: str
) -> None:
    tensors = load_file(tiny_llama / "model.safetensors")
    tensors[name][:, 3] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    source, family, teacher = parts(tmp_path)
    kept = kept_units(hidden=tuple(range(36)))
    with pytest.raises(ConfigError, match=message):
        for _ in cut_slices(source, family, teacher, kept, dtype=dtype):
            pass


def sparse_llama(folder: Path, vocabulary: int) -> None:
    """A Llama whose embedding and head are larger than the bound below, as a file with a hole: its weights are
    zeros, which take neither disk nor time to write, but all the memory of others when they are read."""
    config = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 1024,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    family = family_of(config)
    (shard,) = layout(family.shapes(family.read(config)), "bfloat16", 2, 2**40)
    folder.mkdir()
    with (folder / shard.file).open("wb") as file:
        file.write(shard.header)
        file.truncate(len(shard.header) + shard.size)
    (folder / "config.json").write_text(json.dumps(config))


CHILD = """
import sys, threading, time
from pathlib import Path
def anonymous():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
import minitron_ray.pruning.job, minitron_ray.weights.slicing, torch
torch.zeros(1) + 1
from minitron_ray.cli import main
before, largest, running = anonymous(), 0, True
def watch():
    global largest
    while running:
        largest = max(largest, anonymous())
        time.sleep(0.01)
watcher = threading.Thread(target=watch); watcher.start()
try:
    main(sys.argv[1:], standalone_mode=False)
finally:
    running = False; watcher.join()
print("grown", largest - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    sparse_llama(tmp_path / "teacher", vocabulary=300_000)
    assert (tmp_path / "teacher/model.safetensors").stat().st_size > 1_200 * 10**6
    command = [sys.executable, "-c", CHILD, "prune", str(tmp_path / "teacher"), "--to", "hidden=768,heads=6"]
    command += ["--importance", "random", "--out", str(tmp_path / "out"), "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split()[-1]) * 1024
    assert grown < 300 * 10**6, f"{grown:,} bytes for tensors of 614 MB"
