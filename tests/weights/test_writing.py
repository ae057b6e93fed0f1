from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.writing import write_checkpoint


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.tensor(name) for name in checkpoint.names()}


def test_one_file_in_any_order(tiny_llama: Path, tmp_path: Path) -> None:
    source = Checkpoint(tiny_llama)
    tensors = tensors_of(source)
    written = write_checkpoint(tmp_path, reversed(tensors.items()), source.config, dtype="float32")
    assert written == [tmp_path / "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


def test_shards_reload_in_stock_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    source = Checkpoint(tiny_llama)
    written = write_checkpoint(
        tmp_path, tensors_of(source).items(), source.config, dtype="bfloat16", shard_bytes=40_000
    )
    assert len(written) > 3 and written[0].name == f"model-00001-of-{len(written):05d}.safetensors"
    largest = max(tensor.numel() * 2 for tensor in tensors_of(source).values())
    assert all(path.stat().st_size < max(40_000, largest) + 4_000 for path in written)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert stock.dtype == torch.bfloat16 and stock.num_parameters() == 95_664
    copy = Checkpoint(tmp_path)
    assert all(torch.equal(copy.tensor(n), t.bfloat16()) for n, t in tensors_of(source).items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * 95_664


def test_a_tied_head_is_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    assert "lm_head.weight" in model.state_dict()
    write_checkpoint(tmp_path, model.state_dict().items(), Checkpoint(tiny_llama).config, dtype="float32")
    assert "lm_head.weight" not in Checkpoint(tmp_path).names()


def test_writing_again_replaces_everything(tiny_llama: Path, tmp_path: Path) -> None:
    source = Checkpoint(tiny_llama)
    tensors = tensors_of(source)
    write_checkpoint(tmp_path, tensors.items(), source.config, dtype="float32", shard_bytes=40_000)
    write_checkpoint(tmp_path, tensors.items(), source.config, dtype="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("wrong", ["missing", "twice", "shape", "unknown"])
def test_not_the_planned_student(tiny_llama: Path, tmp_path: Path, wrong: str) -> None:
    source = Checkpoint(tiny_llama)
    tensors = list(tensors_of(source).items())
    name, tensor = tensors[3]
    change, message = {
        "missing": ([*tensors[:3], *tensors[4:]], rf"tensors were not given: {name} \(1 in all\)"),
        "twice": ([*tensors, tensors[3]], f"{name} is not a tensor of the config, or was given twice"),
        "shape": ([*tensors[:3], (name, tensor[:-1])], f"{name} has shape .*, the config implies"),
        "unknown": ([*tensors, ("extra", tensor)], "extra is not a tensor of the config"),
    }[wrong]
    with pytest.raises(RuntimeError, match=message):
        write_checkpoint(tmp_path, change, source.config, dtype="float32")
    assert list(tmp_path.iterdir()) == []
