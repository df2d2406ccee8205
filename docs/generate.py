"""Pages that grow out of the code: the README, the command line, environments, policies, configs and the Python API."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
import typer.main
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from servegym.agents.catalogue import catalogue, markdown
from servegym.agents.cli import app
from servegym.agents.init_cli import KINDS

ROOT = Path(__file__).parents[1]
# Links of the README into the repository that have a page here; others keep their text.
_PAGES = {
    "baselines/interface.py": "reference.md",
    "docs/tutorial.md": "tutorial.md",
    "docs/kubernetes.md": "kubernetes.md",
    "docs/results.md": "results.md",
}
# Files that configs name.
_NAMED = {
    "workload file": (
        "servegym.envs.workloads.workload:WorkloadConfig",
        "Named, by path or as shipped, by `workload.name`.",
    ),
    "profile file": ("servegym.envs.profiles.profile:Profile", "Named, by path or as shipped, by `cluster.profile`."),
}
_API = {
    "What policies see, and what they are": "servegym.baselines.interface",
    "Policies by name": "servegym.baselines.registry",
    "Features": "servegym.baselines.features",
    "Bundles": "servegym.engine_bridge.bundle",
    "Rewards": "servegym.envs.rewards",
    "Errors": "servegym.errors",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    content = catalogue()
    pages = {
        "index.md": _readme(files, config),
        "commands.md": _commands(),
        "environments.md": _environments(content),
        "policies.md": _policies(content),
        "configs.md": _configs(),
        "reference.md": _reference(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def _readme(files: Files, config: MkDocsConfig) -> str:
    """The README, with links that lead somewhere; pictures of the repository come along."""

    def link(found: re.Match[str]) -> str:
        mark, text, target = found["mark"], found["text"], found["target"]
        if "://" in target or target.startswith("#"):
            return found[0]
        if mark:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
            return found[0]
        return f"[{text}]({_PAGES[target]})" if target in _PAGES else text

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)]+)\)", link, text)


def _commands() -> str:
    command: Any = typer.main.get_command(app)
    parts = ["# Command line", inspect.cleandoc(command.help), "`--help` after any command tells the same."]
    for panel in dict.fromkeys(one.rich_help_panel for one in command.commands.values()):
        parts.append(f"## {panel}")
        for name, one in command.commands.items():
            if one.rich_help_panel == panel:
                parts += _command(f"servegym {name}", one)
                for inner_name, inner in getattr(one, "commands", {}).items():
                    parts += _command(f"servegym {name} {inner_name}", inner, "####")
    return "\n\n".join(parts) + "\n"


def _command(path: str, command: Any, level: str = "###") -> Iterator[str]:
    yield f"{level} {path}"
    yield inspect.cleandoc(command.help or "")
    rows = []
    for parameter in command.params:
        option = parameter.param_type_name == "option"
        names = ", ".join(f"`{name}`" for name in parameter.opts) if option else f"`{parameter.name}`"
        value = f" `{parameter.metavar}`" if option and parameter.metavar else ""
        needed = " (required)" if parameter.required else ""
        rows.append((f"{names}{value}", f"{parameter.help or ''}{needed}"))
    if rows:
        yield _table(("argument or option", "meaning"), rows)


def _environments(content: dict[str, Any]) -> str:
    parts = ["# Environments", "Plain Gymnasium; `servegym list NAME` shows the same page in a terminal."]
    for entry in content["environments"]:
        parts += [f"## {entry['name']}", markdown(entry["explanation"]), _deeper(markdown(entry["page"]))]
        parts += ["**Config**", _table(("field", "default", "meaning"), _parameters(entry))]
        for key, features in entry["features"].items():
            rows = [
                (f"`{feature['name']}`", feature["meaning"], f"{feature['low']:g} … {feature['high']:g}")
                for feature in features
            ]
            parts += [f"**Features of `{key}`**, in their order", _table(("feature", "meaning", "range"), rows)]
    return "\n\n".join(parts) + "\n"


def _policies(content: dict[str, Any]) -> str:
    parts = ["# Policies", "By layer. The name is what `--policy LAYER=NAME` and configs take; the lowest score wins."]
    for layer, entries in content["policies"].items():
        parts.append(f"## {layer.capitalize()} policies")
        for entry in entries:
            parts += [f"### {entry['name']}", markdown(entry["explanation"])]
            parts.append(_deeper(markdown(entry.get("formula") or "")))
            if entry["parameters"]:
                parts.append(_table(("parameter", "default", "meaning"), _parameters(entry)))
            parts.append(f"Source: {entry['source']}.")
    parts.append("## Learned policies")
    for entry in content["bundles"]:
        parts += [f"### {entry['name']}", _deeper(entry["page"].partition("\n")[2].strip(), 3)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _configs() -> str:
    """All classes that a config is made of, each once, in the order in which they are met."""
    parts = [
        "# Configs",
        "YAML files, strict: an unknown key is an error. `servegym init KIND` writes one with all of this as comments.",
    ]
    seen: set[type[BaseModel]] = set()
    kinds = {kind: (entry, f"Read by `{command.format('FILE')}`.") for kind, (_, _, entry, command) in KINDS.items()}
    for kind, (entry_point, reader) in (kinds | _NAMED).items():
        module, _, name = entry_point.partition(":")
        model = getattr(importlib.import_module(module), name)
        parts += [f"## {kind}", reader]
        waiting = [model]
        while waiting:
            one = waiting.pop(0)
            if one in seen:
                continue
            seen.add(one)
            parts += [f"### {one.__name__}", _deeper(markdown(inspect.getdoc(one) or "")), _fields(one)]
            waiting += [inner for field in one.model_fields.values() for inner in _models(field.annotation)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [model for argument in arguments for model in _models(argument)]


def _fields(model: type[BaseModel]) -> str:
    rows = []
    for name, field in model.model_fields.items():
        inner = dict.fromkeys(_models(field.annotation))
        sections = ", ".join(f"[{one.__name__}](#{one.__name__.lower()})" for one in inner)
        meaning = "; ".join(filter(None, (field.description or _tag(field.annotation), sections)))
        rows.append((f"`{name}`", _default(field.get_default(call_default_factory=True)), meaning))
    return _table(("key", "default", "meaning"), rows)


def _tag(annotation: Any) -> str:
    """The one value of a key that says which class is meant."""
    return f"`{get_args(annotation)[0]}`" if get_origin(annotation) is Literal else ""


def _default(value: Any) -> str:
    """A default in a cell; a section tells its own below."""
    if value is PydanticUndefined:
        return "required"
    return "" if isinstance(value, BaseModel) else f"`{_yaml(value)}`"


def _reference() -> str:
    parts = [
        "# Python",
        "Import as `servegym.…`. Environments are made by `gymnasium.make`; see [Environments](environments.md).",
    ]
    for title, module in _API.items():
        parts += [
            f"## {title}",
            f"::: {module}\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false",
        ]
    return "\n\n".join(parts) + "\n"


def _parameters(entry: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (f"`{item['name']}`", "" if item["default"] is None else f"`{item['default']}`", item["meaning"])
        for item in entry["parameters"]
    ]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *(tuple(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(markdown(text).split()).replace("|", "\\|")


def _deeper(text: str, levels: int = 2) -> str:
    """Headings of a page within a page."""
    return re.sub(r"^(#+) ", lambda found: f"{'#' * levels}{found[1]} ", text, flags=re.MULTILINE)


def _yaml(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, BaseModel):
        return type(value).__name__
    plain = str(value) if isinstance(value, Path) else value
    return str(yaml.safe_dump(plain, default_flow_style=True, width=10_000)).removesuffix("...\n").strip()
