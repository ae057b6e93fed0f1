"""Quantities as people write them."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from minitron_ray.core.units import (
    Choices,
    Count,
    Fraction,
    SequenceCount,
    TokenCount,
    format_bytes,
    format_count,
    format_seconds,
)


def read(kind, value):
    return TypeAdapter(kind).validate_python(value)


@pytest.mark.parametrize(
    ("kind", "written", "value"),
    [
        (Count, "90M", 90_000_000),
        (Count, "1.8B", 1_800_000_000),
        (Count, "7_000", 7000),
        (Count, 1e8, 100_000_000),
        (Count, "1e8", 100_000_000),
        (Count, 12, 12),
        (Count, " 2.5 k ", 2500),
        (Count, "1T", 10**12),
        (TokenCount, "16k tokens", 16_000),
        (TokenCount, "1.8B tokens", 1_800_000_000),
        (TokenCount, "16 tokens", 16),
        (TokenCount, "1 token", 1),
        (TokenCount, "16384", 16_384),
        (SequenceCount, "32 sequences", 32),
        (SequenceCount, 32, 32),
        (Fraction, "5%", 0.05),
        (Fraction, "0.1 %", 0.001),
        (Fraction, 0.05, 0.05),
        (Fraction, 0, 0.0),
        (Fraction, "100%", 1.0),
    ],
)
def test_numbers(kind, written, value):
    found = read(kind, written)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "written", "message"),
    [
        (Count, "90Q", r"expected a count .*, found '90Q'; suffixes are K, M, B and T"),
        (Count, "90 parameters", r"expected a count .*, found '90 parameters'"),
        (Count, "", r"expected a count .*, found ''"),
        (Count, True, r"found true"),
        (Count, None, r"found nothing"),
        (Count, "1.23456k", r"'1\.23456k' is not a whole number"),
        (Count, 0.5, r"0\.5 is not a whole number"),
        (Count, 0, r"must be at least 1, found 0"),
        (Count, "-3M", r"must be at least 1, found '-3M'"),
        (Count, "1e300", r"must be at most 9223372036854775807"),
        (Count, math.nan, r"expected a count"),
        (TokenCount, "16k tokns", r"did you mean '16k tokens'\?"),
        (TokenCount, "32 sequences", r"expected a number of tokens .*, found '32 sequences'"),
        (SequenceCount, "16k tokens", r"expected a number of sequences .*, found '16k tokens'"),
        (Fraction, 5, r"5 is not between 0 and 1 .*; did you mean 5%\?"),
        (Fraction, "-1%", r"-1% is not between 0 and 1"),
        (Fraction, "101%", r"101% is not between"),
        (Fraction, "five", r"expected a share .*, found 'five'"),
        (Fraction, "nan", r"expected a share"),
        (Fraction, True, r"expected a share .*, found true"),
        (Choices, "32..29", r"ends below its start; write 29\.\.32"),
        (Choices, "512..1500 by 128", r"does not end on 1500; in steps of 128 write 1408 or 1536"),
        (Choices, "1..1000000", r"more than 10000 sizes; add a step"),
        (Choices, "1..9 by 0", r"must be at least 1, found 0"),
        (Choices, "1..9 bye 2", r"expected sizes"),
        (Choices, [], r"an empty list"),
        (Choices, [5, 5], r"5 is listed twice"),
        (Choices, [0], r"must be at least 1, found 0"),
        (Choices, [1.5], r"1\.5 is not a whole number"),
        (Choices, [[1]], r"expected sizes"),
        (Choices, True, r"expected sizes .*, found true"),
        (Choices, {"ratios": [2]}, r"found a mapping with the key 'ratios'"),
        (Choices, {"ratio": [0]}, r"a ratio must be a number above 0, like 2\.5, found 0"),
        (Choices, {"ratio": ["x"]}, r"found 'x'"),
        (Choices, {"ratio": []}, r"an empty list"),
    ],
)
def test_refusals(kind, written, message):
    with pytest.raises(ValidationError, match=message):
        read(kind, written)


@given(st.integers(1, 2**63 - 1))
def test_a_count_survives_its_own_text(number):
    assert read(Count, str(number)) == read(Count, f"{number:_}") == number


def test_a_large_count_is_exact():
    assert read(Count, "15.628775424B") == 15_628_775_424


@pytest.mark.parametrize(
    ("written", "sizes"),
    [
        ("29..32", (29, 30, 31, 32)),
        ("512..1024 by 256", (512, 768, 1024)),
        ([4608, 4096], (4096, 4608)),
        (576, (576,)),
        ("576", (576,)),
        ({"ratio": [3, 2.5]}, (2500, 3000)),
        ({"ratio": 4}, (4000,)),
    ],
)
def test_choices(written, sizes):
    choices = read(Choices, written)
    assert choices.sizes(hidden=1000) == sizes
    dumped = TypeAdapter(Choices).dump_python(choices, mode="json")
    assert read(Choices, json.loads(json.dumps(dumped))) == choices


def test_ratios_follow_the_hidden_size_and_round():
    choices = Choices(ratios=(2.5, 2.501))
    assert choices.sizes(4608) == (11_520, 11_525)
    assert choices.sizes(100) == (250,)  # 250.1 rounds to the same size


@pytest.mark.parametrize("fields", [{}, {"values": (1,), "ratios": (1.0,)}])
def test_choices_are_values_or_ratios(fields):
    with pytest.raises(ValueError, match="either values or ratios"):
        Choices(**fields)


@pytest.mark.parametrize("values", [(2, 1), (1, 1), (0, 1)])
def test_choices_are_positive_ascending_and_distinct(values):
    with pytest.raises(ValueError, match="positive, ascending and distinct"):
        Choices(values=values)


@pytest.mark.parametrize("kind", [Count, TokenCount, SequenceCount, Fraction, Choices])
def test_editors_learn_that_text_is_allowed(kind):
    assert '"string"' in json.dumps(TypeAdapter(kind).json_schema())


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (16_384, "16.4K"), (134_515_008, "134.5M"), (8_271_699_968, "8.272B"), (94e9, "94.0B")],
)
def test_format_count(number, text):
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.6, "1:00"),
        (3599.6, "1:00:00"),
        (90_061, "25:01:01"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_format_bytes():
    assert [format_bytes(n) for n in (512, 1536, 2**31)] == ["512 B", "1.5 KiB", "2.0 GiB"]
