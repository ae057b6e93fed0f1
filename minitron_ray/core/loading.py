"""From a YAML file to a validated model, or to every mistake in it at once, in plain sentences.

pydantic finds the mistakes; this module says where they stand, what was found, what the rule is and
what was probably meant. Text is never taken for a number, nor a number for text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, to_json

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.kinds import keys
from minitron_ray.core.overrides import apply_overrides
from minitron_ray.core.sections import fields_named, kind_of, nearest, sections_at, with_default_kinds
from minitron_ray.core.sentences import type_sentence, unknown_kind, value_sentence, wrong_type
from minitron_ray.core.yaml import Document, Location, Problem, dotted

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked(Generic[Model]):
    """A read file: its model, or None and the problems, in the order they stand in the file."""

    document: Document
    model: Model | None
    problems: tuple[Problem, ...]


def load(path: str | Path, model: type[Model], overrides: Sequence[str] = ()) -> tuple[Model, Document]:
    """Read, override and validate a file.

    Raises ConfigError with one line a problem: `file:line:col: path: problem; did you mean 'x'?`.
    """
    checked = check(path, model, overrides)
    if checked.model is None:
        raise ConfigError("\n".join(map(str, checked.problems)))
    return checked.model, checked.document


def check(path: str | Path, model: type[Model], overrides: Sequence[str] = ()) -> Checked[Model]:
    """Like `load`, but returns the problems. Raises ConfigError only where the file can't be read at all."""
    return check_document(apply_overrides(Document.read(path), overrides), model)


def check_document(document: Document, model: type[Model]) -> Checked[Model]:
    """`check` of a document that is already read, or put together from several."""
    instance, problems = None, list(document.problems)
    data = with_default_kinds(document.data, [model])
    try:
        # JSON mode: lists are tuples, and strict still means no text for numbers.
        instance = model.model_validate_json(to_json(data), strict=True)
    except ValidationError as error:
        broken = {p.path for p in problems if p.path and document.resolve(p.path)[1].content is None}
        found = _Explainer(document, model, data).explain(error.errors(include_url=False))
        problems += [p for p in found if not any(p.path[: len(path)] == path for path in broken)]
    if not problems:
        return Checked(document=document, model=instance, problems=())
    problems.sort(key=lambda p: (p.mark.line == 0, p.mark.line, p.mark.column))
    return Checked(document=document, model=None, problems=tuple(problems))


# --- From pydantic's errors to problems -----------------------------------------------------------------


class _Explainer:
    """Turns the errors of one validation into problems with positions."""

    def __init__(self, document: Document, model: type[BaseModel], data: Any) -> None:
        """`data` is the document's, with kinds that follow from defaults written out."""
        self._document, self._model, self._data = document, model, data

    def explain(self, errors: Iterable[ErrorDetails]) -> list[Problem]:
        missing: dict[Location, Problem] = {}
        unknown: list[Location] = []
        values: dict[Location, list[ErrorDetails]] = {}
        for error in errors:
            location = error["loc"]
            path = self._document.resolve(location)[0]
            if error["type"] == "missing" and isinstance(location[-1], str):
                parent, _, mark = self._document.resolve(location[:-1])
                where = (*parent, location[-1])
                missing[where] = Problem(mark=mark, path=where, text=self._missing(where))
            elif error["type"] == "missing_choice":
                parent, _, mark = self._document.resolve(location[:-1])
                where = (*parent, location[-1])
                missing[where] = Problem(mark=mark, path=where, text=f"missing; {error['ctx']['problem']}")
                missing |= {(*parent, other): missing[where] for other in error["ctx"]["others"]}
            elif error["type"] == "extra_forbidden":
                unknown.append(path)
            else:  # branches of a union, and only they, share a place
                values.setdefault(path, []).append(error)
        found = [self._unknown_key(path, missing) for path in unknown]
        found += {id(problem): problem for problem in missing.values()}.values()
        return found + [self._wrong_value(path, group) for path, group in values.items()]

    def _missing(self, path: Location) -> str:
        kinds = [kind for cls in sections_at(self._model, path, self._data) if (kind := kind_of(cls))]
        return "missing; this key is required" + (f" (kinds: {', '.join(kinds)})" if kinds else "")

    def _unknown_key(self, path: Location, missing: dict[Location, Problem]) -> Problem:
        """A key nobody asked for; takes the required key it was meant to be out of `missing`."""
        key, parent = str(path[-1]), path[:-1]
        sections = sections_at(self._model, parent, self._data)
        known = list(dict.fromkeys(name for cls in sections for name in keys(cls)))
        near = nearest(key, known)
        elsewhere = fields_named(key, self._model) if key != "kind" else []
        others = [cls for cls in sections_at(self._model, parent, None) if key in keys(cls)]
        if near is not None and (not elsewhere or SequenceMatcher(None, key, near).ratio() >= 0.8):
            meant = missing.get((*parent, near))
            for where in [where for where, problem in missing.items() if problem is meant]:
                del missing[where]
            hint = f"did you mean '{near}'?"
        elif others:
            hint = f"only {' or '.join(f'kind {kind_of(cls)}' for cls in others)} has it"
        elif elsewhere:
            hint = "did you mean " + " or ".join(f"'{dotted(place)}'" for place in elsewhere[:2]) + "?"
        else:
            hint = f"known keys: {', '.join(known)}"
        return Problem(mark=self._document.key_mark(path), path=path, text=f"unknown key; {hint}")

    def _wrong_value(self, path: Location, errors: list[ErrorDetails]) -> Problem:
        """One problem from the errors at one place: a union's branches become one sentence."""
        _, node, mark = self._document.resolve(path)
        kinds = [kind for cls in sections_at(self._model, path, None) if (kind := kind_of(cls))]
        decisive = [error for error in errors if wrong_type(error) is None]
        if path and path[-1] == "kind" and errors[0]["type"] == "literal_error":
            kinds = [kind for cls in sections_at(self._model, path[:-1], None) if (kind := kind_of(cls))]
            return Problem(mark=mark, path=path, text=unknown_kind(node, kinds))
        if not decisive:
            return Problem(mark=mark, path=path, text=type_sentence(errors, node, kinds))
        error = decisive[-1]
        if error["type"] == "union_tag_not_found":
            text = f"missing; one of {', '.join(kinds)}"
            return Problem(mark=mark, path=(*path, "kind"), text=text)
        if error["type"] == "union_tag_invalid":
            assert isinstance(node.content, dict)
            node = node.content["kind"]
            return Problem(mark=node.mark, path=(*path, "kind"), text=unknown_kind(node, kinds))
        return Problem(mark=mark, path=path, text=value_sentence(error, node))
