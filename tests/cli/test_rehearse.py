"""What a rehearsal says at its end, and how it ends."""

from __future__ import annotations

import pytest

from minitron_ray.cli.rehearse import Rehearsal, refuse_missing, told, verdict
from minitron_ray.core.errors import ConfigError


def rehearsed(name: str, *problems: str) -> Rehearsal:
    return Rehearsal(
        experiment=name,
        run_id="r",
        folder="/results/.rehearsal/r",
        seconds=3.0,
        real="32L",
        small="4L",
        stages={"prepare": 1.0, "export": 2.0},
        problems=problems,
    )


def test_inputs_that_are_missing_end_it_as_a_mistake() -> None:
    """Each is listed once, with all experiments that need it; what went through is said all the same."""
    found = [rehearsed("a", "no model", "no text"), rehearsed("b", "no model")]
    listed = verdict(found)
    assert listed[2:] == ["  a, b: no model", "  a: no text"] and "2 in all" in listed[1]
    assert "all 2 stages" in told(found[0])[0]
    with pytest.raises(ConfigError) as caught:
        refuse_missing(found)
    assert caught.value.message.startswith(
        "the real run can't begin: no model (and 1 more); every stage went"
    )
    assert caught.value.exit_code == 2 and "\n" not in caught.value.message


def test_with_every_input_there_it_ends_well() -> None:
    found = [rehearsed("a"), rehearsed("b")]
    refuse_missing(found)
    assert verdict(found)[-1] == "every model and every text that the files name was found and could be read"
