"""`Candidate`: a student's shape, and why it cannot be cut from a teacher where it cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.fingerprint import digest
from minitron_ray.models.architecture import CUT_AXES, Architecture, shape_text
from minitron_ray.models.families import family_of
from minitron_ray.models.family import Family
from minitron_ray.search import heads
from minitron_ray.search.selection import PLAIN, CutRules

S = TypeVar("S", int, NDArray[np.int64])


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A size on every axis that a cut may shorten; 0 where the teacher does not have the axis."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    experts: int = 0
    expert_mlp: int = 0

    @property
    def id(self) -> str:
        """Ten hex digits of the digest of the shape: equal shapes have equal ids in every run."""
        shape = {
            "layers": self.layers,
            "hidden": self.hidden,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "mlp": self.mlp,
        }
        if self.experts:  # without them, ids are what they were before there were experts
            shape |= {"experts": self.experts, "expert_mlp": self.expert_mlp}
        return digest(shape)[:10]

    def architecture(self, teacher: Architecture) -> Architecture:
        """The student as a network on paper."""
        return teacher.with_sizes(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            mlp=self.mlp,
            experts=self.experts,
            expert_mlp=self.expert_mlp,
        )

    def shape_text(self) -> str:
        """For people, see `models.architecture.shape_text`."""
        return shape_text(
            self.layers, self.hidden, self.heads, self.kv_heads, self.mlp, self.experts, self.expert_mlp
        )


def shape_of(teacher: Architecture, sizes: Mapping[str, int], rules: CutRules = PLAIN) -> Candidate:
    """The shape with these sizes by axis; one that is not named keeps the teacher's, see `completed`."""
    return Candidate(**{axis: getattr(teacher, axis) for axis in CUT_AXES} | completed(teacher, sizes, rules))


def completed(teacher: Architecture, sizes: Mapping[str, S], rules: CutRules = PLAIN) -> dict[str, S]:
    """The sizes, of one shape or of many, with those that follow from the ones that are named.

    Of heads and KV groups the one that is not named follows the other: groups follow heads where each
    of the teacher's heads has keys and values of its own; heads follow groups, as many in each as in
    the teacher, where groups are dropped and not averaged.
    """
    found = dict(sizes)
    if "heads" not in sizes and "kv_heads" in sizes and rules.kv_groups == "drop":
        found["heads"] = sizes["kv_heads"] * teacher.heads_per_group
    elif "heads" in sizes and "kv_heads" not in sizes and teacher.heads_per_group == 1:
        found["kv_heads"] = sizes["heads"]
    return found


def check_axes(family: Family, named: Iterable[str], where: str) -> None:
    """Raises ConfigError for an axis that the family does not have; `where` is the place that names them."""
    for axis in named:
        if axis not in family.cut_axes:
            raise ConfigError(
                f"{where}.{axis}: {family.model_type} has no {axis} to cut; it has {', '.join(family.cut_axes)}"
            )


class Refusals:
    """Why shapes of one teacher cannot be cut or built. `way_out` is what to write for another model type."""

    def __init__(
        self,
        family: Family,
        teacher: Architecture,
        rules: CutRules = PLAIN,
        way_out: str = "export: {{as: {type}}}",
    ) -> None:
        self._family, self._teacher, self._rules, self._way_out = family, teacher, rules, way_out
        self._others = [other for name in family.as_types if (other := _as_type(family, teacher, name))]

    def of(self, shape: Candidate, arch: Architecture | None = None) -> str | None:
        """The reason, None where there is none. `arch` is the shape's, where it is at hand."""
        return (
            _above(shape, self._teacher)
            or heads.problem(shape, self._teacher, self._rules)
            or self._unbuildable(arch or shape.architecture(self._teacher))
        )

    def of_many(self, sizes: Mapping[str, NDArray[np.int64]]) -> NDArray[np.object_]:
        """`of` for shapes with these sizes on all of CUT_AXES, (shapes,) int64 each.

        Most axes are held against nothing but the teacher's size, so shapes that differ on these alone
        share one judgement.
        """
        keys = np.zeros(len(sizes["layers"]), dtype=np.int64)
        related = self._family.related_axes(self._teacher).union(
            *(other.related_axes(self._teacher) for other in self._others)
        )
        for axis in CUT_AXES:
            values, own = sizes[axis], getattr(self._teacher, axis)
            if axis not in related:
                values = np.where((values >= 1) & (values <= own), own, values)
            found, places = np.unique(values, return_inverse=True)
            keys = np.unique(keys * len(found) + places, return_inverse=True)[1]
        _, examples = np.unique(keys, return_index=True)
        reasons = np.empty(len(examples), dtype=object)
        for place, example in enumerate(examples.tolist()):
            reasons[place] = self.of(Candidate(**{axis: int(sizes[axis][example]) for axis in CUT_AXES}))
        judged: NDArray[np.object_] = reasons[keys]
        return judged

    def _unbuildable(self, arch: Architecture) -> str | None:
        problems = self._family.problems(arch)
        for other in self._others if problems else ():
            if not other.problems(arch):
                problems.append(f"`{self._way_out.format(type=other.model_type)}` takes it")
                break
        return "; ".join(problems) or None


def _as_type(family: Family, teacher: Architecture, name: str) -> Family | None:
    """The table of another model type that `teacher` can be written as (`models.families.rewritten`)."""
    other = family_of({"model_type": name})
    lacking = family.attributes.flags.keys() - other.attributes.flags.keys()
    return None if any(getattr(teacher, flag) for flag in lacking) else other


def _above(shape: Candidate, teacher: Architecture) -> str | None:
    for axis in CUT_AXES:
        if getattr(shape, axis) > getattr(teacher, axis):
            return f"{axis} {getattr(shape, axis)} is above the teacher's {getattr(teacher, axis)}"
    return None
