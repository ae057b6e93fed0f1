"""`ablation`: what a wrong file is told, what the files of experiments/paper/ hold, and a run through Ray."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from minitron_ray.ablation import read_ablation
from minitron_ray.cli import main
from minitron_ray.core.errors import ConfigError
from minitron_ray.core.loading import load
from minitron_ray.experiment import Experiment

PAPER = sorted((Path(__file__).parents[2] / "experiments" / "paper").glob("*.yaml"))
GOOD = """\
name: small
question: Which is better?
measure: distilled
base:
  teacher: {path: ./teacher}
  data:
    source: {kind: files, path: texts}
  shape: {mlp: 64}
  importance:
    width: {kind: activation, batch: l2}
  distill: {tokens: 4096}
variants:
  wide: {}
  thin:
    shape: {mlp: 32}
  random: {importance: {width: {kind: random}}}
paper:
  source: Table 0
  unit: loss
  figures: {wide: 1.5, thin: 2.5}
"""


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)

    def run(text: str, *arguments: str) -> Result:
        Path("x.yaml").write_text(text, encoding="utf-8")
        return CliRunner().invoke(main, [*(arguments or ("validate",)), "x.yaml"])

    return run


# --- Files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_file_of_the_paper_is_valid(path: Path) -> None:
    from minitron_ray.cli.launch import Loaded, check_plan

    file = read_ablation(path)
    assert file.ablation.name == path.stem
    text = path.read_text(encoding="utf-8")
    assert f"minitron-ray ablation experiments/paper/{path.name}" in text and "on two cores" in text
    for variant in file.variants:  # every shape is one that the teacher has and stock transformers takes
        check_plan(
            Loaded(experiment=variant.experiment, base=variant.base, source=variant.source, overrides=())
        )


def test_the_papers_tables_are_there() -> None:
    assert {path.stem for path in PAPER} >= {
        "width_aggregation",
        "depth_metric",
        "width_vs_depth",
        "loss",
        "iterative_importance",
        "head_merge",
    }


def test_a_variant_is_the_base_with_its_own_values(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD, encoding="utf-8")
    wide, thin, random = (variant.experiment for variant in read_ablation(path).variants)
    assert (wide.name, thin.name, random.name) == ("small-wide", "small-thin", "small-random")
    assert wide.shape and thin.shape and (wide.shape.mlp, thin.shape.mlp) == (64, 32)
    assert thin.importance == wide.importance and wide.importance.width.kind == "activation"
    assert random.importance.width.kind == "random"  # another kind, without the other's keys
    same = {"name", "shape"}
    assert wide.model_dump(exclude=same) == thin.model_dump(exclude=same)


def test_a_variants_source_is_that_experiment(tmp_path: Path) -> None:
    path, alone = tmp_path / "x.yaml", tmp_path / "alone.yaml"
    path.write_text(GOOD, encoding="utf-8")
    for variant in read_ablation(path).variants:
        alone.write_bytes(variant.source)
        assert load(alone, Experiment)[0] == variant.experiment


def test_the_base_may_be_a_file(tmp_path: Path) -> None:
    base = tmp_path / "deep" / "base.yaml"
    base.parent.mkdir()
    inline = GOOD[GOOD.index("  teacher") : GOOD.index("variants")]
    base.write_text("name: base\n" + inline.replace("\n  ", "\n").removeprefix("  "), encoding="utf-8")
    path = tmp_path / "x.yaml"
    path.write_text(GOOD.replace(inline, "").replace("base:\n", "base: deep/base.yaml\n"), encoding="utf-8")
    variants = read_ablation(path).variants
    assert [variant.experiment.name for variant in variants] == ["small-wide", "small-thin", "small-random"]
    assert {variant.base for variant in variants} == {base.parent}

    base.write_text(base.read_text().replace("mlp: 64", "mpl: 64"), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_ablation(path)
    assert caught.value.message == f"{base}:5:9: shape.mpl: unknown key; did you mean 'mlp'?"
    base.unlink()
    with pytest.raises(ConfigError, match=r"x\.yaml:4:7: base: .*base\.yaml: no such file"):
        read_ablation(path)


# --- Mistakes -------------------------------------------------------------------------------------------

MISTAKES = [
    pytest.param("{mlp: 32}", "{mpl: 32}", "x.yaml:15:13: variants.thin.shape.mpl: unknown key; did you mean 'mlp'?"),
    pytest.param("{mlp: 32}", "{mlp: 0}", "x.yaml:15:18: variants.thin.shape.mlp: must be at least 1, found 0"),
    pytest.param(
        "batch: l2}",
        "batch: l3}",
        "x.yaml:10:38: base.importance.width.batch: expected 'mean', 'l2' or 'var', found 'l3'",
    ),
    pytest.param(
        "kind: random",
        "kind: randon",
        "x.yaml:16:39: variants.random.importance.width.kind: unknown kind 'randon'; did you mean 'random'? "
        "known kinds: activation, random, weight_magnitude",
    ),
    pytest.param(
        "thin: 2.5", "thinn: 2.5", "x.yaml:20:24: paper.figures.thinn: no variant has this name; did you mean 'thin'?"
    ),
    pytest.param("  thin:", "  Thin It:", "x.yaml:14:3: variants.Thin It: expected a name of at most 64"),
    pytest.param(
        "  wide: {}",
        "  wide: {name: mine}",
        "x.yaml:13:10: variants.wide.name: a variant is named by its key, this one small-wide; remove name",
    ),
    pytest.param(
        "  wide: {}",
        "  wide: {distill: null}",
        "x.yaml:13:3: variants.wide: this variant has no distill, but measure: distilled compares what",
    ),
    pytest.param("measure: distilled", "measure: cutt", "x.yaml:3:10: measure: expected 'cut' or 'distilled', found"),
    pytest.param("  teacher: {path: ./teacher}\n", "", "x.yaml:5:3: base.teacher: missing; this key is required"),
    pytest.param("question: Which is better?\n", "", "x.yaml:1:1: question: missing; this key is required"),
    pytest.param("  figures: {wide: 1.5, thin: 2.5}", "  figures: {wide: good}", "x.yaml:20:19: paper.figures.wide"),
    pytest.param("variants:\n", "variants: &v\n", "x.yaml:12:11: variants: the anchor &v"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line"), MISTAKES)
@pytest.mark.parametrize("command", ["validate", "ablation"])
def test_a_mistake_is_a_line_with_its_place(
    call: Callable[..., Result], old: str, new: str, line: str, command: str
) -> None:
    assert old in GOOD
    result = call(GOOD.replace(old, new, 1), command)
    assert (result.stdout, result.exit_code) == ("", 2)
    assert line in result.stderr, result.stderr


def test_a_mistake_in_the_base_is_said_once(call: Callable[..., Result]) -> None:
    result = call(GOOD.replace("{tokens: 4096}", "{token: 4096}"))
    assert result.stderr == "x.yaml:11:13: base.distill.token: unknown key; did you mean 'tokens'?\n"


def test_one_variant_is_no_comparison(call: Callable[..., Result]) -> None:
    start, end = GOOD.index("  thin:"), GOOD.index("paper:")
    result = call(GOOD[:start] + GOOD[end:])
    assert "x.yaml:12:1: variants: must have at least 2 items, found 1" in result.stderr


def test_validate_takes_ablations_and_experiments_together(call: Callable[..., Result]) -> None:
    assert call(GOOD).stdout == "ok: x.yaml\n"
    result = call(GOOD, "validate", "--set", "seed=2")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: --set seed=2: x.yaml is an ablation file; edit its base instead\n",
    )


def test_the_other_commands_kind_of_file_is_named(call: Callable[..., Result]) -> None:
    result = call(GOOD, "run")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: x.yaml: an ablation file; run it with: minitron-ray ablation x.yaml\n",
    )
    result = call("name: small\nteacher: {path: ./teacher}\n", "ablation")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: x.yaml: an experiment file; run it with: minitron-ray run x.yaml\n",
    )


def test_only_names_variants(call: Callable[..., Result]) -> None:
    result = call(GOOD, "ablation", "--only", "thi")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: --only thi: x.yaml has no such variant; did you mean 'thin'?\n",
    )
    assert call(GOOD, "ablation", "--json", "--markdown").exit_code == 2


# --- Through Ray ----------------------------------------------------------------------------------------

TINY = """\
name: tiny
question: Do fewer layers or fewer neurons hurt less?
measure: distilled
base:
  precision: float32
  teacher: {path: ./model}
  data:
    source: {kind: files, path: "text/**/*.txt"}
    sequence_length: 32
    calibration: 8
    validation: 8
  distill: {tokens: 1024, learning_rate: 3e-3}
