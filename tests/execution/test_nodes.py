"""What keeps a run from spreading over a cluster whose nodes lack its files or its versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minitron_ray.core.errors import EnvironmentFailure
from minitron_ray.execution.nodes import _look, judge


def test_nodes_that_see_the_same_pass(tmp_path: Path) -> None:
    here = _look(str(tmp_path))
    assert here["folder"] and here["versions"]["torch"] is not None
    judge(tmp_path, here, {"10.0.0.1": here, "10.0.0.2": here})


def test_a_node_without_the_folder_is_named(tmp_path: Path) -> None:
    here = _look(str(tmp_path))
    there = {
        "10.0.0.1": here,
        "10.0.0.2": _look(str(tmp_path / "elsewhere")) | {"versions": here["versions"]},
    }
    with pytest.raises(EnvironmentFailure, match=r"not there on node 10\.0\.0\.2; --results must name"):
        judge(tmp_path, here, there)


@pytest.mark.parametrize(("other", "said"), [("0.0.1", r"0\.0\.1"), (None, "not installed")])
def test_a_node_with_another_version_is_named(tmp_path: Path, other: str | None, said: str) -> None:
    here = _look(str(tmp_path))
    there: dict[str, dict[str, Any]] = {
        f"10.0.0.{number}": here | {"versions": here["versions"] | {"torch": other}} for number in range(5)
    }
    with pytest.raises(EnvironmentFailure, match=rf"torch is .* but {said} on node .*0\.0\.2 and 2 more"):
        judge(tmp_path, here, there)
