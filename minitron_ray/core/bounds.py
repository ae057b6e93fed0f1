"""What a quantity may be, as people write it: `8B ± 5%`, `7.8B..8.5B`, `≤ 22GiB`.

`CountBounds` reads counts (`8B`), `ByteBounds` sizes in memory (`22GiB`, `24GB`). What can't be read
raises the errors that `core/units.py` describes.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import BeforeValidator, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from minitron_ray.core.units import Count, Fraction, show

UNBOUNDED: Final = 2**63 - 1
"""The upper end of a quantity that has none."""

_AROUND: Final = re.compile(r"(.+?)\s*(?:±|\+/-|\+-)\s*(.+)")
_LIMIT: Final = re.compile(r"(≤|<=|≥|>=)\s*(.+)")
_BARE: Final = re.compile(r"[\d_]*\.?[\d_]+\.?")
_SUFFIX: Final = re.compile(r"\s*[a-z]+$", re.I)
_SIZE: Final = re.compile(r"(\d[\d_]*(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)b?", re.I)
_EXPONENTS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_BYTES: Final = "bytes (80GiB, 24GB)"
_COUNT: Final = TypeAdapter(Count)
_FRACTION: Final = TypeAdapter(Fraction)


def _count(value: Any) -> int:
    """Raises PydanticCustomError as a field of the type `Count` does."""
    return int(_read(_COUNT.validate_python, value))


def _read(reader: Callable[[Any], Any], value: Any) -> Any:
    try:
        return reader(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise PydanticCustomError(first["type"], first["msg"], first.get("ctx")) from None


def _bytes(value: Any) -> int:
    match = None if isinstance(value, bool) else _SIZE.fullmatch(str(value).strip())
    if match is None:
        raise _shape(_BYTES, value, "; suffixes are KiB to TiB, and KB to TB by thousands")
    exact = Decimal(match[1].replace("_", "")) * (1024 if match[3] else 1000) ** _EXPONENTS[match[2].lower()]
    if not 1 <= exact <= UNBOUNDED:
        raise _value(f"must be at least 1 byte and below 8 EiB, found {show(value)}")
    return int(exact)


ByteCount = Annotated[int, BeforeValidator(_bytes, json_schema_input_type=int | str)]
"""A number of bytes, at least 1: `80GiB`, `24GB`, `80G` (by thousands), `1048576`."""


def _shape(expected: str, found: Any, hint: str = "") -> PydanticCustomError:
    context = {"expected": expected, "found": show(found), "hint": hint}
    return PydanticCustomError("unit_shape", "expected {expected}, found {found}{hint}", context)


def _value(problem: str) -> PydanticCustomError:
    return PydanticCustomError("unit_value", "{problem}", {"problem": problem})


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds(ABC):
    """A centre, with a tolerance of its own or without one; or a range, open at one end for a limit."""

    centre: int | None = None
    tolerance: float | None = None
    """Relative half-width around the centre; None where it isn't written beside it."""
    low: int | None = None
    high: int | None = None

    expected: ClassVar[str]
    """How it is written, for messages."""
    alone_is_limit: ClassVar[bool] = False
    """Whether a quantity by itself is the most there may be, or a centre."""

    @classmethod
    @abstractmethod
    def read(cls, value: Any) -> int:
        """One quantity. Raises PydanticCustomError."""

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Any of the written forms. Raises PydanticCustomError."""
        if isinstance(value, str):
            text = value.strip()
            if match := _LIMIT.fullmatch(text):
                end = cls._part(match[2], value)
                return cls(high=end) if match[1] in ("≤", "<=") else cls(low=end)
            if match := _AROUND.fullmatch(text):
                return cls(
                    centre=cls._part(match[1], value), tolerance=_read(_FRACTION.validate_python, match[2])
                )
            if ".." in text:
                return cls._range(value)
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise _shape(cls.expected, value)
        try:
            quantity = cls.read(value)
            return cls(high=quantity) if cls.alone_is_limit else cls(centre=quantity)
        except PydanticCustomError as error:
            if error.type != "unit_shape":
                raise
            raise _shape(cls.expected, value, str((error.context or {}).get("hint", ""))) from None

    @classmethod
    def _part(cls, part: str, whole: str) -> int:
        try:
            return cls.read(part)
        except PydanticCustomError as error:
            raise _value(f"{error.message()} in {show(whole)}") from None

    @classmethod
    def _range(cls, value: str) -> Self:
        """`7..8B` is 7B..8B, as people mean it: the suffix holds for a first number that has none."""
        first, _, last = (part.strip() for part in value.partition(".."))
        if not first or not last or ".." in last:
            raise _value(f"expected {cls.expected}, found {show(value)}")
        shared = _SUFFIX.search(last) if _BARE.fullmatch(first) else None
        start = first if shared is None else first + shared[0]
        high = cls._part(last, value)
        low = cls._part(start, value)
        if low > high:
            if shared is not None:
                raise _value(
                    f"the range {show(value)} is read as {start}..{last}, which ends below its start; give "
                    f"{first} a suffix of its own"
                )
            raise _value(f"the range {show(value)} ends below its start; write {last}..{first}")
        return cls(low=low, high=high)

    def ends(self, tolerance: float) -> tuple[int, int]:
        """The least and the largest whole number inside; `tolerance` holds for a centre without its own."""
        if self.centre is None:
            return self.low or 0, UNBOUNDED if self.high is None else self.high
        width = self.centre * Decimal(str(tolerance if self.tolerance is None else self.tolerance))
        return (
            int((self.centre - width).to_integral_value(ROUND_CEILING)),
            int((self.centre + width).to_integral_value(ROUND_FLOOR)),
        )

    def written(self) -> int | str:
        """As a file may have it: whole numbers without suffixes."""
        if self.centre is not None:
            return self.centre if self.tolerance is None else f"{self.centre} ± {100 * self.tolerance:g}%"
        if self.low is None:
            return f"≤ {self.high}"
        return f"≥ {self.low}" if self.high is None else f"{self.low}..{self.high}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(value: Any) -> Bounds:
            return value if isinstance(value, cls) else cls.parse(value)

        form = core_schema.union_schema([core_schema.int_schema(ge=1), core_schema.str_schema()])
        return core_schema.no_info_plain_validator_function(
            validate,
            json_schema_input_schema=form,
            serialization=core_schema.plain_serializer_function_ser_schema(cls.written, return_schema=form),
        )


class CountBounds(Bounds):
    """Of a count: `8B`, `8B ± 5%`, `7.8B..8.5B`, `≤ 8B`."""

    __slots__ = ()
    expected: ClassVar[str] = "a count (90M, 8B ± 5%), a range of counts (7.8B..8.5B) or a limit (<= 8B)"

    @classmethod
    def read(cls, value: Any) -> int:
        return _count(value)


class ByteBounds(Bounds):
    """Of bytes: `22GiB` or `≤ 22GiB`, `20GiB ± 5%`, `20GiB..22GiB`. Memory that one has is not to be exceeded."""

    __slots__ = ()
    expected: ClassVar[str] = "at most so many bytes (22GiB, <= 22GiB), a range (20GiB..22GiB) or 20GiB ± 5%"
    alone_is_limit: ClassVar[bool] = True

    @classmethod
    def read(cls, value: Any) -> int:
        return _bytes(value)
