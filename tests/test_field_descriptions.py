"""What a user can set says what it means: `servegym init`, `servegym list` and the documentation show it."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from servegym.baselines.policy_spec import LAYERS
from servegym.baselines.registry import Layer, describe
from servegym.configuration import Config

ROOT = Path(__file__).parents[1]
_FOLDERS = ("baselines", "engine_bridge", "envs", "agents")
_DEFINES = re.compile(r"^from servegym\.configuration import .*\bConfig\b", re.MULTILINE)


def _configs() -> Iterator[type[Config]]:
    """The config classes of all modules, each where it is defined."""
    for path in sorted(file for folder in _FOLDERS for file in (ROOT / folder).rglob("*.py")):
        if not _DEFINES.search(path.read_text(encoding="utf-8")):
            continue
        name = "servegym." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        module = importlib.import_module(name.removesuffix(".__init__"))
        for _, one in inspect.getmembers(module, inspect.isclass):
            if issubclass(one, Config) and one.__module__ == module.__name__:
                yield one


def _is_tag(field: FieldInfo) -> bool:
    """Whether the field has one value, which names the class; the class's docstring says what that is."""
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1 and field.is_required()


def test_each_config_field_has_a_description() -> None:
    found = list(_configs())
    assert len(found) > 60
    missing = [
        f"{one.__module__}.{one.__name__}.{name}"
        for one in found
        for name, field in one.model_fields.items()
        if not field.description and not _is_tag(field)
    ]
    assert not missing


@pytest.mark.parametrize("layer", LAYERS)
def test_each_parameter_of_a_policy_has_a_meaning(layer: Layer) -> None:
    missing = [
        f"{policy['name']}.{parameter['name']}"
        for policy in describe(layer)
        for parameter in policy["parameters"]
        if not parameter["meaning"]
    ]
    assert not missing
