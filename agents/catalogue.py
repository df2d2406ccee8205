"""What servegym offers: the content of ``servegym list``."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import json
import re
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from rich.console import Group, RenderableType
from rich.markdown import Markdown
from rich.table import Table

import servegym
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import LAYERS, describe
from servegym.configuration import Config, load_mapping, shipped_configs
from servegym.engine_bridge.manifest import MANIFEST
from servegym.engine_bridge.shipped import PREFIX, shipped_bundles
from servegym.errors import InputError, nearest

_CONFIG_KINDS = ("simulate", "train", "tune", "evaluate", "clusters", "replay", "validate", "deploy")


def catalogue() -> dict[str, Any]:
    """Return policies by layer, bundles, environments, workloads, profiles and configs, each with an explanation."""
    return {
        "policies": {layer: describe(layer) for layer in LAYERS},
        "environments": _environments(),
        "bundles": [_bundle(name, folder) for name, folder in shipped_bundles().items()],
        "workloads": [_described(path.stem, load_mapping(path)) for path in shipped_configs("workloads").values()],
        "profiles": [_described(path.stem, load_mapping(path)) for path in shipped_configs("profiles").values()],
        "configs": [
            {
                "name": name,
                "explanation": _first_comment(path.read_text(encoding="utf-8")),
                "parameters": [],
                "source": kind,
            }
            for kind in _CONFIG_KINDS
            for name, path in shipped_configs(kind).items()
        ],
    }


def _environments() -> list[dict[str, Any]]:
    entries = []
    for name, entry_point in servegym.ENVIRONMENTS.items():
        module, _, attribute = entry_point.partition(":")
        environment = getattr(importlib.import_module(module), attribute)
        explanation, _, page = (inspect.getdoc(environment) or "").partition("\n")
        entries.append(
            {
                "name": name,
                "explanation": explanation,
                "page": page.strip(),
                "parameters": _parameters(environment._config_class),
                "features": {
                    key: [dataclasses.asdict(feature) for feature in features]
                    for key, features in environment.features.items()
                },
                "source": "",
            }
        )
    return entries


def _bundle(name: str, folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    training = manifest["training"]
    return {
        "name": name,
        "explanation": f"A learned {manifest['layer']} policy: train config {training['run']},"
        f" {training['steps']:,} decisions.",
        "page": (folder / "README.md").read_text(encoding="utf-8"),
        "parameters": [],
        "source": "",
    }


def _parameters(model: type[Config]) -> list[dict[str, Any]]:
    return [
        {"name": name, "default": _plain(info), "meaning": info.description or ""}
        for name, info in model.model_fields.items()
    ]


def _plain(info: FieldInfo) -> str | int | float | None:
    """The default, where it can be said in a word; a policy by its name."""
    default = info.get_default(call_default_factory=True)
    if isinstance(default, PolicySpec):
        return str(default)
    return default if isinstance(default, str | int | float) else None


def _described(name: str, content: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "explanation": " ".join(str(content.get("description", "")).split()),
        "parameters": [],
        "source": " ".join(str(content.get("source", "")).split()),
    }


def _first_comment(text: str) -> str:
    """The first sentence of the comment that a file begins with; an indented line of it is a command."""
    lines = itertools.takewhile(lambda line: line.startswith("#") and not line.startswith("#   "), text.splitlines())
    sentence, _, _ = " ".join(line.removeprefix("#").strip() for line in lines).partition(". ")
    return f"{sentence.rstrip('.:')}." if sentence else ""


def tables(content: dict[str, Any]) -> list[Table]:
    """Return the catalogue as tables."""
    found = []
    for layer, policies in content["policies"].items():
        table = Table("name", "explanation", "parameters", "source", title=f"{layer} policies", title_justify="left")
        for entry in policies:
            parameters = ", ".join(f"{item['name']}={item['default']}" for item in entry["parameters"])
            table.add_row(entry["name"], entry["explanation"], parameters, entry["source"])
        found.append(table)
    for kind in ("bundles", "environments", "workloads", "profiles", "configs"):
        table = Table("name", "explanation", title=kind, title_justify="left")
        for entry in content[kind]:
            name = f"{entry['source']} {entry['name']}" if kind == "configs" else entry["name"]
            table.add_row(name, entry["explanation"])
        found.append(table)
    return found


def page(content: dict[str, Any], name: str) -> RenderableType:
    """Return all that is known of one entry: formula or description, parameters, source.

    Args:
        content: the catalogue.
        name: an entry's name, also without ``servegym/``; a layer in front (``engine=random``) where
            several layers have the name.

    Raises:
        InputError: no entry, or several, have the name.
    """
    layer, _, bare = name.rpartition("=")
    found = []
    for kind, entries in {**content["policies"], **content}.items():
        if kind != "policies" and layer in ("", kind):
            found += [(kind, entry) for entry in entries if bare in (entry["name"], entry["name"].removeprefix(PREFIX))]
    if not found:
        known = [entry["name"].removeprefix(PREFIX) for entry in _entries(content)]
        hint = nearest(bare, known)
        raise InputError("list", name, f"unknown name; {hint if 'mean' in hint else 'all of them: servegym list'}")
    if len(found) > 1:
        raise InputError("list", name, f"several; allowed: {', '.join(f'{kind}={bare}' for kind, _ in found)}")
    return _page(*found[0])


def _entries(content: dict[str, Any]) -> list[dict[str, Any]]:
    policies = [entry for entries in content["policies"].values() for entry in entries]
    return policies + [entry for kind, entries in content.items() if kind != "policies" for entry in entries]


def _page(kind: str, entry: dict[str, Any]) -> RenderableType:
    layer = f"{kind} policy" if kind in LAYERS else kind.removesuffix("s")
    parts: list[RenderableType] = [Markdown(f"# {entry['name']}\n*{layer}*\n\n{markdown(entry['explanation'])}")]
    text = entry.get("formula") or entry.get("page") or ""
    if text:
        parts.append(Markdown(markdown(text)))
    if entry["parameters"]:
        table = Table("parameter", "default", "meaning", title="")
        for item in entry["parameters"]:
            table.add_row(item["name"], "" if item["default"] is None else str(item["default"]), item["meaning"])
        parts.append(table)
    for key, features in entry.get("features", {}).items():
        table = Table("#", f"feature of {key}", "meaning", "range")
        for number, feature in enumerate(features):
            table.add_row(str(number), feature["name"], feature["meaning"], f"{feature['low']:g} … {feature['high']:g}")
        parts.append(table)
    if entry["source"]:
        parts.append(f"source: {entry['source']}")
    return Group(*parts)


def markdown(text: str) -> str:
    """Docstrings mark code by two backticks; Markdown would keep a line break in it."""
    return re.sub(r":(?:class|mod|func):`~?([^`]*)`", r"`\1`", re.sub(r"(?<!`)``(?!`)", "`", text))
