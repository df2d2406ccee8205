"""What servegym offers: the content of ``servegym list``."""

from __future__ import annotations

import inspect
from typing import Any

from rich.table import Table

from servegym.baselines.registry import LAYERS, describe
from servegym.configuration import Config, load_mapping, shipped_configs

_CONFIG_KINDS = ("simulate", "train", "evaluate")


def catalogue() -> dict[str, Any]:
    """Return policies by layer, environments, workloads, profiles and configs, each with name and explanation."""
    return {
        "policies": {layer: describe(layer) for layer in LAYERS},
        "environments": _environments(),
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
    from servegym.envs.engine_dispatch import EngineDispatchConfig, EngineDispatchEnv

    return [
        {
            "name": "servegym/EngineDispatch-v0",
            "explanation": _first_line(EngineDispatchEnv),
            "parameters": _parameters(EngineDispatchConfig),
            "source": "",
        }
    ]


def _parameters(model: type[Config]) -> list[dict[str, Any]]:
    return [{"name": name, "meaning": info.description or ""} for name, info in model.model_fields.items()]


def _first_line(item: object) -> str:
    return (inspect.getdoc(item) or "").partition("\n")[0]


def _described(name: str, content: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "explanation": " ".join(str(content.get("description", "")).split()),
        "parameters": [],
        "source": " ".join(str(content.get("source", "")).split()),
    }


def _first_comment(text: str) -> str:
    line = text.partition("\n")[0]
    return line.removeprefix("#").strip() if line.startswith("#") else ""


def tables(content: dict[str, Any]) -> list[Table]:
    """Return the catalogue as tables."""
    found = []
    for layer, policies in content["policies"].items():
        table = Table("name", "explanation", "parameters", title=f"{layer} policies", title_justify="left")
        for entry in policies:
            parameters = ", ".join(f"{item['name']}={item['default']}" for item in entry["parameters"])
            table.add_row(entry["name"], entry["explanation"], parameters)
        found.append(table)
    for kind in ("environments", "workloads", "profiles", "configs"):
        table = Table("name", "explanation", title=kind, title_justify="left")
        for entry in content[kind]:
            name = f"{entry['source']} {entry['name']}" if kind == "configs" else entry["name"]
            table.add_row(name, entry["explanation"])
        found.append(table)
    return found
