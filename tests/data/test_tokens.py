"""The token store: packed as said, read back exactly, built once, and keyed by what it depends on."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from minitron_ray.core.errors import ConfigError
from minitron_ray.data.sources.files import Files
from minitron_ray.data.sources.tokens import Tokens
from minitron_ray.data.tokenizer import load_tokenizer, tokenizer_digest
from minitron_ray.data.tokens import TokenStore, build_tokens
from minitron_ray.results.cache import Cache


def _build(tiny_text: Path, model: Path, cache: Cache, **changes: object) -> TokenStore:
    options: dict = {"sequence_length": 32, "base": tiny_text.parent, "cache": cache, **changes}
    return build_tokens(Files(path=str(tiny_text)), model, **options)


def test_documents_end_with_eos_and_are_cut_without_a_gap(
    tiny_text: Path, tiny_llama: Path, cache: Cache, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    store = _build(tiny_text, tiny_llama, cache, progress=seen.append)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    documents = Files(path=str(tiny_text)).documents(Path(), cache)
    stream = [
        token
        for document in documents
        for token in [*tokenizer.encode(document.text, add_special_tokens=False), tokenizer.eos_token_id]
    ]
    whole = len(stream) // 32
    assert len(store) == whole > 500
    assert store.sequences(range(whole)).ravel().tolist() == stream[: whole * 32]
    assert store.counts == {
        "documents": 6,
        "sequences": whole,
        "tokens": whole * 32,
        "dropped": len(stream) % 32,
    }
    assert seen[-1] == whole
    assert capfd.readouterr() == ("", "")


def test_a_second_build_and_a_worker_find_the_same_file(
    tiny_text: Path, tiny_llama: Path, cache: Cache
) -> None:
    store = _build(tiny_text, tiny_llama, cache)
    written = (store.folder / "tokens.arrow").stat().st_mtime_ns
    time.sleep(0.01)
    again = _build(tiny_text, tiny_llama, cache)
    assert again.digest == store.digest and (again.folder / "tokens.arrow").stat().st_mtime_ns == written
    copy = pickle.loads(pickle.dumps(store))
    indices = np.array([5, 0, len(store) - 1, 5])
    assert np.array_equal(copy.sequences(indices), store.sequences(indices))
    assert store.sequences(indices).dtype == np.int64 and store.sequences([]).shape == (0, 32)


def test_the_digest_follows_what_decides_the_tokens(
    tiny_text: Path, tiny_llama: Path, cache: Cache, tmp_path: Path
) -> None:
    text, model = tmp_path / "text", tmp_path / "model"
    shutil.copytree(tiny_text, text)
    shutil.copytree(tiny_llama, model)
    base = _build(tiny_text, tiny_llama, cache).digest
    assert _build(text, model, cache).digest == base  # not the place
    assert _build(text, model, cache, sequence_length=16).digest != base
    assert _build(text, model, cache, limit_sequences=10).digest != base
    (model / "source.json").write_text(json.dumps({"document_separator": 7}))
    separated = _build(text, model, cache)
    assert separated.digest != base
    assert (separated.sequences(range(len(separated))) == 7).sum() >= 5
    (text / "intro.txt").write_text("Another text.")
    assert _build(text, model, cache).digest not in (base, separated.digest)


def test_a_limit_gives_the_beginning(tiny_text: Path, tiny_llama: Path, cache: Cache) -> None:
    whole, some = (
        _build(tiny_text, tiny_llama, cache),
        _build(tiny_text, tiny_llama, cache, limit_sequences=10),
    )
    assert len(some) == 10 and np.array_equal(some.sequences(range(10)), whole.sequences(range(10)))
    assert some.counts["tokens"] == 320 and some.counts["dropped"] > 0


def test_indices_that_are_not_there(tiny_text: Path, tiny_llama: Path, cache: Cache) -> None:
    store = _build(tiny_text, tiny_llama, cache, limit_sequences=10)
    for bad in ([10], [-1], [0, 99]):
        with pytest.raises(IndexError, match="of a store of 10"):
            store.sequences(bad)


def test_too_little_text(tiny_llama: Path, cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Short.")
    with pytest.raises(
        ConfigError, match="the text gives 0 sequences of 32 tokens, 1 are needed; add text, or lower"
    ):
        build_tokens(Files(path="a.txt"), tiny_llama, sequence_length=32, base=tmp_path, cache=cache)


def test_a_failed_build_leaves_nothing(tiny_llama: Path, cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Fine. " * 500)
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"b\.txt is not UTF-8"):
        build_tokens(Files(path="*.txt"), tiny_llama, sequence_length=8, base=tmp_path, cache=cache)
    assert not list(cache.folder.rglob("*.arrow"))


def test_token_rows_are_used_as_they_stand(tiny_llama: Path, cache: Cache, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (2500, 16))  # more than two record batches
    np.save(tmp_path / "t.npy", rows)
    store = build_tokens(Tokens(path="t.npy"), tiny_llama, sequence_length=16, base=tmp_path, cache=cache)
    assert np.array_equal(store.sequences(range(2500)), rows)
    shuffled = np.random.default_rng(1).permutation(2500)
    assert np.array_equal(store.sequences(shuffled), rows[shuffled])
    assert store.counts == {"documents": 2500, "sequences": 2500, "tokens": 40_000, "dropped": 0}
    with pytest.raises(ConfigError, match=r"row 1 of the tokens has 16 ids, data.sequence_length is 8"):
        build_tokens(Tokens(path="t.npy"), tiny_llama, sequence_length=8, base=tmp_path, cache=cache)


@pytest.mark.parametrize(
    ("row", "said"), [([7, 8, 9, 5, 5, 5], "ends with 3"), ([5, 5, 7, 8, 9, 1], "begins with 2")]
)
def test_padded_rows_are_refused(
    tiny_llama: Path, cache: Cache, tmp_path: Path, row: list[int], said: str
) -> None:
    """Where a tokenizer has a token of its own for it; one alone may be text."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(5)
    tokenizer.save_pretrained(model)
    np.save(tmp_path / "t.npy", np.array([[7, 8, 9, 1, 2, 5], row]))

    def build(teacher: Path) -> TokenStore:
        return build_tokens(Tokens(path="t.npy"), teacher, sequence_length=6, base=tmp_path, cache=cache)

    with pytest.raises(ConfigError, match=rf"row 2 of the tokens {said} of padding \(id 5\); .*fill them"):
        build(model)
    assert len(build(tiny_llama)) == 2


