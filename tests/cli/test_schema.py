"""`schema`: what an editor is told."""

import json

from click.testing import CliRunner

from minitron_ray.cli import main


def schema():
    result = CliRunner().invoke(main, ["schema"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_required_keys_and_closed_sections():
    document = schema()
    assert set(document["required"]) == {"name", "teacher", "data"}
    assert document["oneOf"] == [{"required": ["shape"]}, {"required": ["budget", "search"]}]
    assert document["additionalProperties"] is False
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_keys_are_described_by_the_strings_below_the_fields():
    sections = schema()["$defs"]
    assert sections["Teacher"]["properties"]["revision"]["description"].startswith("Commit of a hub model")
    assert sections["Distill"]["properties"]["clip"]["description"] == "Largest gradient norm."  # inherited


def test_every_kind_is_offered():
    source = schema()["$defs"]["Data"]["properties"]["source"]
    assert {"files", "hub", "pypi", "tokens"} <= source["discriminator"]["mapping"].keys()
