"""Quantities as people write them: `90M`, `7.8B..8.5B`, `5%`, `16k tokens`, `512..1536 by 128`.

Each type reads YAML's numbers and text and holds plain numbers afterwards. Suffixes are decimal
(`16k` is 16,000). What can't be read raises one of two pydantic errors, which `core/loading.py`
turns into sentences: `unit_shape` (this is not how such a quantity is written; ctx `expected`,
`found`, `hint`) and `unit_value` (it is, but the value is not allowed; ctx `problem`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import pairwise
from typing import Annotated, Any, Final, TypeVar

from pydantic import BeforeValidator, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_SUFFIXES: Final = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_NUMBER: Final = re.compile(r"([-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:e[-+]?\d{1,3})?)\s*([a-z]*)\s*(.*)", re.I)
_RANGE: Final = re.compile(r"(\S+?)\s*\.\.\s*(\S+?)(?:\s+by\s+(\S+))?", re.I)
_N = TypeVar("_N", int, float)

_LARGEST: Final = 2**63 - 1
_MOST_CHOICES: Final = 10_000

_COUNT: Final = "a count (90M, 1.8B, 7_000)"
_FRACTION: Final = "a share (5%, 0.05)"
_TOKENS: Final = "a number of tokens (16k tokens, 16384)"
_SEQUENCES: Final = "a number of sequences (32 sequences, 32)"
_CHOICES: Final = "sizes (29..32, 512..1536 by 128, [4096, 4608], {ratio: [2.5, 3]})"


def _shape(expected: str, found: Any, hint: str = "") -> PydanticCustomError:
    context = {"expected": expected, "found": show(found), "hint": hint}
    return PydanticCustomError("unit_shape", "expected {expected}, found {found}{hint}", context)


def _value(problem: str) -> PydanticCustomError:
    return PydanticCustomError("unit_value", "{problem}", {"problem": problem})


def show(value: Any) -> str:
    """A YAML value as it may be quoted in a message: short, on one line."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list" if len(value) > 4 else "[" + ", ".join(show(v) for v in value) + "]"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = value if len(value) <= 60 else value[:57] + "..."
        return repr(text)
    return str(value)


# --- One number -----------------------------------------------------------------------------------


def _number(value: Any, expected: str, noun: str = "") -> int:
    """A positive whole number from `value`; `noun` is the plural of a unit that may follow it."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _shape(expected, value)
    match = _NUMBER.fullmatch(str(value).strip())
    if match is None:
        raise _shape(expected, value)
    digits, suffix, rest = match[1], match[2].lower(), match[3].strip().lower()
    if suffix not in _SUFFIXES:  # `16 tokens`: the word stands where a suffix could
        suffix, rest = "", f"{match[2]}{match[3]}".strip().lower()
    if rest and (not noun or rest not in (noun, noun[:-1])):
        raise _shape(expected, value, _unit_hint(value, rest, noun))
    try:
        exact = Decimal(digits.replace("_", "")) * _SUFFIXES[suffix]
    except InvalidOperation:  # pragma: no cover - the pattern admits only what Decimal reads
        raise _shape(expected, value) from None
    if exact != exact.to_integral_value():
        raise _value(f"{show(value)} is not a whole number")
    if not 1 <= exact <= _LARGEST:
        bound = "at least 1" if exact < 1 else f"at most {_LARGEST}"
        raise _value(f"must be {bound}, found {show(value)}")
    return int(exact)


def _unit_hint(value: Any, rest: str, noun: str) -> str:
    if noun and difflib.get_close_matches(rest, [noun, noun[:-1]], n=1, cutoff=0.6):
        text = str(value).strip()
        return f"; did you mean '{text[: len(text) - len(rest)].rstrip()} {noun}'?"
    if len(rest) <= 2:
        return "; suffixes are K, M, B and T"
    return ""


def _count(value: Any) -> int:
    return _number(value, _COUNT)


def _tokens(value: Any) -> int:
    return _number(value, _TOKENS, "tokens")


def _sequences(value: Any) -> int:
    return _number(value, _SEQUENCES, "sequences")


def _fraction(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _shape(_FRACTION, value)
    text = str(value).strip().replace("_", "")
    percent = text.endswith("%")
    try:
        number = Decimal(text.removesuffix("%").strip())
    except InvalidOperation:
        raise _shape(_FRACTION, value) from None
    if not number.is_finite():
        raise _shape(_FRACTION, value)
    fraction = number / 100 if percent else number
    if not 0 <= fraction <= 1:
        hint = f"; did you mean {text}%?" if not percent and 1 < fraction <= 100 else ""
        raise _value(f"{text} is not between 0 and 1 (0% and 100%){hint}")
    return float(fraction)


Count = Annotated[int, BeforeValidator(_count, json_schema_input_type=int | str)]
"""A number of things, at least 1: `90M`, `1.8B`, `7_000`, `1e8`."""

TokenCount = Annotated[int, BeforeValidator(_tokens, json_schema_input_type=int | str)]
"""A number of tokens, at least 1: `16k tokens`, `1.8B`, `16384`."""

SequenceCount = Annotated[int, BeforeValidator(_sequences, json_schema_input_type=int | str)]
"""A number of sequences, at least 1: `32 sequences`, `32`."""

Fraction = Annotated[float, BeforeValidator(_fraction, json_schema_input_type=float | str)]
"""A share between 0 and 1: `5%`, `0.05`."""


# --- Ranges and choices -----------------------------------------------------------------------------


def _schema(
    kind: type[Any], parse: Callable[[Any], Any], dump: Callable[[Any], Any], written: CoreSchema
) -> CoreSchema:
    def validate(value: Any) -> Any:
        return value if isinstance(value, kind) else parse(value)

    return core_schema.no_info_plain_validator_function(
        validate,
        json_schema_input_schema=written,
        serialization=core_schema.plain_serializer_function_ser_schema(dump, return_schema=written),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Sizes to choose from: either `values`, or `ratios` of the student's hidden size.

    Ascending, distinct, positive; exactly one of the two is non-empty.
    YAML: `29..32` (inclusive), `512..1536 by 128`, `[4096, 4608]`, `{ratio: [2.5, 3]}`.
    """

    values: tuple[int, ...] = ()
    ratios: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.values) == bool(self.ratios):
            raise ValueError("Choices takes either values or ratios")
        for name in ("values", "ratios"):
            items = getattr(self, name)
            if any(item <= 0 for item in items) or list(items) != sorted(set(items)):
                raise ValueError(f"Choices.{name} must be positive, ascending and distinct: {items}")

    def sizes(self, hidden: int) -> tuple[int, ...]:
        """The sizes for a student of that hidden size; a ratio's size is rounded to a whole number."""
        if self.values:
            return self.values
        return tuple(sorted({max(1, round(ratio * hidden)) for ratio in self.ratios}))

    @classmethod
    def parse(cls, value: Any) -> Choices:
        """Read any of the written forms. Raises PydanticCustomError."""
        if isinstance(value, dict):
            return cls(ratios=_ratios(value))
        if isinstance(value, str) and ".." in value:
            return cls(values=_stepped(value))
        if isinstance(value, int | str) and not isinstance(value, bool):
            value = [value]
        if not isinstance(value, list | tuple):
            raise _shape(_CHOICES, value)
        return cls(values=_distinct(_size(item, value) for item in value))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        number = core_schema.float_schema(gt=0)
        many = core_schema.list_schema(number, min_length=1)
        ratio = core_schema.typed_dict_field(core_schema.union_schema([number, many]))
        written = core_schema.union_schema(
            [
                core_schema.int_schema(ge=1),
                core_schema.str_schema(pattern=r"^\s*\d[\d_]*\s*\.\.\s*\d[\d_]*(\s+by\s+\d[\d_]*)?\s*$"),
                core_schema.list_schema(core_schema.int_schema(ge=1), min_length=1),
                core_schema.typed_dict_schema({"ratio": ratio}, extra_behavior="forbid"),
            ]
        )
        return _schema(cls, cls.parse, _written, written)


