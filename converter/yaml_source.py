"""YAML with the line of every key, so that an error about a value can say where it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trtforge.runtime.errors import ConfigError

__all__ = ["KeyPath", "YamlSource", "read_yaml"]

KeyPath = tuple[str | int, ...]

_MAX_ALIASES = 1000


@dataclass(frozen=True, slots=True)
class YamlSource:
    """Parsed YAML, and where each key stands.

    Attributes:
        path: The file.
        data: Plain mappings, lists and scalars.
        lines: 1-based line by key path.
    """

    path: Path
    data: Mapping[str, Any]
    lines: Mapping[KeyPath, int]

    def where(self, *paths: Sequence[str | int]) -> str:
        """`file:line` of the first of `paths` that stands in the file, or of its nearest parent."""
        for path in paths:
            if tuple(path) in self.lines:
                return f"{self.path}:{self.lines[tuple(path)]}"
        for path in paths:
            for length in range(len(path) - 1, 0, -1):
                if tuple(path[:length]) in self.lines:
                    return f"{self.path}:{self.lines[tuple(path[:length])]}"
        return f"{self.path}:1"


def read_yaml(path: Path) -> YamlSource:
    """Reads a mapping with plain YAML types only; tags that would make Python objects are refused.

    Raises:
        ConfigError: unreadable, not UTF-8, not YAML, a duplicate or non-text key, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}", fix="check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", fix="give a text file in UTF-8 that can be read") from error
    lines: dict[KeyPath, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:1: this is not a mapping with `version` and `models`")
        _collect_lines(path, node, (), lines, set())
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}:{line}: this is not valid YAML: {problem}") from error
    return YamlSource(path, data, lines)


def _collect_lines(path: Path, node: yaml.Node, at: KeyPath, lines: dict[KeyPath, int], open_nodes: set[int]) -> None:
    if id(node) in open_nodes:
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: an alias that contains itself")
    if len(lines) > 100 * _MAX_ALIASES:
        raise ConfigError(
            f"{path}: more than {100 * _MAX_ALIASES} keys", why="aliases that repeat one another grow fast"
        )
    open_nodes.add(id(node))
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{path}:{line}: a key must be plain text")
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise ConfigError(f"{path}:{line}: the key {key.value!r} stands here twice", fix="remove one of them")
            seen.add(key.value)
            lines[(*at, key.value)] = line
            _collect_lines(path, value, (*at, key.value), lines, open_nodes)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _collect_lines(path, value, (*at, index), lines, open_nodes)
    open_nodes.discard(id(node))
