"""A cluster of two nodes on loopback, started with `ray start` as cluster/README.md says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.end_to_end.desk import Desk
from tests.end_to_end.nodes import Nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Two nodes of one CPU each."""
    with Nodes() as nodes:
        nodes.head()
        nodes.join()
        yield nodes.address


def test_workers_on_both_nodes_distill_together(desk: Desk, address: str) -> None:
    (desk.folder / "cluster.yaml").write_text("workers: 2\nconcurrent_trials: 2\n")
    out, err = desk.run("--cluster", "cluster.yaml", "--address", address, "--set", "distill.tokens=4k")
    assert "exported" in out and "Traceback" not in err
    assert {row["workers"] for row in desk.rows("steps")} == {2}
    assert [row["status"] for row in desk.rows("runs")][-1] == "succeeded"


def test_doctor_looks_at_a_cluster_before_a_run_does(desk: Desk, address: str) -> None:
    desk.results.mkdir(exist_ok=True)
    out, _ = desk.call("doctor", "--address", address)
    assert (
        f"{address}: 2 nodes, 2 CPUs, 0 GPUs; room for 2 workers; the same versions on the nodes, which see"
        in out
    )
    (desk.folder / "cluster.yaml").write_text(f"address: {address}\nworkers: 5\n")
    out, err = desk.call("doctor", "--cluster", "cluster.yaml", expect=3)
    assert "FAIL  cluster         5 workers of 1 CPUs and 0 GPUs do not fit" in out and "Traceback" not in err
    (desk.folder / "cluster.yaml").write_text(
        f"address: {address}\nworkers: 5\nworker: {{cpus: 1}}\nautoscale: true\n"
    )
    out, _ = desk.call("doctor", "--cluster", "cluster.yaml")
    assert "warn  cluster" in out and "a run asks for more nodes (autoscale)" in out
    out, _ = desk.call("doctor", "--cluster", "cluster.yaml", expect=3, RAY_AUTH_TOKEN="0" * 64)
    assert "FAIL  cluster" in out and "the same token" in out


def test_another_token_is_refused_in_a_line(desk: Desk, address: str) -> None:
    _, err = desk.call("run", "tiny.yaml", "--address", address, expect=3, RAY_AUTH_TOKEN="0" * 64)
    assert "could not be reached" in err and "the same token" in err and "Traceback" not in err


def test_a_cluster_without_room_for_the_workers_says_so(desk: Desk, address: str) -> None:
    (desk.folder / "cluster.yaml").write_text("workers: 5\n")
    _, err = desk.call("run", "tiny.yaml", "--cluster", "cluster.yaml", "--address", address, expect=3)
    assert "5 workers of 1 CPUs and 0 GPUs do not fit" in err and "lower `workers`" in err
