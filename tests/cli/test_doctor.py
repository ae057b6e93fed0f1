"""`doctor`: what stops a run is a failure, what endangers it a warning."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from minitron_ray.cli import main
from minitron_ray.cli.machine import metadata_version


@pytest.fixture
def doctor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, ["doctor", *arguments])


def findings(result):
    return {entry["name"]: entry for entry in json.loads(result.stdout)}


def test_this_machine_can_run(doctor):
    result = doctor("--json", "--results", "new/results")
    found = findings(result)
    assert result.exit_code == 0, result.output
    assert found["torch"] == {"name": "torch", "status": "ok", "value": metadata_version("torch"), "hint": ""}
    assert found["results"]["value"] == "new/results (will be made)"
    assert not Path("new").exists()
    assert {"python", "ray", "cpu", "memory", "gpu", "disk", "pip", "ray token"} <= found.keys()
    text = doctor().stdout
    assert all(f"  {name} " in text for name in found)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="there is no distutils to take away")
def test_looking_does_not_change_what_can_be_imported():
    """Before Python 3.12 a look for the module `pip` takes setuptools' distutils away from its process."""
    program = (
        "import pathlib; from minitron_ray.cli.machine import examine; examine(pathlib.Path('results'));"
        "import distutils.core, setuptools"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_results_that_are_a_file(doctor):
    Path("file").write_text("")
    result = doctor("--results", "file/results")
    assert "FAIL  results" in result.stdout
    assert "file is a file; name a folder with --results" in result.stdout
    assert (result.stderr, result.exit_code) == ("error: a run can't work here: results\n", 3)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
def test_results_that_cannot_be_written(doctor):
    result = doctor("--json", "--results", "/proc/self/results")
    assert findings(result)["results"]["status"] == "failure"
    assert "is not writable" in findings(result)["results"]["value"]
    assert result.exit_code == 3


def test_a_token_that_others_may_read(doctor, monkeypatch, tmp_path):
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    found = findings(doctor("--json"))["ray token"]
    assert (found["status"], found["hint"]) == ("warning", f"chmod 600 {token}")
    assert "secret" not in json.dumps(found)
    token.chmod(0o600)
    assert findings(doctor("--json"))["ray token"]["status"] == "ok"


def test_authentication_switched_off(doctor, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    found = findings(doctor("--json"))["ray token"]
    assert found["status"] == "warning"
    assert "anyone who reaches the cluster's ports can run code" in found["value"]


def test_versions_are_read_without_importing():
    assert metadata_version("click") is not None
    assert metadata_version("no-such-package-anywhere") is None
