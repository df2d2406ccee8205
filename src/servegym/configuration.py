"""Reading configuration: strict pydantic models from YAML, found by path or by the name of a shipped file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from servegym.errors import InputError, nearest

ModelT = TypeVar("ModelT", bound=BaseModel)


# Folders of configs that a command reads.
_COMMANDS = {
    "simulate": "simulate",
    "train": "train",
    "evaluate": "evaluate",
    "tune": "tune",
    "clusters": "cluster up",
    "deploy": "deploy --config",
    "replay": "replay",
}
_TYPES = {"a valid tuple": "a list", "a valid list": "a list", "a valid dictionary": "a mapping"}


class Config(BaseModel):
    """Base of every configuration section: unknown keys are errors, values are frozen, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


def shipped_configs(kind: str) -> dict[str, Path]:
    """Return the configs of one kind that ship with the package: name -> file.

    Args:
        kind: a folder of ``configs``: ``train``, ``evaluate``, ``simulate``, ``profiles``, ``workloads``.
    """
    return {path.stem: path for path in sorted(_folder(kind).glob("*.yaml"))}


@cache
def _folder(kind: str) -> Path:
    return Path(str(files("servegym"))) / "configs" / kind


def find_config(reference: str | Path, kind: str) -> Path:
    """Resolve a path, or the name of a shipped config, to a file.

    Raises:
        InputError: neither a file nor a shipped name; the message has the nearest names.
    """
    path = Path(reference)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if not path.is_file():
            raise InputError(str(reference), "", f"no such file{_init_hint(kind, path)}")
        return path
    named = _folder(kind) / f"{reference}.yaml"
    if named.is_file() and path.name == str(reference):
        return named
    shipped = shipped_configs(kind)
    elsewhere = [other for other in _COMMANDS if str(reference) in shipped_configs(other)]
    if elsewhere:
        problem = f"no shipped config in {kind}, but one of `servegym {_COMMANDS[elsewhere[0]]}`"
        raise InputError(str(reference), "", f"{problem}; {nearest('', shipped)}")
    hint = nearest(str(reference), shipped)
    raise InputError(str(reference), "", f"no such file and no shipped config in {kind}; {hint}")


def _init_hint(kind: str, path: Path) -> str:
    return f"; write one: servegym init {kind.removesuffix('s')} {path}" if kind in _COMMANDS else ""


def load_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        InputError: unreadable, not YAML (with line and column), or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(str(path), "", f"cannot be read: {reason}") from None
    try:
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise InputError(where, "", f"not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(str(path), "", f"not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(str(path), "", f"top level is {type(content).__name__}; allowed: a mapping of keys to values")
    return content


def apply_overrides(content: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return a copy of ``content`` with ``a.b=value`` assignments applied; values are read as YAML.

    >>> apply_overrides({"a": {"b": 1}}, ["a.b=2", "c=[1, x]"])
    {'a': {'b': 2}, 'c': [1, 'x']}
    """
    result: dict[str, Any] = _copy(content)
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise InputError("--set", assignment, "allowed: key.subkey=value")
        target = result
        *parents, leaf = key.strip().split(".")
        for name in parents:
            child = target.setdefault(name, {})
            if not isinstance(child, dict):
                raise InputError("--set", key, f"{name} holds {child!r}, which has no keys of its own")
            target = child
        try:
            target[leaf] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError("--set", key, f"got {value!r}; allowed: a YAML value") from None
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``changes`` applied key by key, mappings within mappings too.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def validate(model: type[ModelT], content: Mapping[str, Any], source: str) -> ModelT:
    """Build ``model`` from plain data; the first violation becomes one line.

    Raises:
        InputError: names the source, the dotted field, the value and what is allowed.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise explain(error, model, source) from None


def load_config(model: type[ModelT], reference: str | Path, kind: str, overrides: Sequence[str] = ()) -> ModelT:
    """Find, read, override and validate a config in one go."""
    path = find_config(reference, kind)
    return validate(model, apply_overrides(load_mapping(path), overrides), str(path))


def explain(error: ValidationError, model: type[BaseModel], source: str) -> InputError:
    """Turn the first pydantic violation into an :class:`InputError`."""
    first = cast("Mapping[str, Any]", error.errors(include_url=False)[0])
    location = [str(part) for part in first["loc"] if part != "[key]"]
    field = ".".join(location)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        if not cause.source and cause.field:  # of a part that was validated apart
            return InputError(source, f"{field}.{cause.field}", cause.problem)
        return InputError(source, field, str(cause))
    kind, value = str(first["type"]), first["input"]
    if kind == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return InputError(source, field, f"unknown key; {nearest(location[-1], known)}" if known else "unknown key")
    if kind == "missing":
        return InputError(source, field, "missing; this field is required")
    if kind == "union_tag_not_found":
        tag = first["ctx"]["discriminator"].strip("'")
        return InputError(source, f"{field}.{tag}", "missing; this field is required")
    if kind == "union_tag_invalid":
        tag, expected = first["ctx"]["discriminator"].strip("'"), first["ctx"]["expected_tags"]
        return InputError(source, f"{field}.{tag}", f"got {first['ctx']['tag']!r}; allowed: {expected}")
    message = str(first["msg"]).removeprefix("Value error, ")
    message = message.removeprefix("Input should be ").partition(", unable to parse")[0]
    message = _TYPES.get(message, "a mapping" if "valid dictionary or instance" in message else message)
    if isinstance(value, float) and not math.isfinite(value):
        message = "a finite number"
    shown = "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)
    return InputError(source, field, f"got {shown}; allowed: {message}")


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Names of the fields of the (sub)model at ``location``; empty where the type is not a plain model."""
    current: Any = model
    for part in location:
        info = getattr(current, "model_fields", {}).get(part)
        if info is None:
            return []
        candidates = [info.annotation, *getattr(info.annotation, "__args__", ())]
        current = next((item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)), None)
        if current is None:
            return []
    return list(getattr(current, "model_fields", {}))