def _written(choices: Choices) -> list[int] | dict[str, list[float]]:
    return list(choices.values) if choices.values else {"ratio": list(choices.ratios)}


def _distinct(items: Iterable[_N]) -> tuple[_N, ...]:
    found = sorted(items)
    if not found:
        raise _value("an empty list leaves nothing to choose from")
    for one, other in pairwise(found):
        if one == other:
            raise _value(f"{one} is listed twice")
    return tuple(found)


def _size(item: Any, whole: Any) -> int:
    if isinstance(item, bool) or not isinstance(item, int | str):
        raise _shape(
            _CHOICES, whole, f"; {show(item)} is not a whole number" if isinstance(item, float) else ""
        )
    text = str(item).strip().replace("_", "")
    if not re.fullmatch(r"[-+]?\d{1,12}", text):
        raise _shape(_CHOICES, whole)
    if int(text) < 1:
        raise _value(f"a size must be at least 1, found {text}")
    return int(text)


def _stepped(value: str) -> tuple[int, ...]:
    match = _RANGE.fullmatch(value.strip())
    if match is None:
        raise _shape(_CHOICES, value)
    low, high = _size(match[1], value), _size(match[2], value)
    step = _size(match[3], value) if match[3] else 1
    if low > high:
        raise _value(f"the range {show(value)} ends below its start; write {high}..{low}")
    last = low + (high - low) // step * step
    if last != high:
        raise _value(
            f"{show(value)} does not end on {high}; in steps of {step} write {last} or {last + step}"
        )
    if (high - low) // step >= _MOST_CHOICES:
        raise _value(
            f"{show(value)} is more than {_MOST_CHOICES} sizes; add a step, like {low}..{high} by 128"
        )
    return tuple(range(low, high + 1, step))


def _ratios(value: dict[Any, Any]) -> tuple[float, ...]:
    if set(value) != {"ratio"}:
        unknown = next((key for key in value if key != "ratio"), None)
        raise _shape(_CHOICES, value, f" with the key {show(unknown)}" if unknown is not None else "")
    ratios = value["ratio"] if isinstance(value["ratio"], list | tuple) else [value["ratio"]]
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1000:
            raise _value(f"a ratio must be a number above 0, like 2.5, found {show(ratio)}")
    return _distinct(float(ratio) for ratio in ratios)


# --- Numbers for people -----------------------------------------------------------------------------


def format_count(number: float) -> str:
    """`999`, `16.4K`, `134.5M`, `8.272B`: four digits at most, decimal suffixes."""
    for suffix, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        scaled = number / size
        if abs(scaled) >= 0.99995:
            decimals = 3 if size == 10**9 and abs(scaled) < 10 else 1
            return f"{scaled:.{decimals}f}{suffix}"
    return f"{number:.0f}"


def format_seconds(seconds: float) -> str:
    """`4.2s`, `58s`, `12:05`, `3:07:12`: seconds, minutes:seconds, hours:minutes:seconds."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def format_bytes(number: float) -> str:
    """`512 B`, `1.5 KiB`, `2.0 GiB`: binary suffixes."""
    for suffix, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(number) >= size:
            return f"{number / size:.1f} {suffix}"
    return f"{number:.0f} B"
