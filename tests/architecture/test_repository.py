"""The repository keeps its own rules: sizes, names, and documents that say what is there."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from minitron_ray.core.errors import MinitronError
from minitron_ray.core.loading import load
from minitron_ray.execution.settings import ClusterSettings
from minitron_ray.experiment import Experiment
from minitron_ray.plan import make_plan
from minitron_ray.results.schemas import TABLES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "minitron_ray"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md")])

LONGEST_FILE = 500
LONGEST_FUNCTION = 80


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


# --- Experiments and clusters ---------------------------------------------------------------------------


def test_every_experiment_validates() -> None:
    experiments = sorted(name(path) for path in (ROOT / "experiments").glob("*.yaml"))
    assert "experiments/quickstart.yaml" in experiments
    done = subprocess.run(
        [sys.executable, "-m", "minitron_ray", "validate", *experiments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"ok: {experiment}" in done.stdout for experiment in experiments), done.stdout


def test_cluster_readme_explains_every_field() -> None:
    table = read("cluster/README.md")
    missing = [field for field in ClusterSettings.model_fields if f"`{field}" not in table]
    assert not missing


# --- Documents ------------------------------------------------------------------------------------------


def test_readme_maps_every_part_of_the_package() -> None:
    parts = {f"{p.name}/" for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    parts |= {p.name for p in PACKAGE.glob("*.py") if p.name != "__init__.py"}
    file_map = read("README.md").partition("## File map")[2]
    listed = set(
        re.findall(r"^\| `([\w./]+)` \|", file_map.partition("| beside it |")[0], flags=re.MULTILINE)
    )
    assert listed == parts


def test_readme_shows_experiments_that_plan(tmp_path: Path) -> None:
    """The first, and its teacher with the search that is shown for itself: shapes enough for its trials."""
    first, *others = re.findall(r"^```yaml\n(.*?)^```", read("README.md"), flags=re.MULTILINE | re.DOTALL)
    [search] = [block for block in others if re.search("^search:", block, flags=re.MULTILINE)]
    config = json.loads(read("experiments/models/smollm2-135m.json"))
    of_the_model, _, _ = first.partition("budget:")
    for text in (first, of_the_model + search):
        file = tmp_path / "my_100m.yaml"
        file.write_text(text, encoding="utf-8")
        experiment, _ = load(file, Experiment)
        assert len(make_plan(experiment, config).feasible) >= experiment.searched.trials
    assert experiment.name in read("README.md").partition("minitron-ray init ")[2]


def test_readme_lists_every_command() -> None:
    from minitron_ray.cli import main

    assert isinstance(main, click.Group)
    assert set(re.findall(r"^\| `minitron-ray (\w+)", read("README.md"), flags=re.MULTILINE)) == set(
        main.commands
    )


def test_readme_lists_every_table() -> None:
    listed = re.search(r"^Tables: (.*?)\.", read("README.md"), flags=re.MULTILINE | re.DOTALL)
    assert listed and set(re.findall(r"`(\w+)`", listed[1])) == set(TABLES)


def test_readme_lists_every_exit_code() -> None:
    classes = [MinitronError]
    for one in classes:  # which grows
        classes += one.__subclasses__()
    codes = {one.exit_code for one in classes}
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", read("README.md"), flags=re.MULTILINE)}
    assert listed == codes | {0}


def test_readme_has_a_place_for_the_report() -> None:
    assert re.search(
        r"^<!-- report:begin -->\n.*<!-- report:end -->$", read("README.md"), re.DOTALL | re.MULTILINE
    )


def test_contributing_lists_every_plugin_folder() -> None:
    folders = set(
        re.findall(r"one_of\(\"minitron_ray\.([\w.]+)\"\)", "".join(p.read_text() for p in MODULES))
    )
    assert len(folders) >= 5
    text = read("CONTRIBUTING.md")
    missing = [
        folder for folder in folders if f"`minitron_ray/{folder.replace('.', '/')}/<kind>.py`" not in text
    ]
    assert not missing


def test_contributing_states_the_layers_that_are_enforced() -> None:
    contracts = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["id"] == "layers")
    stated = " ".join(read("CONTRIBUTING.md").split())
    assert " > ".join(layers).removeprefix("__main__ > ") in stated


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_between_documents_hold(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_changelog_names_what_is_being_made() -> None:
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    heading = re.search(r"^## (.*)$", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert heading and ("Unreleased" in heading[1] or version in heading[1])


def test_version_is_stated_once_and_the_same() -> None:
    import minitron_ray

    assert minitron_ray.__version__ == tomllib.loads(read("pyproject.toml"))["project"]["version"]


# --- Build ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("run", ".venv/bin/minitron-ray run experiments/quickstart.yaml"),
        ("test", ".venv/bin/python -m pytest"),
        ("lint", ".venv/bin/lint-imports"),
        ("check", ".venv/bin/python -m pytest"),
        ("clean", "rm -rf .venv"),
        ("help", "make run"),
    ],
)
def test_make_target(target: str, command: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert command in done.stdout


def test_ci_runs_lint_and_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111 == 0o111
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    assert re.search(r"^make lint\nmake test", script.read_text(encoding="utf-8"), flags=re.MULTILINE)


# --- Code -----------------------------------------------------------------------------------------------


def test_files_and_functions_are_short() -> None:
    long = []
    for path in (*MODULES, *TESTS):
        text = path.read_text(encoding="utf-8")
        measured = [("the file", len(text.splitlines()), LONGEST_FILE)]
        measured += [(function, lines, LONGEST_FUNCTION) for function, lines in functions(text)]
        long += [
            f"{name(path)}: {what} has {lines} lines" for what, lines, limit in measured if lines >= limit
        ]
    assert long == []


def functions(text: str) -> Iterator[tuple[str, int]]:
    """Every function of a module with its length in lines, docstring and decorators included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - first + 1


def test_nothing_is_left_for_later() -> None:
    later = re.compile(r"\b(TODO|FIXME|XXX|NotImplemented\w*)\b")
    assert [name(path) for path in MODULES if later.search(path.read_text(encoding="utf-8"))] == []


def test_a_module_is_a_noun() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
    assert [
        name(path) for path in MODULES if vague & set(path.with_suffix("").relative_to(PACKAGE).parts)
    ] == []


def test_every_module_says_what_it_owns() -> None:
    silent = [path for path in MODULES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert [name(path) for path in silent] == []
