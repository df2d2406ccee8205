"""``servegym init``: a config of one's own, from a shipped one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from servegym.configuration import find_config, load_mapping, shipped_configs
from servegym.errors import InputError, nearest

# kind -> (folder of shipped configs, the one to begin from, its class, the command that reads it)
KINDS: dict[str, tuple[str, str, str, str]] = {
    "simulate": ("simulate", "quickstart", "servegym.envs.simulation:SimulationConfig", "servegym simulate {}"),
    "train": ("train", "dispatch_ppo", "servegym.agents.training.config:TrainConfig", "servegym train {}"),
    "evaluate": ("evaluate", "quick", "servegym.agents.evaluation:EvaluationConfig", "servegym evaluate {}"),
    "tune": ("tune", "dispatch", "servegym.agents.tuning.config:TuneConfig", "servegym tune {}"),
    "cluster": ("clusters", "local", "servegym.engine_bridge.cluster.config:ClusterFile", "servegym cluster up {}"),
    "deploy": (
        "deploy",
        "local",
        "servegym.engine_bridge.gateway.config:DeployConfig",
        "servegym deploy lmetric --cluster local --config {}",
    ),
    "replay": ("replay", "local", "servegym.envs.live.replay:ReplayConfig", "servegym replay {} --cluster local"),
    "validate": (
        "validate",
        "local",
        "servegym.envs.validation.config:ValidationConfig",
        "servegym validate {} --profile mine.yaml",
    ),
}
_WIDTH = 44


def init_command(
    kind: Annotated[str, typer.Argument(help=f"What for: {', '.join(KINDS)}.")],
    file: Annotated[Path | None, typer.Argument(help="The file to write; default: KIND.yaml.")] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="NAME", help="The config to begin from, by name, or a file.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that exists.")] = False,
) -> None:
    """Write a commented config to change: a shipped one, and below it all other settings with their defaults."""
    if kind not in KINDS:
        raise InputError("servegym init", kind, f"unknown kind; {nearest(kind, KINDS)}")
    folder, first, _, command = KINDS[kind]
    target = file if file is not None else Path(f"{kind}.yaml")
    if target.suffix not in (".yaml", ".yml"):
        raise InputError("servegym init", str(target), "allowed: a file that ends in .yaml")
    if target.exists() and not force:
        raise InputError(str(target), "", "exists; allowed: another name, or --force")
    if not target.parent.is_dir():
        raise InputError(str(target), "", f"no folder {target.parent}")
    origin = find_config(source if source is not None else first, folder)
    target.write_text(commented(kind, origin), encoding="utf-8")
    others = sorted(set(shipped_configs(folder)) - {origin.stem})
    print(f"{target}: from {origin.stem}; next: {command.format(target)}")
    if others and source is None:
        print(f"others to begin from: --from {' | '.join(others)}", file=sys.stderr)


def commented(kind: str, origin: Path) -> str:
    """Return a config's text, followed by a comment with all settings that it leaves at their defaults.

    Args:
        kind: one of ``KINDS``.
        origin: the config to begin from.
    """
    module, _, name = KINDS[kind][2].partition(":")
    model: type[BaseModel] = getattr(importlib.import_module(module), name)
    text = origin.read_text(encoding="utf-8").rstrip()
    lines = [_line(key, field) for key, field in settings(model, load_mapping(origin))]
    return "\n".join(
        [
            text,
            "",
            "# What else can be set, with its default. A dot is a level: a.b: 1 stands in the file as a: {b: 1}, and",
            "# on the command line as --set a.b=1, where the command has it.",
            *lines,
            "",
        ]
    )


def settings(model: type[BaseModel], given: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the settings of a config that a mapping does not give, by dotted name; required ones are left out.

    Args:
        model: the config's class.
        given: what a file sets.
        prefix: of the names.
    """
    for name, field in model.model_fields.items():
        inner, value = _section(field), given.get(name)
        if inner is not None and (name not in given or isinstance(value, dict)):
            yield from settings(inner, value or {}, f"{prefix}{name}.")
        elif name not in given and not field.is_required():
            yield f"{prefix}{name}", field


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The class of a field that is a section with defaults of its own; None for a value or a choice of sections."""
    kind = field.annotation
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)) or field.is_required():
        return None
    default = field.get_default(call_default_factory=True)
    plain = type(default) is kind and default == _defaults(kind)
    return kind if plain else None


def _defaults(model: type[BaseModel]) -> BaseModel | None:
    try:
        return model()
    except ValueError:
        return None


def _line(key: str, field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
    shown = yaml.safe_dump(_plain(value), default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    setting = f"#   {key}: {shown}"
    return f"{setting:<{_WIDTH}} # {field.description}" if field.description else setting


def _plain(value: Any) -> Any:
    """What YAML can hold."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
