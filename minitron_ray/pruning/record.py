"""`CutRecord`: what a cut folder says of itself, for programs (`cut.json`) and people (`README.md`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from minitron_ray import __version__
from minitron_ray.data.location import is_hub_id
from minitron_ray.models.architecture import CUT_AXES, Architecture
from minitron_ray.models.kept import Kept
from minitron_ray.results.files import write_file

CUT: Final = "cut.json"
_PACKAGES: Final = ("torch", "numpy", "safetensors", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class CutRecord:
    """Nothing in it depends on when or how fast it was made: equal cuts have equal records."""

    fingerprint: str
    teacher_path: str
    revision: str | None
    model_type: str
    teacher: Architecture
    student: Architecture
    teacher_parameters: int
    parameters: int
    dtype: str
    importance: Mapping[str, Any]
    rules: Mapping[str, str]
    kept: Kept
    files: Mapping[str, int]
    """Bytes of each weight file."""

    def write(self, folder: Path) -> None:
        """One key a line, since the kept units of a large model are a long list."""
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in self.as_dict().items()]
        write_file(folder / CUT, ("{\n" + ",\n".join(lines) + "\n}\n").encode())

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "fingerprint": self.fingerprint,
            "teacher": {
                "path": self.teacher_path,
                "revision": self.revision,
                "model_type": self.model_type,
                "parameters": self.teacher_parameters,
                **sizes(self.teacher),
            },
            "student": {"parameters": self.parameters, "dtype": self.dtype, **sizes(self.student)},
            "importance": dict(self.importance),
            "cut": dict(self.rules),
            "versions": {"minitron-ray": __version__, **{name: version(name) for name in _PACKAGES}},
            "files": dict(self.files),
            "kept": self.kept.as_dict(),
        }

    def card(self) -> str:
        """Markdown with the front matter that hubs read. The license is the teacher's to state, not ours."""
        base = f"base_model: {self.teacher_path}\n" if is_hub_id(self.teacher_path) else ""
        teacher, student = sizes(self.teacher), sizes(self.student)
        rows = "\n".join(f"| {axis} | {teacher[axis]:,} | {student[axis]:,} |" for axis in teacher)
        how = {
            "magnitude": "by the magnitude of its weights",
            "random": f"at random (seed {self.importance.get('seed')})",
            "run": f"by the importance that run `{self.importance.get('run')}` measured",
        }[self.importance["kind"]]
        return f"""---
library_name: transformers
pipeline_tag: text-generation
{base}tags: [pruning, minitron-ray]
---

# Cut to {self.student.shape_text()}

{self.parameters:,} of the {self.teacher_parameters:,} parameters of `{self.teacher_path}`, chosen {how}.
Nothing was trained after the cut: distill it before use. The tokenizer is the teacher's; its license
and its limits apply.

| | teacher | student |
|---|---|---|
{rows}
| parameters | {self.teacher_parameters:,} | {self.parameters:,} |

`{CUT}` lists every unit that was kept. minitron-ray {__version__}.
"""


def sizes(arch: Architecture) -> dict[str, int]:
    """The sizes of the axes that the network has."""
    return {axis: size for axis in (*CUT_AXES, "head_dim", "vocab") if (size := getattr(arch, axis))}


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a complete folder; None where there is none."""
    try:
        found = json.loads((folder / CUT).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
