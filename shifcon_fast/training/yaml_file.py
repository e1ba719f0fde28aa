"""YAML as people expect it: the core schema of YAML 1.2, read safely.

PyYAML's own reader follows YAML 1.1, where ``no`` (Norwegian) is false, ``1e-4`` is a string, ``12:30`` is 750 and
``010`` is 8. Here only ``true`` and ``false`` are booleans, ``null``, ``~`` and nothing are null, and ``1e-4`` is a
number (https://yaml.org/spec/1.2.2/#103-core-schema). A field that is there twice is an error. No Python objects
are made.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_MAX_DEPTH = 10


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the implicit types of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as PyYAML has it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise yaml.constructor.ConstructorError(
                    None, None, f"found the key {key!r}, wanted a name", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the field {key!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return dict(super().construct_mapping(node, deep=deep))


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


_TYPES = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", tuple("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", tuple("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        tuple("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:merge", r"<<", ("<",)),
)
for _tag, _pattern, _first in _TYPES:
    _CoreLoader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))
for _tag in ("timestamp", "binary", "set", "omap", "pairs"):  # not of the core schema
    _CoreLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_undefined)
_CoreLoader.add_constructor("tag:yaml.org,2002:int", _int)
_CoreLoader.add_constructor("tag:yaml.org,2002:float", _float)


def _check_plain(text: bytes) -> None:
    """Refuse what no field needs and what PyYAML stumbles over: tags, references (some grow without end), depth."""
    depth = 0
    for event in yaml.parse(text, _CoreLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1
        if getattr(event, "anchor", None):  # also of an alias
            raise ValueError(f"line {line}: a reference (& or *); write the value out")
        if getattr(event, "tag", None):
            raise ValueError(f"line {line}: the tag {event.tag}; leave it out")
        if depth > _MAX_DEPTH:
            raise ValueError(f"line {line}: more than {_MAX_DEPTH} levels; wanted values, lists and mappings")


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ValueError: no such file, not YAML, not a mapping, a field that is there twice. The message names the file.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; wanted a YAML file of fields")
    try:
        text = path.read_bytes()
        _check_plain(text)
        value = yaml.load(text, Loader=_CoreLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}; wanted `field: value` lines")
    return {str(name): each for name, each in value.items()}
