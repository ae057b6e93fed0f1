"""`minitron-ray schema`: the JSON schema of experiment files, for completion and checks in editors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pydantic import BaseModel


@click.command()
def schema() -> None:
    """Print the JSON schema of experiment files.

    \b
    Save it beside an experiment and put this line at the experiment's top:
    # yaml-language-server: $schema=experiment.schema.json
    """
    import json

    from minitron_ray.experiment import Experiment

    click.echo(json.dumps(schema_of(Experiment), indent=2, ensure_ascii=False))


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of what may be written; keys are described by the strings below the fields."""
    document = model.model_json_schema()
    described = {cls.__name__: cls for cls in _sections(model)}
    for name, definition in {model.__name__: document, **document.get("$defs", {})}.items():
        if cls := described.get(name):
            for key, text in _field_texts(cls).items():
                definition["properties"].get(key, {}).setdefault("description", text)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document}


def _sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    from minitron_ray.core.sections import sections_inside

    return {model, *sections_inside(model)}


def _field_texts(cls: type[BaseModel]) -> dict[str, str]:
    """The string below each field of a class and its bases, as Python's source has it."""
    import ast
    import inspect
    import textwrap

    from pydantic import BaseModel

    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not issubclass(base, BaseModel) or not base.__module__.startswith("minitron_ray."):
            continue
        definition = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    texts[name] = " ".join(text.split())
    return texts
