"""What stands in for models and text: real where it can be had, and said where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_ray.core.errors import ConfigError
from minitron_ray.data.sources.files import Files
from minitron_ray.data.sources.mixture import Mixture
from minitron_ray.data.sources.tokens import Tokens
from minitron_ray.data.tokenizer import load_tokenizer
from minitron_ray.data.tokens import build_tokens
from minitron_ray.experiment import Teacher
from minitron_ray.models.families import family_of
from minitron_ray.plan.miniature import small_config
from minitron_ray.results.cache import Cache
from minitron_ray.stages.stand_ins import BYTES, Sampler, byte_tokenizer, look_at_model, random_model
from minitron_ray.weights.checkpoint import Checkpoint
from minitron_ray.weights.model import build


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "results" / ".rehearsal")


def sampler(base: Path, cache: Cache, vocabulary: int | None = None) -> Sampler:
    return Sampler(
        base=base,
        real=Cache(cache.folder.parent.parent),
        cache=cache,
        rows=20,
        length=16,
        vocabulary=vocabulary,
    )


def test_a_model_at_hand_gives_its_config_and_tokenizer(tiny_llama: Path, cache: Cache) -> None:
    found = look_at_model(Teacher(path=str(tiny_llama)), "teacher", Path("/"), cache)
    assert found.problem is None and found.folder == tiny_llama
    assert found.config == json.loads((tiny_llama / "config.json").read_text())


def test_of_a_model_that_is_not_there_its_config_is_taken(
    tiny_llama: Path, tmp_path: Path, cache: Cache
) -> None:
    config = str(tiny_llama / "config.json")
    found = look_at_model(Teacher(path="./nothing", config=config), "teacher", tmp_path, cache)
    assert found.folder is None and found.config is not None
    assert found.problem is not None and "no such folder" in found.problem and "teacher.path" in found.problem
    assert look_at_model(Teacher(path="./nothing"), "teacher", tmp_path, cache).config is None


def test_a_model_without_a_tensor_is_a_problem(tiny_llama: Path, tmp_path: Path, cache: Cache) -> None:
    for path in tiny_llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    found = look_at_model(Teacher(path=str(tmp_path)), "teacher", tmp_path, cache)
    assert found.problem is not None and "the weights lack" in found.problem


def test_a_config_of_another_network_is_refused_as_in_a_run(tiny_llama: Path, cache: Cache) -> None:
    config = json.loads((tiny_llama / "config.json").read_text()) | {"num_hidden_layers": 9}
    with pytest.raises(ConfigError, match=r"teacher\.config describes .*layers=9"):
        look_at_model(Teacher(path=str(tiny_llama), config=config), "teacher", Path("/"), cache)


def test_random_models_are_whole_the_same_each_time_and_others_by_seed(
    tiny_llama: Path, tmp_path: Path, cache: Cache
) -> None:
    written = json.loads((tiny_llama / "config.json").read_text())
    config = small_config(family_of(written), written, 1, BYTES)
    folders = [
        random_model(config, None, seed, Cache(tmp_path / name))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    one, again, other = (Checkpoint(folder) for folder in folders)
    family = family_of(one.config)
    one.check(family, family.read(one.config))
    assert one.digest() == again.digest() != other.digest()
    logits = build(one.config, one)(torch.tensor([[1, 2, BYTES.end]])).logits
    assert logits.shape == (1, 3, BYTES.size) and torch.isfinite(logits).all()
    assert load_tokenizer(folders[0]).separator == BYTES.end


def test_bytes_are_tokens(cache: Cache) -> None:
    tokenizer = load_tokenizer(byte_tokenizer(cache))
    text = "naïve – 漢"
    [ids] = tokenizer.encode([text])
    assert len(ids) == len(text.encode()) + 1 and ids[-1] == BYTES.end and ids.max() < BYTES.size
    assert tokenizer.backend.decode(ids[:-1].tolist()) == text


def test_a_little_of_the_text_is_read_and_no_more(tmp_path: Path, cache: Cache) -> None:
    lines = [json.dumps({"text": f"document {n} " + "x" * 2000}) for n in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join([*lines, "{ not json"]))
    found = sampler(tmp_path, cache).look_at(Files(path="./t.jsonl"))
    assert not found.problems and isinstance(found.source, Files)
    kept = [document.text for document in found.source.documents(tmp_path, cache)]
    assert kept[0] == f"document 0 {'x' * 2000}" and sum(map(len, kept)) == 20 * 16 * 8
    store = build_tokens(found.source, byte_tokenizer(cache), sequence_length=16, base=tmp_path, cache=cache)
    assert len(store) >= 20


def test_a_short_text_is_read_over_again(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "t.txt").write_text("short")
    found = sampler(tmp_path, cache).look_at(Files(path="./t.txt"))
    texts = [document.text for document in found.source.documents(tmp_path, cache)]  # type: ignore[attr-defined]
    assert set(texts) == {"short"} and len(texts) * 5 >= 20 * 16 * 8 and not found.problems


def test_text_that_cannot_be_read_is_made_up_and_said(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"body": "x"}))
    for path, reason in (("./nothing/**/*.parquet", "no file fits"), ("./t.jsonl", "text")):
        found = sampler(tmp_path, cache).look_at(Files(path=path))
        [problem] = found.problems
        assert problem.startswith("data.source: ") and reason in problem
        store = build_tokens(
            found.source, byte_tokenizer(cache), sequence_length=16, base=tmp_path, cache=cache
        )
        assert len(store) >= 20


def test_tokens_are_taken_in_order_and_fit_the_vocabulary(tmp_path: Path, cache: Cache) -> None:
    np.save(tmp_path / "t.npy", np.arange(64 * 8).reshape(8, 64))
    found = sampler(tmp_path, cache, vocabulary=BYTES.end).look_at(Tokens(path="./t.npy"))
    rows = np.stack(list(found.source.sequences(tmp_path, cache)))  # type: ignore[attr-defined]
    assert not found.problems and (rows == (np.arange(320) % 256).reshape(20, 16)).all()
    real = sampler(tmp_path, cache).look_at(Tokens(path="./t.npy"))
    assert np.stack(list(real.source.sequences(tmp_path, cache))).max() == 319  # type: ignore[attr-defined]


def test_of_a_mixture_each_part_is_looked_at(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "t.txt").write_text("here " * 100)
    parts = [
        {"weight": 3.0, "source": {"kind": "files", "path": "./t.txt"}},
        {"weight": 1.0, "source": {"kind": "files", "path": "./gone.txt"}},
    ]
    found = sampler(tmp_path, cache).look_at(Mixture.model_validate({"parts": parts}))
    [problem] = found.problems
    assert problem.startswith("data.source.parts[1].source: no such file")
    assert isinstance(found.source, Mixture) and found.source.weights == (0.75, 0.25)
