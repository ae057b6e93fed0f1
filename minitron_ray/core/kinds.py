"""The folder is the registry: a `kind:` in YAML is the name of a file in a plug-in folder.

Each file of such a folder holds exactly one public class derived from `Plugin`: its fields are
its YAML keys, its methods are its behaviour. Importing a plug-in's module must cost neither torch
nor ray; heavy names belong under `TYPE_CHECKING` or in method bodies.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection
from typing import Annotated, Any, Union

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A part of an experiment file: immutable, and refusing keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, serialize_by_alias=True)


def missing_choice(problem: str, *others: str) -> PydanticCustomError:
    """Raised by the validator of a key that may be left out only where one of `others` is given."""
    return PydanticCustomError("missing_choice", "{problem}", {"problem": problem, "others": list(others)})


def keys(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The keys that a section has in a file: its fields, by alias where a field has one."""
    return {item.alias or name: item for name, item in section.model_fields.items()}


class Plugin(Section):
    """A section chosen by its `kind:`. Subclasses declare `kind: Literal["<file name>"]`."""


def plugins(package: str, without: Collection[str] = ()) -> dict[str, type[Plugin]]:
    """The plug-ins of a folder, by kind (= file name), in alphabetical order.

    `without` names kinds that are left out and not imported: a plug-in that holds others of its own
    folder names itself. Raises TypeError where a file does not hold exactly one plug-in that carries
    the file's name.
    """
    found: dict[str, type[Plugin]] = {}
    folder = importlib.import_module(package)
    for info in sorted(pkgutil.iter_modules(folder.__path__), key=lambda i: i.name):
        if info.name in without:
            continue
        module = importlib.import_module(f"{package}.{info.name}")
        classes = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Plugin) and value.__module__ == module.__name__
        ]
        if len(classes) != 1 or classes[0].model_fields["kind"].default != info.name:
            raise TypeError(
                f"{module.__name__} must hold one Plugin with kind {info.name!r}, found {classes}"
            )
        found[info.name] = classes[0]
    return found


def one_of(package: str, without: Collection[str] = ()) -> Any:
    """The type of a field that holds any plug-in of `package`: a union told apart by `kind`."""
    classes = tuple(plugins(package, without).values())
    if len(classes) == 1:
        return classes[0]
    return Annotated[Union[classes], Field(discriminator="kind")]  # noqa: UP007 - built at run time
