from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from minitron_ray.core.errors import ConfigError
from minitron_ray.models.families import family_of
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.model import build, initialized, skeleton

IDS = torch.arange(20)[None] % 11


def test_is_the_stock_model(tiny_llama: Path) -> None:
    checkpoint = Checkpoint(tiny_llama)
    model = build(checkpoint.config, checkpoint)
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, stock(IDS).logits)
    assert model.config._attn_implementation == "sdpa"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.device.type for p in model.parameters()} == {b.device.type for b in model.buffers()} == {"cpu"}


def test_weights_of_the_right_type_are_not_copied(tiny_llama: Path) -> None:
    checkpoint = Checkpoint(tiny_llama)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    model = build(checkpoint.config, tensors)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == tensors[name].data_ptr()


def test_random_weights_follow_the_seed_and_leave_the_callers_numbers_alone(tiny_llama: Path) -> None:
    config = Checkpoint(tiny_llama).config
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one, same, other = (initialized(config, seed=seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    model = initialized(config, seed=7)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_conversion(tiny_llama: Path) -> None:
    checkpoint = Checkpoint(tiny_llama)
    model = build(checkpoint.config, checkpoint, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_trains_without_touching_the_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    before = (folder / "model.safetensors").read_bytes()
    model = build(Checkpoint(folder).config, Checkpoint(folder), trainable=True)
    assert model.training and all(p.requires_grad for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model(IDS, labels=IDS).loss
    first.backward()
    optimizer.step()
    assert model(IDS, labels=IDS).loss < first
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_checkpoint_that_is_not_the_configs(tiny_llama: Path) -> None:
    checkpoint = Checkpoint(tiny_llama)
    with pytest.raises(ConfigError, match=r"has shape \(96, 48\), config.json implies \(80, 48\)"):
        build({**checkpoint.config, "intermediate_size": 80}, checkpoint)


def test_a_table_that_is_not_the_models(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tiny_llama)
    family = family_of(checkpoint.config)
    short = tuple(row for row in family.tensors if "up_proj" not in row.name)
    monkeypatch.setitem(vars(family), "tensors", short)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    with pytest.raises(RuntimeError, match=r"disagree: missing \['model\.layers\.0\.mlp\.up_proj\.weight'"):
        build(checkpoint.config, tensors)


def test_a_count_that_is_not_the_planned_one(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tiny_llama)
    family = family_of(checkpoint.config)
    monkeypatch.setitem(vars(family), "parameters", lambda arch: 95_663)
    with pytest.raises(RuntimeError, match="the built model has 95,664 parameters, planned were 95,663"):
        build(checkpoint.config, checkpoint)


def test_skeleton_takes_no_memory(tiny_llama: Path) -> None:
    model = skeleton(Checkpoint(tiny_llama).config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == 95_664
