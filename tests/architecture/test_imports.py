"""Commands and plug-ins stay light: what they import is measured in a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "ray",
    "transformers",
    "datasets",
    "accelerate",
    "optuna",
    "safetensors",
    "gguf",
    "tokenizers",
}
DATA = {"numpy", "pyarrow", "duckdb", "pandas"}
PLUGINS = [
    "minitron_ray.data.sources",
    "minitron_ray.distillation.losses",
    "minitron_ray.importance.depth",
    "minitron_ray.importance.width",
    "minitron_ray.models.families",
    "minitron_ray.search.samplers",
]


def imported_by(code: str) -> set[str]:
    """Top-level names of the modules in memory after `code` ran in a fresh process."""
    report = (
        "import json, sys\nprint('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == 0, finished.stderr
    return set(json.loads(finished.stdout.splitlines()[-1]))


def command(*arguments: str) -> str:
    return f"""
from minitron_ray.cli import main
try:
    main({list(arguments)!r})
except SystemExit as end:
    assert not end.code, end.code
"""


def test_help_needs_click_alone():
    before = imported_by("import click, difflib")
    others = {name for name in imported_by(command("--help")) - before if name not in sys.stdlib_module_names}
    assert others == {"minitron_ray"}


@pytest.mark.parametrize("name", ["run", "plan", "report", "query", "doctor"])
def test_help_of_a_command_loads_nothing_heavy(name):
    assert not imported_by(command(name, "--help")) & (HEAVY | DATA | {"pydantic", "rich"})


def test_validate_loads_nothing_heavy():
    loaded = imported_by(command("validate", "experiments/quickstart.yaml"))
    assert "pydantic" in loaded
    assert not loaded & (HEAVY | {"duckdb", "pandas"})


def test_the_schema_loads_nothing_heavy():
    assert not imported_by(command("schema")) & HEAVY


@pytest.mark.parametrize("package", PLUGINS)
def test_every_module_of_a_plug_in_folder_is_light(package):
    code = f"""
import importlib, pkgutil
package = importlib.import_module({package!r})
names = [info.name for info in pkgutil.iter_modules(package.__path__)]
assert names
for name in names:
    importlib.import_module(f"{package}.{{name}}")
"""
    assert not imported_by(code) & HEAVY


@pytest.mark.parametrize("package", ["core", "models", "results", "report", "plan", "experiment"])
def test_planning_and_reporting_need_no_tensor_library(package):
    code = f"""
import importlib, pkgutil
package = importlib.import_module("minitron_ray.{package}")
for info in pkgutil.walk_packages(getattr(package, "__path__", []), package.__name__ + "."):
    importlib.import_module(info.name)
"""
    assert not imported_by(code) & HEAVY
