"""The fixtures of conftest.py are what their docstrings say; everything else leans on them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_tiny_llama_loads_and_counts(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    assert sum(p.numel() for p in model.parameters()) == 95_664
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [f.name for f in tiny_llama.glob("*.safetensors")] == ["model.safetensors"]


def test_tiny_tokenizer_is_lossless_and_within_the_vocabulary(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = "Ein Löwe — 獅子 🦁\n\tfor 15 epochs"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.is_fast and len(tokenizer) == 256
    assert max(ids) < 256 and tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_tiny_text_is_sixty_kilobytes_of_text(tiny_text: Path) -> None:
    files = sorted(tiny_text.rglob("*.txt"))
    assert len(files) == 6 and sum(f.stat().st_size for f in files) == 60_000
    assert len({f.read_bytes() for f in files}) == 6
    assert all(f.read_text(encoding="utf-8").startswith("Chapter") for f in files)
