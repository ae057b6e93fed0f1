"""Every mistake at once, each as one plain sentence with its place."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from minitron_ray.core.bounds import CountBounds
from minitron_ray.core.errors import ConfigError
from minitron_ray.core.kinds import Plugin, Section
from minitron_ray.core.loading import check, load
from minitron_ray.core.units import Choices, Fraction


class Files(Plugin):
    kind: Literal["files"] = "files"
    path: str
    betas: tuple[float, float] = (0.9, 0.95)


class Hub(Plugin):
    kind: Literal["hub"] = "hub"
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{4}$")]
    split: Literal["train", "test"] = "train"


class Budget(Section):
    parameters: CountBounds
    tolerance: Fraction = 0.05


class Order(Section):
    low: float = 0.0
    high: float = 1.0
    names: Annotated[list[str], Field(min_length=1, max_length=2)] | None = None

    @model_validator(mode="after")
    def _in_order(self):
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Backup(Section):
    source: Annotated[Files | Hub, Field(discriminator="kind")] = Files(path="q")


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=100)] = 0
    rate: Annotated[float, Field(gt=0)] = 0.5
    strict: bool = True
    budget: Budget
    source: Annotated[Files | Hub, Field(discriminator="kind")]
    only: Files | None = None
    sizes: Choices | None = None
    config: dict[str, Any] | str | None = None
    order: Order = Order()
    backup: Backup = Backup()


GOOD = {
    "name": "name: x",
    "budget": "budget: {parameters: 90M}",
    "source": "source: {kind: files, path: p}",
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a file of the good lines with some replaced, and loads it."""
    monkeypatch.chdir(tmp_path)

    def write(*overrides: str, **lines: str):
        (tmp_path / "x.yaml").write_text("\n".join((GOOD | lines).values()), encoding="utf-8")
        return load("x.yaml", Recipe, overrides)

    return write


def test_a_good_file(recipe, tmp_path):
    value, document = recipe("seed=7", sizes="sizes: 1..3", order="order: {low: 0, high: 2}")
    assert (value.name, value.seed, value.budget.parameters) == ("x", 7, CountBounds(centre=90_000_000))
    assert value.sizes == Choices(values=(1, 2, 3))
    assert value.source == Files(path="p")
    assert document.source == (tmp_path / "x.yaml").read_bytes()
    assert recipe(budget="budget: {parameters: 1B..2B}")[0].budget.parameters == CountBounds(
        low=10**9, high=2 * 10**9
    )


@pytest.mark.parametrize("betas", [None, "[0.5, 0.6]"])
def test_a_section_without_kind_is_of_the_defaults(recipe, betas):
    """By an option, in the file, or both; another kind that is named is that one."""
    given = "path: r" if betas is None else f"path: r, betas: {betas}"
    meant = Backup(source=Files(path="r", betas=(0.9, 0.95) if betas is None else (0.5, 0.6)))
    assert recipe(a=f"backup: {{source: {{{given}}}}}")[0].backup == meant
    options = ["backup.source.path=r"] + ([f"backup.source.betas={betas}"] if betas else [])
    assert recipe(*options)[0].backup == meant
    assert recipe(*options, a="backup: {source: {path: other}}")[0].backup == meant
    hub = recipe("backup.source.revision=abcd", a="backup: {source: {kind: hub, revision: dcba}}")[0]
    assert hub.backup.source == Hub(revision="abcd")