variants:
  depth: {shape: {layers: 3}}
  width: {shape: {mlp: 64}}
paper: {source: Table 0, unit: loss, figures: {depth: 2, width: 1}}
"""


def test_variants_that_fail_are_in_the_table_and_end_the_command(
    call: Callable[..., Result], tmp_path: Path, tiny_llama: Path
) -> None:
    """The text of one is missing and the teacher of the other: both are tried, nothing is hidden."""
    text = TINY.replace("./model", str(tiny_llama)).replace(
        "  width: {shape: {mlp: 64}}", "  width: {shape: {mlp: 64}, teacher: {path: ./nowhere}}"
    )
    result = call(text, "ablation", "--quiet", "--out", "tables", "--json")
    assert result.exit_code == 2
    rows = {row["variant"]: row for row in json.loads(result.stdout)["rows"]}
    assert [row["status"] for row in rows.values()] == ["failed", "failed"]
    assert "text" in rows["depth"]["reason"] and "nowhere" in rows["width"]["reason"]
    assert "2 of 2 variants failed: depth, width; the first said: " in result.stderr
    page = (tmp_path / "tables" / "tiny.md").read_text()
    assert "- failed: depth: " in page and "- failed: width: " in page


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tiny_ablation(tmp_path: Path, tiny_llama: Path, tiny_text: Path) -> None:
    from tests.end_to_end.desk import Desk

    desk = Desk.lay(tmp_path, tiny_llama, tiny_text)
    (tmp_path / "ablation.yaml").write_text(TINY, encoding="utf-8")
    try:
        # One variant first: the other is listed as not run, and the table is written.
        out, err = desk.call("ablation", "ablation.yaml", "--only", "width", "--out", "tables", "--json")
        first = {row["variant"]: row for row in json.loads(out)["rows"]}
        assert first["depth"]["status"] == "not run" and first["depth"]["rank"] is None
        assert first["width"]["status"] == "succeeded" and first["width"]["rank"] == 1
        assert "variant 1 of 1: width" in err

        out, err = desk.call("ablation", "ablation.yaml", "--out", "tables", "--json")
        comparison = json.loads(out)
        rows = {row["variant"]: row for row in comparison["rows"]}
        assert rows["width"]["run_id"] == first["width"]["run_id"]  # not run a second time
        for row in rows.values():
            assert row["distilled_loss"] < row["cut_loss"] and row["distilled_divergence"] > 0
            assert row["parameters"] and row["teacher_loss"] == rows["width"]["teacher_loss"]
        losses = {name: row["distilled_loss"] for name, row in rows.items()}
        best, other = sorted(losses, key=lambda name: losses[name])
        assert (rows[best]["rank"], rows[other]["rank"]) == (1, 2)
        assert rows[other]["difference"] == pytest.approx(losses[other] - losses[best], abs=1e-9)
        assert rows[other]["difference_stderr"] > 0 and comparison["sequences"] == 8
        assert comparison["tau"] == (1 if best == "width" else -1)

        with (tmp_path / "tables" / "tiny.csv").open() as stream:
            written = {row["variant"]: row for row in csv.DictReader(stream)}
        assert float(written["depth"]["distilled_loss"]) == pytest.approx(losses["depth"], abs=1e-6)
        page = (tmp_path / "tables" / "tiny.md").read_text()
        assert "Kendall's tau" in page and "Table 0" in page

        out, _ = desk.call("report", rows["depth"]["run_id"])  # each variant is a run like any other
        assert "tiny-depth" in out
    finally:
        desk.clear()
