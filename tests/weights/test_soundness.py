"""Weights that are no numbers are found where the digest is made, by file, tensor and place."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_ray.core.errors import ConfigError
from minitron_ray.models.families import family_of
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.soundness import sound_digest
from tests.contracts.networks import Case

DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture(params=[64, 2**20], ids=["many-blocks", "one-block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron_ray.weights.soundness._BLOCK", request.param)


def rewrite(folder: Path, dtype: torch.dtype, change: dict[str, torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in {**load_file(path), **change}.items()}
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.usefixtures("block")
def test_it_is_the_digest_of_sound_weights(tiny_llama: Path, folder: Path) -> None:
    assert sound_digest(Checkpoint(tiny_llama)) == Checkpoint(tiny_llama).digest()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"part-{number % 3}.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert sound_digest(Checkpoint(folder)) == Checkpoint(folder).digest() != Checkpoint(tiny_llama).digest()


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_value_that_is_no_number_is_named(folder: Path, dtype: torch.dtype, value: float) -> None:
    for place in ((0, 0), (11, 7), (47, 95)):
        weight = torch.zeros(48, 96)
        weight[place], weight[47, 95] = value, value
        rewrite(folder, dtype, {DOWN: weight})
        found = rf"model\.safetensors: {re.escape(DOWN)} holds {value} at \[{place[0]}, {place[1]}\]"
        with pytest.raises(ConfigError, match=found):
            sound_digest(Checkpoint(folder))
    rewrite(folder, dtype, {DOWN: torch.full((48, 96), torch.finfo(dtype).max, dtype=dtype)})
    assert sound_digest(Checkpoint(folder)) == Checkpoint(folder).digest()


def test_values_too_large_for_float16(folder: Path) -> None:
    rewrite(folder, torch.float16, {DOWN: torch.full((48, 96), -70_000.0)})
    with pytest.raises(ConfigError, match=r"holds -inf at \[0, 0\].*at most 65504.*to bfloat16 or float32"):
        sound_digest(Checkpoint(folder))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_masks_may_hold_infinity(name: str, tmp_path: Path) -> None:
    case = Case.of(name)
    ending = next(ending for ending in case.family.ignored_tensors if "masked_bias" in ending)
    mask = {f"{case.family.decoder_layers}.0{ending}": torch.tensor(float("-inf"))}
    save_file({**case.weights, **mask}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check(case.family, case.arch)
    assert sound_digest(checkpoint) == checkpoint.digest()


def test_a_file_that_got_shorter(folder: Path) -> None:
    checkpoint, path = Checkpoint(folder), folder / "model.safetensors"
    checkpoint.names()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"model\.safetensors is truncated; fetch it again"):
        sound_digest(checkpoint)


def test_a_tied_copy_of_a_broken_embedding_is_still_a_copy(folder: Path) -> None:
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    embedding[5, 5] = float("nan")
    rewrite(
        folder, torch.float32, {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    )
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config)
    checkpoint.check(family, family.read(checkpoint.config))
    with pytest.raises(ConfigError, match=r"holds nan at \[5, 5\]"):
        sound_digest(checkpoint)
