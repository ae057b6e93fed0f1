"""YAML 1.2 with positions: `Document` is plain data that remembers where each value was written.

Stricter than YAML where leniency hides mistakes: a key may stand once, a key without a value is an
error (`null` has to be written), and tags, anchors and several documents are refused.
"""

from __future__ import annotations

import difflib
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.reader import ReaderError

from minitron_ray.core.errors import ConfigError

Location: TypeAlias = tuple[str | int, ...]
Scalar: TypeAlias = str | int | float | bool | None

_LARGEST_FILE: Final = 2**20
_DEEPEST: Final = 40
_NULL: Final = frozenset({"null", "Null", "NULL", "~"})
_BOOL: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER: Final = re.compile(r"[-+]?\d[\d_]{0,39}|0o[0-7]{1,20}|0x[0-9a-fA-F]{1,16}")
_FLOAT: Final = re.compile(r"[-+]?(\.\d+|\d[\d_]*(\.\d*)?)([eE][-+]?\d+)?")


class Mark(NamedTuple):
    """Where something was written: a file (line and column from 1) or an option (both 0)."""

    origin: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.origin}:{self.line}:{self.column}" if self.line else self.origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One mistake: where, in which key (may be empty), and what in a plain sentence."""

    mark: Mark
    path: Location = ()
    text: str

    def __str__(self) -> str:
        path = f"{dotted(self.path)}: " if self.path else ""
        return f"{self.mark}: {path}{self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A value with its position. `text` is a scalar as it was written, without quotes."""

    mark: Mark
    content: dict[str, Node] | list[Node] | Scalar
    keys: dict[str, Mark] = field(default_factory=dict)
    text: str = ""

    @property
    def data(self) -> Any:
        if isinstance(self.content, dict):
            return {key: node.data for key, node in self.content.items()}
        if isinstance(self.content, list):
            return [node.data for node in self.content]
        return self.content


def dotted(path: Iterable[str | int]) -> str:
    """`("data", "files", 0)` as `data.files[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def dumped(value: Any) -> bytes:
    """Plain data as a YAML file, keys in their order."""
    stream = io.BytesIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # typed as None only
    yaml.width = 100
    yaml.dump(value, stream)
    return stream.getvalue()


# --- Documents ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One YAML file, as read. `source` is its bytes; `problems` what is wrong with it as YAML."""

    path: Path
    source: bytes
    root: Node
    problems: tuple[Problem, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Document:
        """Read a file. Raises ConfigError, one line a problem."""
        document = cls.read(path)
        if document.problems:
            raise ConfigError("\n".join(map(str, document.problems)))
        return document

    @classmethod
    def read(cls, path: str | Path) -> Document:
        """Read a file and keep its problems: duplicate keys and the like, all of them.

        Raises ConfigError where there is nothing to work with: no file, not text, broken syntax.
        """
        path = Path(path)
        source = _read_bytes(path)
        root, problems = parse(_decode(source, path), str(path))
        if root.content is None and not problems:
            raise ConfigError(f"{path}: empty")
        return cls(path=path, source=source, root=root, problems=problems)

    @property
    def data(self) -> Any:
        """Plain dicts, lists and scalars."""
        return self.root.data

    def resolve(self, location: Sequence[str | int]) -> tuple[Location, Node, Mark]:
        """The value at a pydantic error location: its path, itself, and the place to point at.

        Parts of a location that name no key are union tags (and missing keys) and are passed over.
        A mapping is pointed at by its key, everything else by where the value stands.
        """
        node, mark = self.root, self.root.mark
        path: list[str | int] = []
        for index, part in enumerate(location):
            content = node.content
            if isinstance(content, dict) and part in content and not _is_tag(node, location, index):
                node, mark = content[str(part)], node.keys[str(part)]
            elif isinstance(content, list) and isinstance(part, int) and part < len(content):
                node = content[part]
                mark = node.mark
            else:
                continue
            path.append(part)
        if not isinstance(node.content, dict):
            mark = node.mark
        return tuple(path), node, mark

    def locate(self, location: Sequence[str | int]) -> tuple[int, int]:
        """Line and column, from 1, of the value at a location; of the parent where it is missing."""
        mark = self.resolve(location)[2]
        return mark.line, mark.column

    def key_mark(self, path: Location) -> Mark:
        """Where the key at the end of `path` stands."""
        parent = self.resolve(path[:-1])[1]
        return parent.keys.get(str(path[-1]), parent.mark)


def _is_tag(node: Node, location: Sequence[str | int], index: int) -> bool:
    """Whether a part of a location is the `kind` of a section that also has a key of that name."""
    assert isinstance(node.content, dict)
    kind = node.content.get("kind")
    return index + 1 < len(location) and kind is not None and kind.content == location[index]


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            source = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_near_file(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a folder; name an experiment file in it") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror or error}") from None
    if len(source) > _LARGEST_FILE:
        raise ConfigError(f"{path}: larger than 1 MB; an experiment file names data, it does not hold it")
    return source


def _near_file(path: Path) -> str:
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1) or [n for n in names if Path(n).stem == path.name]
    return f"; did you mean '{path.parent / near[0]}'?" if near else ""


