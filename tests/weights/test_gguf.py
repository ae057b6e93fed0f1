"""A GGUF file becomes the model folder it was made of; what it can't become is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_ray.core.errors import ConfigError
from minitron_ray.data.tokenizer import load_tokenizer
from minitron_ray.models.families import family_of
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.gguf import convert_gguf
from tests.weights.tiny_gguf import write_gguf

SHA = "0" * 64
IDS = torch.arange(40)[None] * 5 % 256


@pytest.fixture(scope="module")
def converted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    convert_gguf(write_gguf(tiny_llama, folder / "tiny.gguf"), folder / "model", SHA)
    return folder / "model"


def test_the_same_network_bit_by_bit(tiny_llama: Path, converted: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(converted)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, original(IDS).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_config_is_clean_and_the_weights_are_the_family_s(tiny_llama: Path, converted: Path) -> None:
    checkpoint = Checkpoint(converted)
    family = family_of(checkpoint.config)
    arch = family.read(checkpoint.config)
    checkpoint.check(family, arch)
    assert arch == family.read(Checkpoint(tiny_llama).config)
    assert checkpoint.config["rms_norm_eps"] == 1e-6  # not the float32's 9.999999974752427e-07
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.dtype("model.norm.weight") == "float32"


def test_digits_are_split_and_documents_end_with_the_right_token(converted: Path, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    steps = json.loads((converted / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    assert [step["type"] for step in steps] == ["Digits", "ByteLevel"]
    assert tokenizer.tokenize("12 345") == ["1", "2", "Ġ", "3", "4", "5"]
    text = "The model keeps a head. " * 5
    assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(tiny_llama).encode(text)
    assert tokenizer.eos_token_id == 255 and load_tokenizer(converted).separator == 0
    assert json.loads((converted / "source.json").read_text())["sha256"] == SHA


def test_numbers_stay_whole_where_the_file_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    convert_gguf(write_gguf(tiny_llama, tmp_path / "tiny.gguf", pre="gpt-2"), tmp_path / "model", SHA)
    steps = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["pre_tokenizer"]
    assert "Digits" not in json.dumps(steps)


def test_quantised_weights_come_back_close(
    tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    convert_gguf(write_gguf(tiny_llama, tmp_path / "q.gguf", quantized=True), tmp_path / "model", SHA)
    name = "model.layers.1.mlp.down_proj.weight"
    exact, found = Checkpoint(tiny_llama).tensor(name), Checkpoint(tmp_path / "model").tensor(name)
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0, atol=float(exact.abs().max()) / 127)
    assert capfd.readouterr() == ("", "")


def test_a_head_of_its_own_and_one_stored_twice(tiny_llama: Path, tmp_path: Path) -> None:
    embedding = Checkpoint(tiny_llama).tensor("model.embed_tokens.weight").numpy()
    for name, head, tied in (("own", embedding[::-1].copy(), False), ("twice", embedding, True)):
        file = write_gguf(tiny_llama, tmp_path / f"{name}.gguf", tensors={"output.weight": head})
        convert_gguf(file, tmp_path / name, SHA)
        checkpoint = Checkpoint(tmp_path / name)
        assert checkpoint.config["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in checkpoint.names()) is not tied
    assert np.array_equal(Checkpoint(tmp_path / "own").tensor("lm_head.weight").numpy(), embedding[::-1])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"architecture": "qwen2"}, "x.gguf is a 'qwen2' model; GGUF is read for 'llama' only"),
        ({"pre": "made-up"}, "names the pre-tokenizer 'made-up'; known are default, gpt-2, .*smollm"),
        ({"extra": {"llama.rope.scaling.type": "linear"}}, r"sets llama\.rope\.scaling\.type = 'linear'"),
        (
            {"extra": {"llama.expert_count": 8}},
            r"sets llama\.expert_count = 8, which this conversion would lose",
        ),
        ({"tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, "unknown tensors rope_freqs.weight"),
        ({"without": "blk.2.attn_k.weight"}, "x.gguf lacks the tensors blk.2.attn_k.weight"),
        ({"without": "token_embd.weight"}, "x.gguf lacks the tensor token_embd.weight"),
    ],
)
def test_what_would_not_be_the_same_model_is_refused(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    file = write_gguf(tiny_llama, tmp_path / "x.gguf", **changes)
    with pytest.raises(ConfigError, match=problem):
        convert_gguf(file, tmp_path / "model", SHA)
    assert not list((tmp_path / "model").glob("*.safetensors"))


def test_features_that_are_switched_off_are_no_reason(tiny_llama: Path, tmp_path: Path) -> None:
    extra = {"llama.expert_count": 0, "llama.rope.scaling.type": "none"}
    convert_gguf(write_gguf(tiny_llama, tmp_path / "x.gguf", extra=extra), tmp_path / "model", SHA)
    assert (tmp_path / "model" / "config.json").is_file()


def test_a_size_that_contradicts_the_tensors(tiny_llama: Path, tmp_path: Path) -> None:
    wrong = {"llama.attention.key_length": 16}
    file = write_gguf(tiny_llama, tmp_path / "x.gguf", extra=wrong)
    with pytest.raises(ConfigError, match=r"x\.gguf is inconsistent: .*k_proj\.weight has shape \(24, 48\)"):
        convert_gguf(file, tmp_path / "model", SHA)
    assert not (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize("keep", [0, 3, 200, 6_000, 100_000])
def test_damaged_files(tiny_llama: Path, tmp_path: Path, keep: int) -> None:
    file = write_gguf(tiny_llama, tmp_path / "x.gguf")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"x\.gguf can't be read as GGUF \(.*\); it is damaged") as caught:
        convert_gguf(file, tmp_path / "model", SHA)
    assert "\n" not in caught.value.message
