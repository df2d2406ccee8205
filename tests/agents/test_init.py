"""``servegym init`` and the table of contents: what a newcomer meets first."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from servegym.agents.cli import app
from servegym.agents.init_cli import KINDS, commented
from servegym.configuration import apply_overrides, find_config, shipped_configs, validate
from servegym.errors import InputError

SHIPPED = [(kind, name) for kind, (folder, *_) in KINDS.items() for name in shipped_configs(folder)]


def _written(kind: str, name: str) -> tuple[Any, str, list[str]]:
    """The class, the whole text, and the settings of its last comment as ``key=value``."""
    folder, _, entry_point, _ = KINDS[kind]
    module, _, attribute = entry_point.partition(":")
    text = commented(kind, find_config(name, folder))
    lines = text.rpartition("has it.\n")[2].splitlines()
    # What is listed is YAML, its description a comment.
    listed = [yaml.safe_load(line.removeprefix("#   ")) for line in lines]
    overrides = [f"{key}={yaml.safe_dump(value)}" for item in listed for key, value in item.items()]
    return getattr(importlib.import_module(module), attribute), text, overrides


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_all_settings_that_are_listed_exist_and_have_that_default(kind: str, name: str) -> None:
    model, text, overrides = _written(kind, name)
    content = yaml.safe_load(text)
    assert overrides
    assert validate(model, apply_overrides(content, overrides), "all") == validate(model, content, "some")


def test_a_file_is_written_once_and_says_what_to_do_next(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    done = CliRunner().invoke(app, ["init", "evaluate", str(file), "--from", "quick"])
    assert done.exit_code == 0
    assert f"next: servegym evaluate {file}" in done.output
    file.write_text("name: changed\n", encoding="utf-8")
    again = CliRunner().invoke(app, ["init", "evaluate", str(file)])
    assert isinstance(again.exception, InputError)
    assert "exists; allowed: another name, or --force" in str(again.exception)
    assert file.read_text(encoding="utf-8") == "name: changed\n"


def test_names_that_are_not_there_lead_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mine.yaml: no such file; write one: servegym init train .*mine.yaml"):
        find_config(tmp_path / "mine.yaml", "train")
    with pytest.raises(InputError, match="no shipped config in evaluate, but one of `servegym train`"):
        find_config("dispatch_ppo", "evaluate")


def test_help_is_a_table_of_contents() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).output
    panels = ["Look around", "Simulate and compare", "Learn", "Live engines", "What the simulator rests on"]
    places = [shown.index(f"─ {panel} ─") for panel in panels]
    assert places == sorted(places)
    assert "─ Commands ─" not in shown  # each command has its place
    command: Any = typer.main.get_command(app)
    for name in command.commands:
        assert f"│ {name} " in shown
