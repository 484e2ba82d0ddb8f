"""Defaults < YAML < command line: `--train.steps 20` or `--train.steps=20` sets a field of a section.

For example, with

    train:
      steps: 100

in the YAML and `--train.steps 20` on the command line, the run has 20 steps; every other field of `train` keeps its
default. A key that does not exist is refused, naming the nearest that does.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fm_longctx.train.config import Config


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file with command-line overrides.

    Raises:
        ValueError: no such file, not YAML, an unknown key, a value of the wrong type, or one that a section refuses.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ValueError(f"cannot read the config {str(path)!r}: {error.strerror or error}.") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return build(_flatten(content or {}, where=str(path)) | parse_overrides(overrides))


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`["--train.steps", "20", "--data.path=x"]` as `{"train.steps": 20, "data.path": "x"}`."""
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or "." not in argument:
            raise ValueError(f"cannot read {argument!r}: overrides look like --train.steps 20.")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{key} needs a value, as in --train.steps 20.")
            text = rest.pop(0)
        _check_key(key)
        try:
            values[key] = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise ValueError(f"cannot read the value of --{key}: {text!r}.") from error
    return values


def build(values: Mapping[str, Any]) -> Config:
    """A config from `{"section.field": value}`; the defaults elsewhere."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        _check_key(key)
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = _convert(key, value, fields()[key].type)
    kinds = typing.get_type_hints(Config)
    return Config(**{section: kinds[section](**given) for section, given in sections.items()})


def to_yaml(config: Config) -> str:
    """The whole config, defaults too, so that it can be run again."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """One key of the config."""

    type: Any
    default: Any
    doc: str


@cache
def fields() -> dict[str, Field]:
    """Every key, `"section.field"`, with its type, default and documentation."""
    found: dict[str, Field] = {}
    for section, kind in typing.get_type_hints(Config).items():
        hints, docs = typing.get_type_hints(kind), _docs(kind)
        for f in dataclasses.fields(kind):
            found[f"{section}.{f.name}"] = Field(type=hints[f.name], default=f.default, doc=docs[f.name])
    return found


def help_text() -> str:
    """Every key with its documentation, type and default."""
    lines = []
    for section, kind in typing.get_type_hints(Config).items():
        lines += ["", f"{section}: {inspect.getdoc(kind)}"]
        for key, f in fields().items():
            if key.startswith(f"{section}."):
                default = yaml.safe_dump(f.default).split("\n")[0]
                lines += [f"  --{key} {_type_name(f.type)} (default {default})", f"      {f.doc}"]
    return "\n".join(lines[1:])


def _docs(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = inspect.cleandoc(str(text.value.value))
    return docs


def _flatten(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold sections (model:, data:, ...), got {type(content).__name__}.")
    flat = {}
    sections = typing.get_type_hints(Config)
    for section, values in content.items():
        if section not in sections:
            raise ValueError(f"{where}: unknown section {section!r}. {_nearest(str(section), list(sections))}")
        if values is None:
            continue
        if isinstance(values, str) and f"{section}.kind" in fields():
            values = {"kind": values}
        if not isinstance(values, dict):
            raise ValueError(f"{where}: {section} must hold fields, got {values!r}.")
        for name, value in values.items():
            _check_key(f"{section}.{name}", where=where)
            flat[f"{section}.{name}"] = value
    return flat


def _check_key(key: str, where: str = "") -> None:
    known = fields()
    if key not in known:
        # The field's own name counts most: a right name in a wrong section is the commonest slip.
        name = key.rpartition(".")[2]
        twins = [k for k in known if k.rpartition(".")[2] == name]
        hint = f"Did you mean {twins[0]}?" if twins else _nearest(key, list(known))
        raise ValueError(f"{where + ': ' if where else ''}unknown key {key}. {hint}")


def _nearest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"Did you mean {match[0]}?"


def _convert(key: str, value: Any, kind: Any) -> Any:
    """`value` as the field's type, or a ValueError. YAML reads 3e-4 as text, so text may be a float."""
    if _is_optional(kind):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        allowed = typing.get_args(kind)
        if value in allowed:
            return value
        raise ValueError(f"{key} must be one of {', '.join(map(str, allowed))}, got {value!r}.")
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    elif type(value) is kind:
        return value
    raise ValueError(f"{key} must be of type {_type_name(kind)}, got {value!r}.")


def _is_optional(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def _type_name(kind: Any) -> str:
    if _is_optional(kind):
        return " | ".join("null" if k is type(None) else _type_name(k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    return str(kind.__name__)