MISTAKES = [
    ({"budget": ""}, "x.yaml:1:1: budget: missing; this key is required"),
    ({"source": ""}, "x.yaml:1:1: source: missing; this key is required (kinds: files, hub)"),
    ({"budget": "budget: {}"}, "x.yaml:2:1: budget.parameters: missing; this key is required"),
    ({"a": "sed: 1"}, "x.yaml:4:1: sed: unknown key; did you mean 'seed'?"),
    ({"a": "tolerance: 5%"}, "x.yaml:4:1: tolerance: unknown key; did you mean 'budget.tolerance'?"),
    ({"a": "path: q"}, "x.yaml:4:1: path: unknown key; did you mean 'source.path' or 'only.path'?"),
    (
        {"a": "backup: {source: {path: p, pth: q}}"},
        "x.yaml:4:28: backup.source.pth: unknown key; did you mean 'path'?",
    ),
    (
        {"a": "backup: {source: {path: p, split: test}}"},
        "x.yaml:4:28: backup.source.split: unknown key; only kind hub has it",
    ),
    (
        {"a": "backup: {source: {path: 3}}"},
        "x.yaml:4:25: backup.source.path: expected text, found 3; put it in quotes",
    ),
    ({"a": "order: {zzz: 1}"}, "x.yaml:4:9: order.zzz: unknown key; known keys: low, high, names"),
    (
        {"source": "source: {kind: files, path: p, split: test}"},
        "x.yaml:3:32: source.split: unknown key; only kind hub has it",
    ),
    ({"name": "name: 8"}, "x.yaml:1:7: name: expected text, found 8; put it in quotes"),
    (
        {"name": "name: Big One"},
        "x.yaml:1:7: name: expected a name of at most 64 lower-case letters, digits and . _ - that "
        "starts with a letter or digit, found 'Big One'",
    ),
    ({"a": "seed: 1.5"}, "x.yaml:4:7: seed: expected a whole number, found 1.5"),
    ({"a": "seed: true"}, "x.yaml:4:7: seed: expected a whole number, found true"),
    ({"a": "seed: '8'"}, "x.yaml:4:7: seed: expected a whole number, found '8'; remove the quotes"),
    ({"a": "seed: null"}, "x.yaml:4:7: seed: expected a whole number, found null"),
    ({"a": "seed: -1"}, "x.yaml:4:7: seed: must be at least 0, found -1"),
    ({"a": "seed: 100"}, "x.yaml:4:7: seed: must be below 100, found 100"),
    ({"a": "rate: 0e1"}, "x.yaml:4:7: rate: must be above 0, found 0e1"),
    ({"a": "rate: [1, x]"}, "x.yaml:4:7: rate: expected a number, found [1, 'x']"),
    ({"a": "rate: .nan"}, "x.yaml:4:7: rate: expected a number, found '.nan'"),
    ({"a": "strict: yes"}, "x.yaml:4:9: strict: expected true or false, found 'yes'"),
    ({"budget": "budget: 90M"}, "x.yaml:2:9: budget: expected a section, found '90M'"),
    (
        {"budget": "budget: {parameters: 90Q}"},
        "x.yaml:2:22: budget.parameters: expected a count (90M, 8B ± 5%), a range of counts "
        "(7.8B..8.5B) or a limit (<= 8B), found '90Q'; suffixes are K, M, B and T",
    ),
    (
        {"budget": "budget: {parameters: {low: 1}}"},
        "x.yaml:2:10: budget.parameters: expected a count (90M, 8B ± 5%), a range of counts "
        "(7.8B..8.5B) or a limit (<= 8B), found a section",
    ),
    (
        {"budget": "budget: {parameters: 9B..8B}"},
        "x.yaml:2:22: budget.parameters: the range '9B..8B' ends below its start; write 8B..9B",
    ),
    (
        {"budget": "budget: {parameters: 0}"},
        "x.yaml:2:22: budget.parameters: must be at least 1, found 0",
    ),
    (
        {"a": "sizes: {ratios: [1]}"},
        "x.yaml:4:1: sizes: expected sizes (29..32, 512..1536 by 128, [4096, 4608], {ratio: [2.5, 3]}), "
        "found a section with the key 'ratios'",
    ),
    ({"a": "config: [1]"}, "x.yaml:4:9: config: expected a section or text, found [1]"),
    (
        {"source": "source: file"},
        "x.yaml:3:9: source: expected a section, found 'file'; write {kind: files}",
    ),
    (
        {"source": "source: web"},
        "x.yaml:3:9: source: expected a section, found 'web'; write {kind: ...}, one of files, hub",
    ),
    ({"source": "source: {path: p}"}, "x.yaml:3:1: source.kind: missing; one of files, hub"),
    (
        {"source": "source: {kind: fils}"},
        "x.yaml:3:16: source.kind: unknown kind 'fils'; did you mean 'files'? known kinds: files, hub",
    ),
    (
        {"source": "source: {kind: s3}"},
        "x.yaml:3:16: source.kind: unknown kind 's3'; known kinds: files, hub",
    ),
    (
        {"a": "only: {kind: hub, path: p}"},
        "x.yaml:4:14: only.kind: unknown kind 'hub'; known kinds: files",
    ),
    (
        {"source": "source: {kind: hub, revision: main}"},
        "x.yaml:3:31: source.revision: expected 4 hexadecimal digits (0-9, a-f), found 'main'",
    ),
    (
        {"source": "source: {kind: hub, revision: abc}"},
        "x.yaml:3:31: source.revision: expected 4 hexadecimal digits (0-9, a-f), found 'abc' (3 characters)",
    ),
    (
        {"source": "source: {kind: hub, revision: abcd, split: trian}"},
        "x.yaml:3:44: source.split: expected 'train' or 'test', found 'trian'; did you mean 'train'?",
    ),
    (
        {"source": "source: {kind: files, path: p, betas: [1]}"},
        "x.yaml:3:39: source.betas: must have at least 2 items, found [1]",
    ),
    (
        {"source": "source: {kind: files, path: p, betas: [1, 2, 3]}"},
        "x.yaml:3:39: source.betas: must have at most 2 items, found 3",
    ),
    (
        {"source": "source: {kind: files, path: p, betas: [1, x]}"},
        "x.yaml:3:43: source.betas[1]: expected a number, found 'x'",
    ),
    ({"a": "order: {names: []}"}, "x.yaml:4:16: order.names: must have at least 1 items, found 0"),
    ({"a": "order: {low: 3, high: 2}"}, "x.yaml:4:1: order: low 3.0 is above high 2.0"),
]


