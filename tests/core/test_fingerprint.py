"""Digests that are equal for equal content, in every process."""

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from minitron_ray.core.fingerprint import digest, file_sha256
from minitron_ray.core.units import Choices


def test_order_of_keys_does_not_count_and_order_of_items_does():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest([1, 2]) != digest([2, 1])
    assert digest([1, 2]) == digest((1, 2))


def test_values_that_look_alike_differ():
    values = [1, 1.0, "1", True, None, [1], {"1": 1}, "", [], {}]
    assert len({digest(value) for value in values}) == len(values)


def test_it_is_the_sha256_of_canonical_json():
    expected = hashlib.sha256(b'{"a":[1,0.1,"\\u00e9"],"b":null}').hexdigest()
    assert digest({"b": None, "a": (1, 0.1, "é")}) == expected


def test_models_by_their_json_form():
    class Axis(BaseModel):
        name: str
        sizes: Choices

    assert digest(Axis(name="x", sizes=Choices(values=(1, 2)))) == digest({"name": "x", "sizes": [1, 2]})


def test_another_process_finds_the_same():
    value = {"rate": 5e-4, "text": "ü\u2028", "large": 2**70, "list": [{"z": 1, "a": 2}]}
    code = f"from minitron_ray.core.fingerprint import digest; print(digest({value!r}))"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == digest(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {1, 2}}, r"value\.a is a set"),
        ([math.nan], r"value\[0\] is nan: only finite numbers"),
        (math.inf, "only finite numbers"),
        ({"a": Path("x")}, r"value\.a is a PosixPath"),
        ({1: 2}, "keys must be text"),
        (b"x", "value is a bytes"),
        (object(), "value is a object"),
    ],
)
def test_what_has_no_digest(value, message):
    with pytest.raises(TypeError, match=message):
        digest(value)


def test_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc" * 1_000_000)
    assert file_sha256(path) == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
    with pytest.raises(FileNotFoundError):
        file_sha256(tmp_path / "y")
