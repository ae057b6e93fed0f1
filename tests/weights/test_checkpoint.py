from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_ray.core.errors import ConfigError
from minitron_ray.models.architecture import Architecture
from minitron_ray.models.families import family_of
from minitron_ray.models.family import Family
from minitron_ray.weights.checkpoint import Checkpoint, torch_dtype

DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def table(checkpoint: Checkpoint) -> tuple[Family, Architecture]:
    family = family_of(checkpoint.config)
    return family, family.read(checkpoint.config)


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}, path)


def split(folder: Path) -> None:
    """The same weights in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"part-{number}.safetensors"
        save_file({name: tensors[name].clone() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_whole_checkpoint(tiny_llama: Path) -> None:
    checkpoint = Checkpoint(tiny_llama)
    family, arch = table(checkpoint)
    checkpoint.check(family, arch)
    expected = load_file(tiny_llama / "model.safetensors")
    assert sorted(checkpoint.names()) == sorted(expected)
    assert checkpoint.shape(DOWN) == (48, 96) and checkpoint.dtype(DOWN) == "float32"
    assert torch.equal(checkpoint.tensor(DOWN), expected[DOWN])


def test_shards_are_one_checkpoint(tiny_llama: Path, folder: Path) -> None:
    split(folder)
    sharded, single = Checkpoint(folder), Checkpoint(tiny_llama)
    sharded.check(*table(sharded))
    assert sharded.files == ("part-0.safetensors", "part-1.safetensors")
    assert all(torch.equal(sharded.tensor(name), single.tensor(name)) for name in single.names())


def test_writing_to_a_tensor_never_reaches_the_file(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    Checkpoint(folder).tensor(DOWN).fill_(7)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not torch.equal(Checkpoint(folder).tensor(DOWN), torch.full((48, 96), 7.0))


def test_pickles_as_its_folder(tiny_llama: Path) -> None:
    checkpoint = Checkpoint(tiny_llama)
    checkpoint.tensor(DOWN)
    data = pickle.dumps(checkpoint)
    assert len(data) < 1000
    assert torch.equal(pickle.loads(data).tensor(DOWN), checkpoint.tensor(DOWN))


def test_digest_is_of_the_content(tiny_llama: Path, folder: Path) -> None:
    digest = Checkpoint(tiny_llama).digest()
    assert len(digest) == 64 and Checkpoint(folder).digest() == digest
    rewrite(folder, {DOWN: torch.zeros(48, 96)})
    assert Checkpoint(folder).digest() != digest
    shutil.copy(tiny_llama / "model.safetensors", folder)
    config = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint(folder).digest() != digest


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder with a model"):
        Checkpoint(tmp_path / "absent").names()


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no weights: neither model\.safetensors nor"):
        Checkpoint(folder).names()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"only \.bin weights.*convert them to safetensors"):
        Checkpoint(folder).names()


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        _ = Checkpoint(folder).config
    (folder / "config.json").write_text("[")
    with pytest.raises(ConfigError, match="can't be read as JSON"):
        _ = Checkpoint(folder).config
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="is not a JSON object"):
        _ = Checkpoint(folder).config


@pytest.mark.parametrize("size", [0, 4, 100, 50_000, -1])
def test_truncated_weights(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConfigError, match=r"model\.safetensors is truncated or no safetensors file"):
        Checkpoint(folder).names()


def test_a_shard_that_is_missing(folder: Path) -> None:
    split(folder)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks part-1\.safetensors, named in .*incomplete"):
        Checkpoint(folder).names()


@pytest.mark.parametrize(
    ("index", "message"),
    [("{}", "has no weight_map"), ('{"weight_map": {"a": "../b.safetensors"}}', "outside its folder")],
)
def test_an_index_that_is_wrong(folder: Path, index: str, message: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match=message):
        Checkpoint(folder).names()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({DOWN: None}, f"the weights lack {DOWN}"),
        ({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, "unknown tensors .*q_norm.weight"),
        (
            {DOWN: torch.ones(48, 95)},
            r"down_proj.weight has shape \(48, 95\), config.json implies \(48, 96\)",
        ),
        ({DOWN: torch.ones(48, 96, dtype=torch.int8)}, "is stored as I8; give plain float weights"),
        ({"lm_head.weight": torch.ones(256, 48)}, "lm_head.weight differs from the embedding"),
        (
            {f"model.layers.{i}.mlp.up_proj.bias": torch.ones(96) for i in range(4)},
            "up_proj.bias and 1 more, which llama",
        ),
    ],
)
def test_tensors_that_are_not_the_familys(
    folder: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    rewrite(folder, change)
    checkpoint = Checkpoint(folder)
    with pytest.raises(ConfigError, match=message):
        checkpoint.check(*table(checkpoint))


def test_harmless_extra_tensors(folder: Path) -> None:
    embedding = Checkpoint(folder).tensor("model.embed_tokens.weight").clone()
    rewrite(
        folder,
        {"lm_head.weight": embedding, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    )
    checkpoint = Checkpoint(folder)
    checkpoint.check(*table(checkpoint))


def test_a_tensor_that_is_not_there(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"the weights lack model\.nothing"):
        Checkpoint(tiny_llama).tensor("model.nothing")


def test_dtypes_by_name() -> None:
    assert torch_dtype("bfloat16") is torch.bfloat16 and torch_dtype(torch.float32) is torch.float32
    for wrong in ("int8", "nn", torch.int64):
        with pytest.raises(ValueError, match="no type of weights; choose from float32"):
            torch_dtype(wrong)