@pytest.mark.parametrize(("lines", "message"), MISTAKES)
def test_one_mistake_is_one_line(recipe, lines, message):
    with pytest.raises(ConfigError) as caught:
        recipe(**lines)
    assert caught.value.message == message


def test_all_mistakes_come_in_the_order_of_the_file(recipe):
    with pytest.raises(ConfigError) as caught:
        recipe(
            "seed=-1",
            name="nam: x",
            budget="budget:\n  paramters: 90M\n  tolerence: 5%",
            source="source: {kind: files}\nsource: 3\nsizes:",
        )
    assert caught.value.message.splitlines() == [
        "x.yaml:1:1: nam: unknown key; did you mean 'name'?",
        "x.yaml:3:3: budget.paramters: unknown key; did you mean 'parameters'?",
        "x.yaml:4:3: budget.tolerence: unknown key; did you mean 'tolerance'?",
        "x.yaml:5:1: source.path: missing; this key is required",
        "x.yaml:6:1: source: duplicate key; it already stands in line 5",
        "x.yaml:7:1: sizes: empty; give it a value, remove the key, or write null",
        "--set seed=-1: seed: must be at least 0, found -1",
    ]


def test_an_empty_section_is_not_also_called_a_wrong_one(recipe):
    with pytest.raises(ConfigError) as caught:
        recipe(budget="budget:")
    assert caught.value.message == "x.yaml:2:1: budget: empty; give it a value, remove the key, or write null"


def test_a_list_is_no_experiment(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match=r"x\.yaml:1:1: expected a section, found \['a', 'b'\]"):
        load(path, Recipe)


def test_a_mistake_in_an_option_names_the_option(recipe):
    with pytest.raises(
        ConfigError, match=r"^--set budget\.tolerence=1%: budget\.tolerence: unknown key; did you mean"
    ):
        recipe("budget.tolerence=1%")


def test_check_returns_what_load_raises(recipe, tmp_path):
    recipe()
    checked = check("x.yaml", Recipe, ["seed=x"])
    assert checked.model is None
    (problem,) = checked.problems
    assert (problem.path, str(problem.mark)) == (("seed",), "--set seed=x")
    assert check("x.yaml", Recipe).problems == ()
