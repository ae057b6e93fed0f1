"""Whether two models' tokenizers are the same one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from minitron_ray.core.errors import ConfigError
from minitron_ray.data.tokenizer import check_same_tokenizer, tokenizer_digest


def copied(folder: Path, to: Path, swap: bool = False) -> Path:
    """The model's folder again, its tokenizer with one more special token, and with two ids swapped or not."""
    shutil.copytree(folder, to)
    path = to / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    special = {"content": "<more>", "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    whole["added_tokens"].append({"id": 256, **special, **flags})
    if swap:
        vocabulary = whole["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(whole), encoding="utf-8")
    return to


def test_one_more_special_token_is_no_other_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    other = copied(tiny_llama, tmp_path / "other")
    assert tokenizer_digest(other) != tokenizer_digest(tiny_llama)
    check_same_tokenizer(tiny_llama, other, ("teacher", "start"))


def test_other_ids_are_refused_and_both_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    other = copied(tiny_llama, tmp_path / "other", swap=True)
    ids = json.loads((tiny_llama / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    told = rf"tokenizer of ./start .256 tokens. is not that of the teacher org/teacher .256 tokens.*id {ids['a']}\b"
    with pytest.raises(ConfigError, match=told) as caught:
        check_same_tokenizer(tiny_llama, other, ("org/teacher", "./start"))
    assert f"id {ids['b']} " in caught.value.message and "\n" not in caught.value.message


def with_rows(folder: Path, to: Path, rows: int, swap: bool = False) -> Path:
    """The model's folder again, its embedding said to have so many rows."""
    copied(folder, to, swap) if swap else shutil.copytree(folder, to)
    path = to / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": rows}), encoding="utf-8")
    return to


@pytest.mark.parametrize("rows", [264, 512])
def test_padding_is_no_other_tokenizer(rows: int, tiny_llama: Path, tmp_path: Path) -> None:
    other = with_rows(tiny_llama, tmp_path / "other", rows)
    check_same_tokenizer(tiny_llama, other, ("teacher", "start"))
    check_same_tokenizer(other, tiny_llama, ("teacher", "start"))


def test_other_ids_are_refused_whatever_the_padding(tiny_llama: Path, tmp_path: Path) -> None:
    other = with_rows(tiny_llama, tmp_path / "other", 512, swap=True)
    with pytest.raises(ConfigError, match=r"tokenizer of ./start .256 tokens. is not that of the teacher"):
        check_same_tokenizer(tiny_llama, other, ("org/teacher", "./start"))


def test_a_token_without_a_row_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    more = copied(tiny_llama, tmp_path / "more")  # its <more> has id 256, the 257th row
    with pytest.raises(
        ConfigError, match=r"./start has 256 rows .* none for '<more>', id 256 of .* org/teacher"
    ):
        check_same_tokenizer(more, tiny_llama, ("org/teacher", "./start"))
