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

from servegym.configuration import find_config, load_mapping, shipped_configs, validate
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

    Raises:
        InputError: it is not a config of that kind.
    """
    module, _, name = KINDS[kind][2].partition(":")
    model: type[BaseModel] = getattr(importlib.import_module(module), name)
    text = origin.read_text(encoding="utf-8").rstrip()
    given = load_mapping(origin)
    lines = [_line(key, field) for key, field in settings(validate(model, given, str(origin)), given)]
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


def settings(config: BaseModel, given: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the settings that a config leaves at their defaults, by dotted name.

    Args:
        config: the config.
        given: what its file sets.
        prefix: of the names.
    """
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel) and (
            isinstance(given.get(name), dict) or (name not in given and _plain(value))
        ):
            yield from settings(value, given.get(name, {}), f"{prefix}{name}.")
        elif name not in given and not field.is_required():
            yield f"{prefix}{name}", field


def _plain(section: BaseModel) -> bool:
    """Whether a section has the defaults of its class, so that each of its settings may be told apart."""
    try:
        return section == type(section)()
    except ValueError:
        return False


def _line(key: str, field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
    shown = yaml.safe_dump(_yaml(value), default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    setting = f"#   {key}: {shown}"
    return f"{setting:<{_WIDTH}} # {field.description}" if field.description else setting


def _yaml(value: Any) -> Any:
    """What YAML can hold."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, list | tuple):
        return [_yaml(item) for item in value]
    if isinstance(value, dict):
        return {key: _yaml(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