def _decode(source: bytes, path: Path) -> str:
    try:
        return source.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = source.count(b"\n", 0, error.start) + 1
        column = error.start - (source.rfind(b"\n", 0, error.start) + 1) + 1
        byte = source[error.start]
        raise ConfigError(
            f"{Mark(str(path), line, column)}: not UTF-8 (byte 0x{byte:02x}); save it as UTF-8"
        ) from None


# --- Parsing ----------------------------------------------------------------------------------------


def parse(text: str, origin: str) -> tuple[Node, tuple[Problem, ...]]:
    """The tree of a YAML text and what is wrong with it short of broken syntax.

    Raises ConfigError, naming `origin` and the position, where the syntax is broken.
    """
    try:
        return _Builder(origin).build(YAML(typ="safe", pure=True).parse(text))
    except ReaderError as error:
        before = text[: error.position]
        mark = Mark(origin, before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)
        raise ConfigError(
            f"{mark}: the control character U+{ord(text[error.position]):04X} is not allowed"
        ) from None
    except MarkedYAMLError as error:
        raise ConfigError(_syntax(error, text, origin)) from None
    except YAMLError as error:
        raise ConfigError(f"{origin}: not YAML: {' '.join(str(error).split())}") from None


_UNCLOSED: Final = {
    "while parsing a flow sequence": "a '[' that is not closed",
    "while parsing a flow mapping": "a '{' that is not closed",
    "while scanning a quoted scalar": "a quote that is not closed",
}


def _syntax(error: MarkedYAMLError, text: str, origin: str) -> str:
    """What a parser's message means to someone who wrote an experiment file."""
    at = error.problem_mark or error.context_mark
    context, problem = str(error.context or ""), str(error.problem or error.context)
    if context in _UNCLOSED and ("<stream end>" in problem or "end of stream" in problem):
        at, problem = error.context_mark or at, _UNCLOSED[context]
    mark = Mark(origin, at.line + 1, at.column + 1) if at else Mark(origin)
    lines = text.splitlines()
    line = lines[at.line] if at and at.line < len(lines) else ""
    before = line[: at.column] if at else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or "'\\t'" in problem:
        problem = "a tab; YAML is indented with spaces only"
    elif "mapping values are not allowed" in problem:
        if ": " in before:
            problem = "a second ': ' in one line; put the value in quotes, or the key on a line of its own"
        else:
            problem = (
                "this key does not line up with the line above; check its indentation, and the ':' above"
            )
    elif "could not find expected ':'" in problem:
        problem = "a line without 'key: value'"
    elif "expected <block end>" in problem:
        problem = "this line does not line up with its section; check the indentation"
    elif start := re.search(r"character '(.)' that cannot start any token", problem):
        problem = f"text that starts with {start[1]} must be in quotes"
    return f"{mark}: {problem}"


