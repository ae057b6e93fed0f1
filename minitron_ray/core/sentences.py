"""pydantic's errors as plain sentences: what was expected, what was found, what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from pydantic_core import ErrorDetails

from minitron_ray.core.sections import nearest
from minitron_ray.core.yaml import Node

_EXPECTED: Final = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
    "model_attributes_type": "a section",
    "none_required": "null",
}
"""What a value of another type should have been, by pydantic's error type."""

_BOUNDS: Final[dict[str, tuple[str, str]]] = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}

_PATTERNS: Final = {
    r"^[a-z0-9][a-z0-9._-]{0,63}$": (
        "a name of at most 64 lower-case letters, digits and . _ - that starts with a letter or digit"
    ),
}


def wrong_type(error: ErrorDetails) -> str | None:
    """What was expected, where a value is of another type altogether; None where only its value is wrong."""
    if error["type"] == "unit_shape":
        return str(error["ctx"]["expected"])
    if error["type"] == "literal_error":
        return str(error["ctx"]["expected"])
    return _EXPECTED.get(error["type"])


def type_sentence(errors: Sequence[ErrorDetails], found: Node, kinds: Sequence[str] = ()) -> str:
    """`expected a, or b, found c; hint`, from the branches of a union or a single error.

    `kinds` are the plug-ins that may stand here.
    """
    wanted = list(dict.fromkeys(text for error in errors if (text := wrong_type(error))))
    hints = [str(hint) for error in errors if (hint := error.get("ctx", {}).get("hint"))]
    text = f"expected {' or '.join(wanted)}, found {shown(found)}"
    return text + (hints[0] if hints else _type_hint(errors[0], found, kinds))


def _type_hint(error: ErrorDetails, found: Node, kinds: Sequence[str]) -> str:
    wanted = wrong_type(error)
    if error["type"] == "literal_error":
        near = nearest(found.text, re.findall(r"'([^']*)'", str(wanted)))
        return f"; did you mean '{near}'?" if near else ""
    if wanted == "text" and isinstance(found.content, int | float):
        return "; put it in quotes"
    if wanted in ("a number", "a whole number") and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", found.text):
        return "; remove the quotes" if isinstance(found.content, str) else ""
    if wanted == "a section" and kinds and isinstance(found.content, str):
        near = nearest(found.content, kinds)
        return f"; write {{kind: {near}}}" if near else f"; write {{kind: ...}}, one of {', '.join(kinds)}"
    return ""


def value_sentence(error: ErrorDetails, found: Node) -> str:
    """What is wrong with a value of the right type."""
    context: dict[str, Any] = error.get("ctx", {})
    name = error["type"]
    if name in _BOUNDS:
        words, key = _BOUNDS[name]
        return f"must be {words} {context[key]:g}, found {shown(found)}"
    if name == "missing" and isinstance(error["loc"][-1], int):
        return f"must have at least {error['loc'][-1] + 1} items, found {shown(found)}"
    handler = _SENTENCES.get(name)
    if handler is not None:
        return handler(context, found)
    message = error["msg"]
    return f"{message[:1].lower()}{message[1:]}, found {shown(found)}"


def _pattern(context: dict[str, Any], found: Node) -> str:
    pattern = str(context["pattern"])
    hexadecimal = re.fullmatch(r"\^\[0-9a-f\]\{(\d+)\}\$", pattern)
    if hexadecimal:
        count = len(found.text)
        size = f" ({count} characters)" if re.fullmatch(r"[0-9a-f]*", found.text) else ""
        return f"expected {hexadecimal[1]} hexadecimal digits (0-9, a-f), found {shown(found)}{size}"
    return f"expected {_PATTERNS.get(pattern, f'text of the form {pattern}')}, found {shown(found)}"


def _length(context: dict[str, Any], found: Node) -> str:
    size = (
        len(found.content) if isinstance(found.content, list | dict | str) else context.get("actual_length")
    )
    limit = context.get("min_length", context.get("max_length"))
    bound = "at least" if "min_length" in context else "at most"
    return f"must have {bound} {limit} items, found {size}"


def unknown_kind(found: Node, kinds: Sequence[str]) -> str:
    """A `kind:` that names no plug-in."""
    near = nearest(found.text, kinds)
    hint = f"did you mean '{near}'? " if near else ""
    return f"unknown kind {shown(found)}; {hint}known kinds: {', '.join(kinds)}"


_SENTENCES: Final[dict[str, Callable[[dict[str, Any], Node], str]]] = {
    "unit_value": lambda context, found: str(context["problem"]),
    "value_error": lambda context, found: str(context["error"]),
    "assertion_error": lambda context, found: str(context["error"]),
    "string_pattern_mismatch": _pattern,
    "too_short": _length,
    "too_long": _length,
}


def shown(node: Node) -> str:
    """A value as it was written, short enough for one line."""
    content = node.content
    if isinstance(content, dict):
        return "a section"
    if isinstance(content, list):
        return "a list" if len(content) > 4 else "[" + ", ".join(map(shown, content)) + "]"
    if content is None:
        return "null"
    text = node.text if len(node.text) <= 60 else node.text[:57] + "..."
    return repr(text) if isinstance(content, str) else text
