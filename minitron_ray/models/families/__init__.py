"""The table of every supported network; one file each, named by the `model_type` of its config.json."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minitron_ray.core.errors import ConfigError

if TYPE_CHECKING:
    from minitron_ray.models.family import Family


def supported() -> tuple[str, ...]:
    """The model types that have a table, in alphabetical order."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__)))


def family_of(config: Mapping[str, Any]) -> Family:
    """The family named by a config's `model_type`. Raises ConfigError where there is none."""
    model_type = config.get("model_type")
    known = supported()
    if not isinstance(model_type, str):
        raise ConfigError(f"the model's config names no model_type; supported are {', '.join(known)}")
    if model_type not in known:
        raise ConfigError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(known)} "
            f"(a new family is one file: minitron_ray/models/families/{model_type}.py)"
        )
    family: Family = importlib.import_module(f"{__name__}.{model_type}").FAMILY
    return family
