"""What keeps a run from spreading over a cluster whose nodes lack its files or its versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.execution.nodes import _look, judge


def test_nodes_that_see_the_same_pass(tmp_path: Path) -> None:
    names = [str(tmp_path)]
    here = _look(names)
    assert here["folders"] == [True] and here["versions"]["torch"] is not None
    judge(names, here, {"10.0.0.1": here, "10.0.0.2": here})


@pytest.mark.parametrize(
    ("missing", "said"), [(0, "--results must name"), (1, "a model must be at the same path on every node")]
)
def test_a_node_without_a_folder_is_named(tmp_path: Path, missing: int, said: str) -> None:
    names = [str(tmp_path / "results"), str(tmp_path / "model")]
    for name in names:
        Path(name).mkdir()
    here = _look(names)
    Path(names[missing]).rmdir()
    with pytest.raises(EnvironmentFailure, match=rf"{names[missing]}: not there on node 10\.0\.0\.2; {said}"):
        judge(names, here, {"10.0.0.1": here, "10.0.0.2": _look(names)})


def test_what_the_run_itself_does_not_see_is_asked_of_nobody(tmp_path: Path) -> None:
    names = [str(tmp_path / "elsewhere")]
    judge(names, _look(names), {"10.0.0.1": _look(names)})


@pytest.mark.parametrize(("other", "said"), [("0.0.1", r"0\.0\.1"), (None, "not installed")])
def test_a_node_with_another_version_is_named(tmp_path: Path, other: str | None, said: str) -> None:
    here = _look([str(tmp_path)])
    there: dict[str, dict[str, Any]] = {
        f"10.0.0.{number}": here | {"versions": here["versions"] | {"torch": other}} for number in range(5)
    }
    with pytest.raises(EnvironmentFailure, match=rf"torch is .* but {said} on node .*0\.0\.2 and 2 more"):
        judge([str(tmp_path)], here, there)
