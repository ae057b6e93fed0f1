"""What replaces values of a document: options (`--set a.b=c`), or another tree of values (`merged`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from minitron_ray.core.errors import ConfigError
from minitron_ray.core.yaml import Document, Mark, Node, Scalar, parse


def apply_overrides(document: Document, overrides: Iterable[str]) -> Document:
    """The document with each `a.b=c` of `--set` put in place; missing sections are made.

    `c` is read as YAML. Raises ConfigError naming the option.
    """
    root = document.root
    for override in overrides:
        option = f"--set {override}"
        name, equals, text = override.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"{option}: write it as --set section.key=value")
        root = _put(root, parts, _option_value(text, option), option)
    return replace(document, root=root)


def merged(base: Node, changes: Node) -> Node:
    """`base` with the values of `changes` in place, section by section.

    A section that names another `kind` replaces the one it meets, whose keys are not its own. What
    `changes` touches is where `changes` says it; everything else stays where `base` says it.
    """
    mine, others = base.content, changes.content
    if not (isinstance(mine, dict) and isinstance(others, dict)) or _kind(others) not in (None, _kind(mine)):
        return changes
    content = dict(mine)
    for key, node in others.items():
        content[key] = merged(mine[key], node) if key in mine else node
    return replace(base, content=content, keys={**base.keys, **changes.keys})


def _kind(content: dict[str, Node]) -> Scalar:
    kind = content.get("kind")
    return kind.text if kind is not None else None


def _option_value(text: str, option: str) -> Node:
    if not text.strip():
        raise ConfigError(f"{option}: no value; write null to unset a key")
    try:
        node, problems = parse(text, "")
    except ConfigError as error:
        detail = re.sub(r"^[\d:]*: ", "", error.message)
        raise ConfigError(f"{option}: {detail}") from None
    if problems:
        raise ConfigError("\n".join(f"{option}: {problem.text}" for problem in problems))
    return _moved(node, Mark(option))


def _moved(node: Node, mark: Mark) -> Node:
    content = node.content
    if isinstance(content, dict):
        content = {key: _moved(child, mark) for key, child in content.items()}
    elif isinstance(content, list):
        content = [_moved(child, mark) for child in content]
    return replace(node, mark=mark, content=content, keys=dict.fromkeys(node.keys, mark))


def _put(node: Node, parts: list[str], value: Node, option: str) -> Node:
    if not parts:
        return value
    head, *rest = parts
    content = node.content
    if isinstance(content, list):
        if not head.isdecimal() or int(head) >= len(content):
            raise ConfigError(
                f"{option}: '{head}' is no item of a list of {len(content)}; items count from 0"
            )
        changed = list(content)
        changed[int(head)] = _put(content[int(head)], rest, value, option)
        return replace(node, content=changed)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{option}: '{head}' can't be set inside {node.text!r}, which is not a section")
    child = content.get(head, Node(mark=value.mark, content=None))
    keys = {head: value.mark, **node.keys} if rest else {**node.keys, head: value.mark}
    return replace(node, content={**content, head: _put(child, rest, value, option)}, keys=keys)
