"""Policies on the command line: ``--policy`` and its like become overrides of a config, checked one by one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import servegym.engine_bridge.bundle  # noqa: F401 - makes bundles available by path
from servegym.baselines.policy_spec import LAYERS, Layer, PolicySpec, parse_policy_option
from servegym.baselines.registry import create
from servegym.configuration import load_mapping, validate
from servegym.envs.simulation import Policies
from servegym.errors import InputError


def layer_overrides(options: Sequence[str] | None, name: str = "--policy") -> list[str]:
    """Turn values such as ``engine=lmetric,x=1`` into overrides of a config's ``policies``.

    Args:
        options: the values.
        name: of the option.

    Raises:
        InputError: names the option, its value, and what is wrong with it.
    """
    found = []
    for option in options or []:
        layer, spec = parse_policy_option(option, name)
        _check(layer, spec, name, option)
        found.append(f"policies.{layer}={spec.model_dump_json()}")
    return found


def label_overrides(options: Sequence[str] | None) -> list[str]:
    """Turn ``--policy learned=runs/x``, or ``learned=request=runs/x``, into entries of an evaluation's policies.

    Raises:
        InputError: names the option, its value, and what is wrong with it.
    """
    found = []
    for option in options or []:
        label, equals, text = option.partition("=")
        if not equals or not label.strip() or "." in label:
            raise InputError("--policy", option, "allowed: LABEL=NAME, such as learned=runs/dispatch_ppo/latest")
        layer: Layer = "engine"
        for one in LAYERS:
            if text.startswith(f"{one}="):
                layer, text = one, text.removeprefix(f"{one}=")
        spec = PolicySpec.parse(text, "--policy")
        _check(layer, spec, "--policy", option)
        found.append(f'policies.{label.strip()}={{"{layer}": {spec.model_dump_json()}}}')
    return found


def file_overrides(path: Path | None) -> list[str]:
    """Turn a YAML file of policies by label into entries of an evaluation's policies.

    Raises:
        InputError: names the file, the label, and what is wrong.
    """
    found = []
    for label, content in (load_mapping(path) if path is not None else {}).items():
        validate(Policies, content, f"{path}: {label}")
        found.append(f"policies.{label}={json.dumps(content)}")
    return found


def _check(layer: Layer, spec: PolicySpec, name: str, value: str) -> None:
    """Make the policy once, so that an error names the option rather than the config that it goes into."""
    try:
        create(layer, spec)
    except InputError as error:
        own = error.source == f"policy {layer}={spec.name}"
        problem = ": ".join(part for part in (error.field, error.problem) if part) if own else str(error)
        raise InputError(name, value, problem) from None
