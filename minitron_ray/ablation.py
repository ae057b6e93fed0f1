"""`Ablation`: one question asked of several experiments that differ in one thing, beside the paper's answer.

An ablation file holds a base experiment (inline, or the path of a file) and variants: what each one
says otherwise. Every variant is an ordinary experiment, named `<ablation>-<variant>`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.kinds import Section
from minitron_ray.core.loading import check, check_document
from minitron_ray.core.overrides import merged
from minitron_ray.core.sections import nearest
from minitron_ray.core.yaml import Document, Location, Mark, Node, Problem, dumped
from minitron_ray.experiment import Experiment, Name

Text = Annotated[str, Field(min_length=1)]


class Paper(Section):
    """What the paper measured; its models, texts and sizes are others, so that only orders compare."""

    source: Text
    """The table, and what was measured there on which model."""
    unit: Text
    figures: Annotated[dict[str, float], Field(min_length=1)]
    """By variant; a variant that the paper does not have is left out."""
    better: Literal["lower", "higher"] = "lower"


class Ablation(Section):
    """A question, the experiments that answer it, and what is compared."""

    name: Name
    question: Text
    base: dict[str, Any] | str
    """An experiment without its name, or the path of an experiment file beside this one. Paths in the
    variants are relative to the file that holds the base."""
    variants: Annotated[dict[str, dict[str, Any]], Field(min_length=2)]
    """What each variant says otherwise than the base, section by section; `{}` is the base itself."""
    measure: Literal["cut", "distilled"]
    """Which validation loss is compared: right after the cut, or after the distillation."""
    paper: Paper | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One experiment of an ablation. `source` is its whole experiment file, `base` the folder of its paths."""

    name: str
    experiment: Experiment
    source: bytes
    base: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class AblationFile:
    """A checked ablation file with its variants, in the order of the file."""

    ablation: Ablation
    variants: tuple[Variant, ...]


def is_ablation(path: Path) -> bool:
    """Whether a file says that it is one: it has `variants`. False where it can't be read."""
    try:
        data = Document.read(path).data
    except ConfigError:
        return False
    return isinstance(data, dict) and "variants" in data


def read_ablation(path: Path) -> AblationFile:
    """Reads and checks an ablation file with all its variants.

    Raises ConfigError with one line a problem, each at the place where it is written.
    """
    file, problems = check_ablation(path)
    if file is None:
        raise ConfigError("\n".join(map(str, problems)))
    return file


def check_ablation(path: Path) -> tuple[AblationFile | None, tuple[Problem, ...]]:
    """Like `read_ablation`, but returns the problems. Raises ConfigError where nothing can be read."""
    checked = check(path, Ablation)
    if checked.model is None:
        if isinstance(data := checked.document.data, dict) and "teacher" in data and "variants" not in data:
            raise ConfigError(f"{path}: an experiment file; run it with: minitron-ray run {path}")
        return None, checked.problems
    ablation, document = checked.model, checked.document
    problems = list(_unknown_figures(ablation, document))
    base, broken = _base(ablation, document)
    if base is None:
        return None, (*problems, *broken)
    variants = []
    for name in ablation.variants:
        variant, found = _variant(name, ablation, document, base)
        problems += found
        if variant is not None:
            variants.append(variant)
    if problems:
        return None, tuple(dict.fromkeys(problems))  # what is wrong in the base is so in every variant
    return AblationFile(ablation=ablation, variants=tuple(variants)), ()


def _unknown_figures(ablation: Ablation, document: Document) -> Iterator[Problem]:
    for name in ablation.paper.figures if ablation.paper else ():
        if name not in ablation.variants:
            path: Location = ("paper", "figures", name)
            near = nearest(name, ablation.variants)
            hint = f"did you mean '{near}'?" if near else f"they are {', '.join(ablation.variants)}"
            yield Problem(mark=document.key_mark(path), path=path, text=f"no variant has this name; {hint}")


def _base(ablation: Ablation, document: Document) -> tuple[Document | None, tuple[Problem, ...]]:
    """The base as a document of its own, with what is wrong with it as YAML."""
    if not isinstance(ablation.base, str):
        return Document(path=document.path, source=b"", root=document.resolve(("base",))[1]), ()
    try:
        base = Document.read(document.path.parent / ablation.base)
    except ConfigError as error:
        mark = document.resolve(("base",))[2]
        return None, (Problem(mark=mark, path=("base",), text=error.message),)
    return (None, base.problems) if base.problems else (base, ())


def _variant(
    name: str, ablation: Ablation, document: Document, base: Document
) -> tuple[Variant | None, list[Problem]]:
    place: Location = ("variants", name)
    changes, key = document.resolve(place)[1], document.key_mark(place)
    if isinstance(changes.content, dict) and "name" in changes.content:
        text = f"a variant is named by its key, this one {ablation.name}-{name}; remove name"
        return None, [Problem(mark=changes.keys["name"], path=(*place, "name"), text=text)]
    whole = _named(merged(base.root, changes), f"{ablation.name}-{name}", key)
    checked = check_document(Document(path=base.path, source=b"", root=whole), Experiment)
    if checked.model is None:
        inline = not isinstance(ablation.base, str)
        return None, [_placed(problem, place, changes, whole, inline) for problem in checked.problems]
    if ablation.measure == "distilled" and checked.model.distill is None:
        text = (
            "this variant has no distill, but measure: distilled compares what distillation made; give it one"
        )
        return None, [Problem(mark=key, path=place, text=text)]
    heading = f"# Variant {name} of the ablation {ablation.name}, written out.\n".encode()
    source = heading + dumped(whole.data)
    base_folder = base.path.resolve().parent
    return Variant(name=name, experiment=checked.model, source=source, base=base_folder), []


def _named(root: Node, name: str, key: Mark) -> Node:
    """The experiment with its name put first, to be pointed at where the variant's key stands."""
    if not isinstance(root.content, dict):
        return root
    content = {"name": Node(mark=key, content=name, text=name)} | root.content
    content["name"] = Node(mark=key, content=name, text=name)
    return Node(mark=root.mark, content=content, keys=root.keys | {"name": key})


def _placed(problem: Problem, place: Location, changes: Node, whole: Node, inline: bool) -> Problem:
    """A problem of the experiment `whole`, in the words of the file that it was put together from."""
    path = problem.path
    if not path or path == ("name",):
        return Problem(mark=whole.keys["name"], path=place, text=problem.text)
    # What is missing stands nowhere: it is missing in the section that the variant speaks of, if it does.
    touched = path if _holds(whole, path) else path[:-1]
    if touched and _holds(changes, touched):
        return Problem(mark=problem.mark, path=(*place, *path), text=problem.text)
    return Problem(mark=problem.mark, path=("base", *path) if inline else path, text=problem.text)


def _holds(node: Node, path: Location) -> bool:
    """Whether a tree has a value at `path`."""
    for part in path:
        content = node.content
        if isinstance(content, dict) and part in content:
            node = content[str(part)]
        elif isinstance(content, list) and isinstance(part, int) and part < len(content):
            node = content[part]
        else:
            return False
    return True
