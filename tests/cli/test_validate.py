"""`validate`: the lines a user sees, and the exit codes."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from minitron_ray.cli import main

SHIPPED = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))
GOOD = """\
name: small
teacher: {path: ./teacher}
data:
  source: {kind: files, path: texts}
budget:
  parameters: 90M
search:
  space: {mlp: 512..1024 by 128}
distill: {tokens: 40k tokens}
"""


@pytest.fixture
def validate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(text: str | None, *arguments: str):
        if text is not None:
            Path("x.yaml").write_text(text, encoding="utf-8")
        return CliRunner().invoke(main, ["validate", "x.yaml", *arguments])

    return run


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_experiments_are_valid(path):
    result = CliRunner().invoke(main, ["validate", str(path)])
    assert (result.stdout, result.exit_code) == (f"ok: {path}\n", 0)


def test_there_are_shipped_experiments():
    assert {"quickstart", "smollm2_135m_to_90m", "15b_to_8b", "8b_to_4b"} <= {path.stem for path in SHIPPED}


def test_a_good_file(validate):
    result = validate(GOOD)
    assert (result.stdout, result.stderr, result.exit_code) == ("ok: x.yaml\n", "", 0)


MISTAKES = [
    pytest.param(
        "  parameters: 90M",
        "  parameters: 85M..95M\n  tolerance: 3%",
        "x.yaml:7:14: budget.tolerance: no bound of this budget is a centre without a tolerance of its own, so this "
        "key changes nothing; leave it out (with --set replace the whole section: budget={...})",
        id="a tolerance of no centre",
    ),
    pytest.param(
        "  parameters: 90M",
        "  memory: 400MiB\n  tolerance: 3%",
        "x.yaml:7:14: budget.tolerance: no bound of this budget is a centre without a tolerance of its own, so this "
        "key changes nothing; leave it out (with --set replace the whole section: budget={...})",
        id="a tolerance of a limit",
    ),
    pytest.param(
        "  parameters: 90M",
        "  parameters: 90Q..9\n  memory: 400MiB\n  tolerance: 3%",
        "x.yaml:6:15: budget.parameters: expected a count (90M, 1.8B, 7_000), found '90Q'; suffixes are K, M, B and "
        "T in '90Q..9'",
        id="a tolerance of a mistake",
    ),
    pytest.param(
        "  parameters: 90M",
        "  parameters: 90M\n  tolerence: 5%",
        "x.yaml:7:3: budget.tolerence: unknown key; did you mean 'tolerance'?",
        id="unknown key",
    ),
    pytest.param(
        "90M",
        "90Q",
        "x.yaml:6:15: budget.parameters: expected a count (90M, 8B ± 5%), a range of counts"
        " (7.8B..8.5B) or a limit (<= 8B), found '90Q'; suffixes are K, M, B and T",
        id="unit",
    ),
    pytest.param(
        "kind: files",
        "kind: flies",
        "x.yaml:4:18: data.source.kind: unknown kind 'flies'; did you mean 'files'? known kinds: "
        "files, hub, mixture, pypi, tokens",
        id="kind",
    ),
    pytest.param(
        "40k tokens",
        "40k sequences",
        "x.yaml:9:19: distill.tokens: expected a number of tokens (16k tokens, 16384), found '40k sequences'",
        id="another unit",
    ),
    pytest.param(
        "name: small\n",
        "",
        "x.yaml:1:1: name: missing; this key is required",
        id="missing",
    ),
    pytest.param(
        "name: small",
        "name: [small]",
        "x.yaml:1:7: name: expected text, found ['small']",
        id="type",
    ),
    pytest.param(
        "512..1024 by 128",
        "1024..512",
        "x.yaml:8:16: search.space.mlp: the range '1024..512' ends below its start; write 512..1024",
        id="range",
    ),
    pytest.param(
        "{mlp: 512..1024 by 128}",
        "{}",
        "x.yaml:8:3: search.space: name at least one axis: layers, hidden, heads, kv_heads, mlp, experts, expert_mlp",
        id="rule of a section",
    ),
    pytest.param(
        "  parameters: 90M\n",
        "",
        "x.yaml:5:1: budget: empty; give it a value, remove the key, or write null",
        id="empty section",
    ),
    pytest.param(
        "budget:",
        "budget: &b",
        "x.yaml:5:9: budget: the anchor &b; anchors are not supported, remove it",
        id="anchor",
    ),
    pytest.param(
        "90M",
        "!!int 90",
        "x.yaml:6:15: budget.parameters: the tag !!int; tags are not supported, remove it",
        id="tag",
    ),
    pytest.param(
        "budget:",
        "name: other\nbudget:",
        "x.yaml:5:1: name: duplicate key; it already stands in line 1",
        id="duplicate",
    ),
    pytest.param(
        "  parameters",
        "\tparameters",
        "x.yaml:6:1: a tab; YAML is indented with spaces only",
        id="tab",
    ),
]


@pytest.mark.parametrize(("old", "new", "line"), MISTAKES)
def test_one_mistake_is_one_line(validate, old, new, line):
    assert old in GOOD
    result = validate(GOOD.replace(old, new, 1))
    assert (result.stdout, result.stderr, result.exit_code) == ("", line + "\n", 2)


SECTIONS = {
    "shape": "shape: {layers: 3}\n",
    "budget": "budget: {parameters: 90M}\n",
    "search": "search: {space: {mlp: 512..1024 by 128}}\n",
}
REMOVE = "; remove shape to search, or remove budget and search to keep the shape"
NEITHER = "budget: missing; give budget and search to look for the best shape, or shape to fix one"


@pytest.mark.parametrize(
    ("sections", "lines"),
    [
        ("shape", []),
        ("budget search", []),
        ("", [f"x.yaml:1:1: {NEITHER}"]),
        ("search", [f"x.yaml:1:1: {NEITHER}"]),
        (
            "budget",
            ["x.yaml:1:1: search: missing; a budget needs a search (search.space says where to look); or replace "
             "budget by shape"],
        ),
        ("shape budget", [f"x.yaml:6:1: budget: the experiment gives a fixed shape and a budget{REMOVE}"]),
        ("shape search", [f"x.yaml:6:1: search: the experiment gives a fixed shape and a search{REMOVE}"]),
    ],
)  # fmt: skip
def test_one_way_to_a_shape(validate, sections, lines):
    head = GOOD[: GOOD.index("budget:")]
    result = validate(head + "".join(SECTIONS[name] for name in sections.split()))
    assert result.stderr.splitlines() == lines
    assert result.exit_code == (2 if lines else 0)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("shape", "shpe", "x.yaml:5:1: shpe: unknown key; did you mean 'shape'?"),
        ("layers: 3", "layrs: 3", "x.yaml:5:9: shape.layrs: unknown key; did you mean 'layers'?"),
        ("layers: 3", "layers: 0", "x.yaml:5:17: shape.layers: must be at least 1, found 0"),
        (
            "layers: 3",
            "layers: 2..3",
            "x.yaml:5:17: shape.layers: expected one size, found '2..3'; to choose among several give budget and "
            "search instead of shape",
        ),
        (
            "layers: 3",
            "",
            "x.yaml:5:1: shape: name at least one axis: layers, hidden, heads, kv_heads, mlp, experts, expert_mlp",
        ),
    ],
)
def test_mistakes_in_a_shape(validate, old, new, line):
    head = GOOD[: GOOD.index("budget:")] + SECTIONS["shape"]
    assert validate(head.replace(old, new)).stderr == line + "\n"


def test_a_key_that_is_a_word_of_python(validate):
    head = GOOD[: GOOD.index("budget:")] + SECTIONS["shape"]
    assert validate(head + "export: {as: mistral}\n").exit_code == 0
    result = validate(head + "export: {az: mistral}\n")
    assert result.stderr == "x.yaml:6:10: export.az: unknown key; known keys: dtype, as\n"


def test_files_that_are_none(validate):
    assert validate(None).stderr == "error: x.yaml: no such file\n"
    assert validate("").stderr == "error: x.yaml: empty\n"
    Path("x.yaml").write_bytes(b"name: caf\xe9\n")
    assert validate(None).stderr == "x.yaml:1:10: not UTF-8 (byte 0xe9); save it as UTF-8\n"
    Path("x.yaml").write_bytes(b"#" * (2**20 + 1))
    result = validate(None)
    assert (
        result.stderr
        == "error: x.yaml: larger than 1 MB; an experiment file names data, it does not hold it\n"
    )
    assert result.exit_code == 2


def test_several_files_are_all_checked(validate):
    Path("y.yaml").write_text(GOOD.replace("90M", "0"))
    Path("z.yaml").write_text(GOOD.replace("name: small", "nam: small"))
    result = validate(GOOD, "y.yaml", "z.yaml", "w.yaml")
    assert result.stdout == "ok: x.yaml\n"
    assert [line.split(": ")[0] for line in result.stderr.splitlines()] == [
        "y.yaml:6:15",
        "z.yaml:1:1",
        "error",
    ]
    assert result.exit_code == 2


def test_options_are_checked_too(validate):
    assert validate(GOOD, "--set", "search.trials=12").exit_code == 0
    result = validate(GOOD, "--set", "search.trails=12")
    assert (
        result.stderr == "error: --set search.trails=12: search.trails: unknown key; did you mean 'trials'?\n"
    )
    assert result.exit_code == 2


def test_json(validate):
    result = validate(GOOD.replace("90M", "0"), "--json", "--set", "seed=-1")
    assert result.exit_code == 2
    (report,) = json.loads(result.stdout)
    assert report == {
        "file": "x.yaml",
        "ok": False,
        "problems": [
            {
                "origin": "x.yaml",
                "line": 6,
                "column": 15,
                "key": "budget.parameters",
                "problem": "must be at least 1, found 0",
            },
            {
                "origin": "--set seed=-1",
                "line": None,
                "column": None,
                "key": "seed",
                "problem": "must be at least 0, found -1",
            },
        ],
    }
    assert json.loads(validate(GOOD, "--json").stdout) == [{"file": "x.yaml", "ok": True, "problems": []}]


@pytest.mark.parametrize(
    ("text", "arguments", "entry"),
    [
        ("a: [1", [], {"origin": "x.yaml", "line": 1, "column": 4, "problem": "a '[' that is not closed"}),
        ("", [], {"origin": "x.yaml", "line": None, "column": None, "problem": "empty"}),
        (
            GOOD,
            ["--set", "seed"],
            {"origin": "--set", "problem": "--set seed: write it as --set section.key=value"},
        ),
    ],
)
def test_json_of_what_cannot_be_read(validate, text, arguments, entry):
    result = validate(text, "--json", *arguments)
    assert result.exit_code == 2
    (problem,) = json.loads(result.stdout)[0]["problems"]
    assert problem.items() >= entry.items()


def test_no_file_is_a_usage_error():
    result = CliRunner().invoke(main, ["validate"])
    assert result.exit_code == 2
    assert "Missing argument 'EXPERIMENT...'" in result.stderr
