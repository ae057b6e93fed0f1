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


def rewritten(config: Mapping[str, Any], as_type: str) -> dict[str, Any]:
    """`config` as another model type that computes the identical function from the same tensors.

    Raises ConfigError where `as_type` is none of the family's `as_types`, or where the network has
    biases that `as_type` lacks.
    """
    family = family_of(config)
    if as_type == family.model_type:
        return dict(config)
    if as_type not in family.as_types:
        others = ", ".join(family.as_types) or "no other type"
        raise ConfigError(f"a {family.model_type} can't be written as {as_type!r}; it can be as {others}")
    other = family_of({"model_type": as_type})
    plain = family.canonical(config)
    for flag, name in family.attributes.flags.items():
        if flag in other.attributes.flags:
            continue
        if plain.pop(name):
            raise ConfigError(f"the model's config has {name} = true, which {as_type} does not have")
    written = {**family.as_types[as_type], **plain, "model_type": as_type, "architectures": [other.causal_lm]}
    return other.canonical(written)
