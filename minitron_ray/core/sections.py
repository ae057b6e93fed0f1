"""What keys an experiment file may have where: `Section` classes walked by path."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel

from minitron_ray.core.kinds import Plugin, keys
from minitron_ray.core.yaml import Location


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def sections_at(model: type[BaseModel], path: Location, data: Any) -> list[type[BaseModel]]:
    """The classes of the section at `path`: one, or every one that its `kind` does not rule out."""
    classes = [model]
    for part in path:
        if isinstance(part, int):
            data = data[part] if isinstance(data, list) and part < len(data) else None
            continue
        fields = [keys(cls)[part] for cls in classes if part in keys(cls)]
        data = data.get(part) if isinstance(data, dict) else None
        classes = list(dict.fromkeys(cls for item in fields for cls in _classes(item.annotation)))
        kind = data.get("kind") if isinstance(data, dict) else None
        classes = [cls for cls in classes if kind_of(cls) == kind] or classes
    return classes


def with_default_kinds(data: Any, classes: Iterable[type[BaseModel]]) -> Any:
    """The values of a section of one of `classes`, with the `kind` written out where a plug-in's section inside
    leaves it out and the key's default has one: `width: {batch: var}` speaks of the default metric."""
    if isinstance(data, list):
        return [with_default_kinds(item, classes) for item in data]
    if not isinstance(data, dict):
        return data
    classes = list(classes)
    filled = dict(data)
    for cls in [cls for cls in classes if kind_of(cls) == data.get("kind")] or classes:
        for name, item in keys(cls).items():
            value = data.get(name)
            if isinstance(value, dict) and "kind" not in value and isinstance(item.default, Plugin):
                value = {"kind": kind_of(type(item.default)), **value}
            if name in data:
                filled[name] = with_default_kinds(value, _classes(item.annotation))
    return filled


def kind_of(section: type[BaseModel]) -> str | None:
    """The `kind:` that stands for a plug-in's section, None for a plain section."""
    item = section.model_fields.get("kind")
    return item.default if item is not None and isinstance(item.default, str) else None


def fields_named(name: str, model: type[BaseModel]) -> list[Location]:
    """Every path in a file that ends in the key `name`, in the order of the fields."""
    return list(dict.fromkeys(path for path, _ in _walk(model, ()) if path[-1] == name))


def sections_inside(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The classes of all sections below a section."""
    return list(dict.fromkeys(cls for _, classes in _walk(model, ()) for cls in classes))


def _walk(model: type[BaseModel], path: Location) -> Iterator[tuple[Location, list[type[BaseModel]]]]:
    for name, item in keys(model).items():
        classes = list(_classes(item.annotation))
        yield (*path, name), classes
        if len(path) < 10:  # a section that holds itself would go on for ever
            for cls in classes:
                yield from _walk(cls, (*path, name))


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections a field's type admits, inside unions, lists and `Annotated` too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for argument in get_args(annotation):
            yield from _classes(argument)