class _Builder:
    """Builds nodes from parser events; goes on after a problem so that all are found."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._problems: list[Problem] = []
        self._events: Iterator[Event] = iter(())

    def build(self, events: Iterable[Event]) -> tuple[Node, tuple[Problem, ...]]:
        self._events = iter(events)
        root: Node | None = None
        for event in self._events:
            if isinstance(event, NodeEvent):
                root = self._node(event, ())
            elif isinstance(event, DocumentStartEvent) and root is not None:
                self._problem(event, (), "a second document; one file is one document")
                break
        return root or Node(mark=Mark(self._origin, 1, 1), content=None), tuple(self._problems)

    def _mark(self, event: Event) -> Mark:
        return Mark(self._origin, event.start_mark.line + 1, event.start_mark.column + 1)

    def _problem(self, event: Event, path: Location, text: str) -> None:
        self._problems.append(Problem(mark=self._mark(event), path=path, text=text))

    def _node(self, event: Event, path: Location) -> Node:
        mark = self._mark(event)
        if len(path) > _DEEPEST:
            raise ConfigError(f"{mark}: nested more than {_DEEPEST} levels deep")
        if isinstance(event, AliasEvent):
            self._problem(
                event, path, f"the alias *{event.anchor}; aliases are not supported, write the value out"
            )
            return Node(mark=mark, content=None)
        assert isinstance(event, ScalarEvent | SequenceStartEvent | MappingStartEvent)
        if event.anchor is not None:
            self._problem(event, path, f"the anchor &{event.anchor}; anchors are not supported, remove it")
        if event.tag is not None:
            tag = str(event.tag).replace("tag:yaml.org,2002:", "!!")
            self._problem(event, path, f"the tag {tag}; tags are not supported, remove it")
        if isinstance(event, MappingStartEvent):
            return self._mapping(mark, path)
        if isinstance(event, SequenceStartEvent):
            return self._sequence(mark, path)
        assert isinstance(event, ScalarEvent)
        return self._scalar(event, mark, path)

    def _mapping(self, mark: Mark, path: Location) -> Node:
        content: dict[str, Node] = {}
        keys: dict[str, Mark] = {}
        for event in self._events:
            if isinstance(event, MappingEndEvent):
                break
            key = self._key(event, path)
            where = (*path, key)
            value = self._value(next(self._events), event, where)
            if key in content:
                text = f"duplicate key; it already stands in line {keys[key].line}"
                self._problems.append(Problem(mark=self._mark(event), path=where, text=text))
            else:
                content[key], keys[key] = value, self._mark(event)
        return Node(mark=mark, content=content, keys=keys)

    def _value(self, event: Event, key: Event, path: Location) -> Node:
        if isinstance(event, ScalarEvent) and not event.value and _plain(event):
            self._problem(key, path, "empty; give it a value, remove the key, or write null")
            return Node(mark=self._mark(key), content=None)
        return self._node(event, path)

    def _key(self, event: Event, path: Location) -> str:
        if not isinstance(event, ScalarEvent):
            self._node(event, path)  # reads on to the end of the list or mapping
            self._problem(event, path, "a key must be text, found a list or a mapping")
            return "?"
        key = str(event.value)
        if _resolve(event) != key or not key:
            self._problem(event, path, f"a key must be text, found {key or 'nothing'}")
        return key

    def _sequence(self, mark: Mark, path: Location) -> Node:
        content: list[Node] = []
        for event in self._events:
            if isinstance(event, SequenceEndEvent):
                break
            content.append(self._node(event, (*path, len(content))))
        return Node(mark=mark, content=content)

    def _scalar(self, event: ScalarEvent, mark: Mark, path: Location) -> Node:
        text = str(event.value)
        if path and not text and _plain(event):
            self._problem(event, path, "an empty list item")
            return Node(mark=mark, content=None)
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            self._problem(event, path, "holds half a character (a lone surrogate)")
            return Node(mark=mark, content=None)
        return Node(mark=mark, content=_resolve(event), text=text)


def _plain(event: ScalarEvent) -> bool:
    return not event.style


def _resolve(event: ScalarEvent) -> Scalar:
    """A scalar's value by the YAML 1.2 core schema, with `_` allowed between digits."""
    text = str(event.value)
    if not _plain(event):
        return text
    if not text or text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INTEGER.fullmatch(text):
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text.rstrip("_"))
    if _FLOAT.fullmatch(text) and math.isfinite(number := float(text.rstrip("_"))):
        return number
    return text