@pytest.mark.parametrize("bad", [256, -1])
def test_tokens_of_another_model(tiny_llama: Path, cache: Cache, tmp_path: Path, bad: int) -> None:
    np.save(tmp_path / "t.npy", np.array([[0] * 8, [0] * 7 + [bad]]))
    with pytest.raises(ConfigError, match=f"document 2 of the text holds token id {bad}, .* has 256 entries"):
        build_tokens(Tokens(path="t.npy"), tiny_llama, sequence_length=8, base=tmp_path, cache=cache)


def test_the_file_says_what_it_holds(tiny_text: Path, tiny_llama: Path, cache: Cache) -> None:
    store = _build(tiny_text, tiny_llama, cache)
    with pa.memory_map(str(store.folder / "tokens.arrow")) as file:
        schema = pa.ipc.open_file(file).schema
    assert schema.field("input_ids").type == pa.list_(pa.uint32(), 32)
    said = json.loads(schema.metadata[b"minitron_ray"])
    assert said["tokenizer"] == tokenizer_digest(tiny_llama) and said["sequence_length"] == 32


def test_a_tokenizer_with_truncation_and_padding_is_used_without(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(saved))
    ids = load_tokenizer(tmp_path / "model").encode(["A long text. " * 9, "short"])
    assert len(ids[0]) > 20 > len(ids[1]) and ids[0][-1] == ids[1][-1] == 0


def test_bad_tokenizers(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no tokenizer; copy"):
        load_tokenizer(tmp_path)
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"the tokenizer in .*model can't be loaded: "):
        load_tokenizer(tmp_path / "model")


def test_a_tokenizer_that_cannot_end_a_document(tiny_llama: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="names no eos_token, which must end each document"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [5, 6], "vocab_size": 300}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.separator, tokenizer.vocabulary) == (5, 300)
