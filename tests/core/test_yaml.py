"""Plain data with positions, and the strictness around it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.overrides import apply_overrides
from minitron_ray.core.yaml import Document, dotted


@pytest.fixture
def document(tmp_path):
    def write(text: str | bytes) -> Document:
        path = tmp_path / "x.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return Document.load(path)

    return write


def test_scalars_follow_yaml_1_2(document):
    numbers = "a: 1e-4, b: 7_000, c: 0x1f, i: .5, j: .inf, k: 1e999, l: -3"
    assert document(f"{{{numbers}, d: no, e: 2024-01-01, f: ~, g: 'true', h: true}}").data == {
        "a": 1e-4,
        "b": 7000,
        "c": 31,
        "d": "no",
        "e": "2024-01-01",
        "f": None,
        "g": "true",
        "h": True,
        "i": 0.5,
        "j": ".inf",
        "k": "1e999",
        "l": -3,
    }


_keys = st.text("abcdefgh_", min_size=1, max_size=5)
_text = st.text(st.characters(max_codepoint=0xD7FF))
_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(_keys, _values, min_size=1, max_size=4))
def test_json_is_read_as_json(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("json") / "x.yaml"
    path.write_text(json.dumps(data), encoding="utf-8")
    assert Document.load(path).data == data


def test_positions(document):
    found = document("# comment\na: 1\nb:\n  c: [x, y]\n  d: {e: 2}\n")
    assert found.locate(("a",)) == (2, 4)
    assert found.locate(("b",)) == (3, 1)  # a section: its key
    assert found.locate(("b", "c", 1)) == (4, 10)
    assert found.locate(("b", "d", "e")) == (5, 10)
    assert found.locate(("b", "missing")) == (3, 1)  # the parent
    assert found.locate(("b", "function-before[_count(), int]", "c")) == (4, 6)  # a union's tag


def test_a_kind_is_passed_over_even_where_a_key_has_its_name(document):
    found = document("s:\n  kind: pypi\n  pypi: 1\n  path: 2\n")
    assert found.locate(("s", "pypi", "path")) == (4, 9)
    assert found.locate(("s", "pypi", "pypi")) == (3, 9)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\na: 2\n", r"x\.yaml:2:1: a: duplicate key; it already stands in line 1"),
        ("s:\n  a: 1\n  a: 2\n", r"x\.yaml:3:3: s\.a: duplicate key"),
        ("a: !!int '3'\n", r"x\.yaml:1:4: a: the tag .*int; tags are not supported"),
        ("a: !run 3\n", r"x\.yaml:1:4: a: the tag !run"),
        ("a: &x 1\nb: *x\n", r"x\.yaml:1:4: a: the anchor &x.*\n.*x\.yaml:2:4: b: the alias \*x"),
        ("a:\nb: 1\n", r"x\.yaml:1:1: a: empty; give it a value, remove the key, or write null"),
        ("a:\n  - 1\n  -\n", r"a\[1\]: an empty list item"),
        ("a: 1\n---\nb: 2\n", r"x\.yaml:2:1: a second document"),
        ("1: a\n", r"x\.yaml:1:1: a key must be text, found 1"),
        ("? [a, b]\n: 1\n", r"a key must be text, found a list or a mapping"),
        ("", r"x\.yaml: empty"),
        ("# only a comment\n", r"x\.yaml: empty"),
        ("a:\n\tb: 1\n", r"x\.yaml:2:1: a tab; YAML is indented with spaces only"),
        ("a: b: c\n", r"x\.yaml:1:5: a second ': ' in one line"),
        ("a: 1\n  b: 2\n", r"x\.yaml:2:4: this key does not line up"),
        ("- a\nb: 1\n", r"x\.yaml:2:1: this line does not line up"),
        ("a: [1, 2\n", r"x\.yaml:1:4: a '\[' that is not closed"),
        ("a: {b: 1\n", r"x\.yaml:1:4: a '\{' that is not closed"),
        ("a: 'b\n", r"x\.yaml:1:4: a quote that is not closed"),
        ("a: @b\n", r"x\.yaml:1:4: text that starts with @ must be in quotes"),
        ("a: 1\nb\nc: 1\n", r"x\.yaml:3:1: a line without 'key: value'"),
        ("a: b\x07\n", r"x\.yaml:1:5: the control character U\+0007"),
        ('a: "\\ud800"\n', r"a: holds half a character"),
        ("a: " + "[" * 100 + "]" * 100, r"nested more than 40 levels deep"),
        (b"a: b\nc: caf\xe9\n", r"x\.yaml:2:7: not UTF-8 \(byte 0xe9\)"),
        (b"a: " + b"x" * 2**20, r"x\.yaml: larger than 1 MB"),
    ],
    ids=range(26),
)
def test_refusals(document, text, problem):
    with pytest.raises(ConfigError, match=problem):
        document(text)


def test_all_problems_are_reported_at_once(document):
    with pytest.raises(ConfigError) as caught:
        document("a:\nb: 1\nb: 2\nc: !x 3\n")
    assert len(caught.value.message.splitlines()) == 3


def test_null_has_to_be_written(document):
    assert document("a: null\nb: ''\n").data == {"a": None, "b": ""}


def test_a_byte_order_mark_is_no_text(document):
    assert document(b"\xef\xbb\xbfa: 1\n").data == {"a": 1}


def test_source_is_kept_as_it_was(document):
    assert document(b"a: 1  # why\r\n").source == b"a: 1  # why\r\n"


def test_no_such_file(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("a: 1")
    with pytest.raises(
        ConfigError, match=r"quikstart\.yaml: no such file; did you mean '.*/quickstart\.yaml'\?"
    ):
        Document.load(tmp_path / "quikstart.yaml")
    with pytest.raises(ConfigError, match=r"/quickstart: no such file; did you mean '.*/quickstart\.yaml'\?"):
        Document.load(tmp_path / "quickstart")
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file$"):
        Document.load(tmp_path / "no" / "nothing.yaml")
    with pytest.raises(ConfigError, match="a folder; name an experiment file in it"):
        Document.load(tmp_path)


def test_overrides_replace_and_add(document):
    found = document("a: {b: 1, c: [1, 2]}\n")
    changed = apply_overrides(found, ["a.b=5%", "a.c.1=7", "d.e={f: 1e-4}", "a.g=x=y", "h=null"])
    assert changed.data == {
        "a": {"b": "5%", "c": [1, 7], "g": "x=y"},
        "d": {"e": {"f": 1e-4}},
        "h": None,
    }
    assert found.data == {"a": {"b": 1, "c": [1, 2]}}
    assert str(changed.resolve(("d", "e", "f"))[2]) == "--set d.e={f: 1e-4}"
    assert changed.locate(("a", "c", 0)) == (1, 15)


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("a", "--set a: write it as --set section.key=value"),
        ("=1", "write it as"),
        ("a..b=1", "write it as"),
        ("a.b=", "--set a.b=: no value; write null to unset a key"),
        ("a.b=[1", r"--set a\.b=\[1: a '\[' that is not closed"),
        ("a.b=!x 1", "--set a.b=!x 1: the tag !x"),
        ("a.b.c=1", "--set a.b.c=1: 'c' can't be set inside '1', which is not a section"),
        ("a.c.9=1", "'9' is no item of a list of 2; items count from 0"),
    ],
)
def test_bad_overrides(document, option, problem):
    with pytest.raises(ConfigError, match=problem):
        apply_overrides(document("a: {b: 1, c: [1, 2]}\n"), [option])


def test_dotted():
    assert dotted(("data", "files", 0, "path")) == "data.files[0].path"
