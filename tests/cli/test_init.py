"""`init`: a new experiment that is valid as it stands."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from minitron_ray.cli import main
from minitron_ray.core.loading import load
from minitron_ray.experiment import Experiment

TEMPLATES = [
    "quickstart",
    "smollm2_135m_to_90m",
    "smollm2_135m_to_110m",
    "smollm2_110m_to_90m",
    "15b_to_8b",
    "8b_to_4b",
]


@pytest.fixture
def init(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, ["init", *arguments])


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_copy_has_its_own_name_and_nothing_else_changes(init, template):
    result = init("folder/mine", "--template", template)
    assert result.exit_code == 0, result.output
    copy, _ = load("folder/mine.yaml", Experiment)
    original, _ = load(Path(__file__).parents[2] / "experiments" / f"{template}.yaml", Experiment)
    assert copy == original.model_copy(update={"name": "mine"})
    assert "next: minitron-ray plan folder/mine.yaml" in result.stdout


def test_files_a_template_names_come_along(init):
    result = init("mine.yaml", "--template", "15b_to_8b")
    assert result.stdout.startswith("wrote mine.yaml, models/nemotron-4-15b.json\n")
    assert json.loads(Path("models/nemotron-4-15b.json").read_text())["hidden_size"] == 6144


def test_nothing_is_overwritten(init):
    Path("mine.yaml").write_text("precious")
    Path("models").mkdir()
    Path("models/nemotron-4-15b.json").write_text("{}")
    result = init("mine")
    assert (result.stderr, result.exit_code) == ("error: mine.yaml: exists already; choose another name\n", 2)
    assert init("other", "--template", "15b_to_8b").exit_code == 0
    assert Path("models/nemotron-4-15b.json").read_text() == "{}"
    assert Path("mine.yaml").read_text() == "precious"


def test_a_misspelt_template(init):
    result = init("mine", "--template", "quikstart")
    assert result.stderr.startswith(
        "error: --template: no template 'quikstart'; did you mean 'quickstart'? there are "
    )
    assert all(name in result.stderr for name in TEMPLATES)
    assert result.exit_code == 2
    assert not Path("mine.yaml").exists()


def test_a_name_that_no_experiment_can_have(init):
    result = init("Mine!")
    assert "'Mine!' can't be the name of an experiment; use lower-case letters" in result.stderr
    assert result.exit_code == 2


def test_a_place_that_cannot_be_written(init):
    Path("file").write_text("")
    result = init("file/mine")
    assert result.stderr.startswith("error: file") and "can't be written" in result.stderr
    assert result.exit_code == 2
