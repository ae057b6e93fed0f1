"""`minitron-ray init`: a new experiment file from one that ships with the program."""

from __future__ import annotations

from pathlib import Path

import click

from minitron_ray.core.errors import ConfigError


@click.command()
@click.argument("name", type=click.Path(path_type=Path))
@click.option(
    "--template",
    default="quickstart",
    show_default=True,
    metavar="NAME",
    help="A wrong name lists all.",
)
def init(name: Path, template: str) -> None:
    """Write NAME.yaml, a new experiment to edit.

    \b
    minitron-ray init my_model
    minitron-ray init experiments/half_8b --template 8b_to_4b
    """
    target = name if name.suffix in (".yaml", ".yml") else name.with_name(name.name + ".yaml")
    source = _template(template)
    text = source.read_text(encoding="utf-8")
    files = {target: _renamed(text, target.stem, source.stem)}
    for beside in _files_beside(text, source.parent):
        files[target.parent / beside] = (source.parent / beside).read_text(encoding="utf-8")
    if target.exists():
        raise ConfigError(f"{target}: exists already; choose another name")
    try:
        for path, content in files.items():
            if not path.exists():  # a model's config is shared between experiments
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{error.filename or target}: can't be written: {error.strerror or error}"
        ) from None
    click.echo(f"wrote {', '.join(map(str, files))}")
    click.echo(f"next: minitron-ray plan {target}")


def _templates() -> dict[str, Path]:
    """The shipped experiments by name: inside an installed package, or beside it in a clone."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "templates", package.parent / "experiments"):
        if found := {path.stem: path for path in sorted(folder.glob("*.yaml"))}:
            return found
    raise ConfigError(f"no templates in {package}; reinstall minitron-ray")


def _template(name: str) -> Path:
    from minitron_ray.core.sections import nearest

    templates = _templates()
    if name not in templates:
        near = nearest(name, templates)
        hint = f"did you mean '{near}'? " if near else ""
        raise ConfigError(f"--template: no template '{name}'; {hint}there are {', '.join(templates)}")
    return templates[name]


def _renamed(text: str, name: str, template: str) -> str:
    """The template's text under a new experiment name."""
    import re

    from pydantic import TypeAdapter, ValidationError

    from minitron_ray.experiment import Name

    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        rule = "lower-case letters, digits and . _ -, starting with a letter or digit, 64 at most"
        raise ConfigError(f"'{name}' can't be the name of an experiment; use {rule}") from None
    changed, count = re.subn(r"(?m)^name: .*$", f"name: {name}", text, count=1)
    assert count == 1, f"the template {template} has no name"
    return changed


def _files_beside(text: str, folder: Path) -> list[Path]:
    """Files in the template's folder that it refers to, such as a model's config."""
    import re

    named = re.findall(r"(?m)^\s*config: (\S+\.json)\s*(?:#.*)?$", text)
    return [Path(name) for name in named if (folder / name).is_file()]
