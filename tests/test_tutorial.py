"""The tutorial's own commands, taken from the document and run as a reader would."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[1] / "docs" / "tutorial.md"
_BLOCK = re.compile(r'^```(?P<kind>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)
_LIVE = "## Deploy it on two engines"
_ADDRESS = "127.0.0.1:8000"

ENGINE = os.environ.get("SERVEGYM_VLLM_PYTHON", "")


def _files_and_script(text: str) -> tuple[dict[str, str], str]:
    """The files that a text shows, and its commands as one script."""
    blocks = list(_BLOCK.finditer(text))
    files = {block["title"]: block["text"] for block in blocks if block["title"]}
    return files, "\n".join(block["text"] for block in blocks if block["kind"] == "bash")


def _run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run commands by bash, until the first one that fails, with this interpreter's servegym on the path."""
    command = folder / "bin" / "servegym"
    if not command.exists():
        command.parent.mkdir()
        body = "from servegym.agents.cli import main; main()"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{body}" "$@"\n', encoding="utf-8")
        command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("first-hour")


@pytest.fixture(scope="module")
def simulated(folder: Path) -> subprocess.CompletedProcess[str]:
    """What the part without engines prints."""
    files, script = _files_and_script(DOCUMENT.read_text(encoding="utf-8").partition(_LIVE)[0])
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return _run(script, folder)


@pytest.mark.slow
def test_from_the_first_command_to_a_trained_policy(simulated: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert simulated.returncode == 0, simulated.stderr
    last = simulated.stdout.rpartition("best policy:")[2]
    assert re.findall(r"^ (\w+) +\d", last, re.MULTILINE) == [
        "round_robin",
        "least_requests",
        "load_aware",
        "mine",
        "learned",
    ]
    # The learned policy is better than the baseline, beyond chance.
    difference = re.search(r"^ learned .*\n +([+-][\d.]+)±[\d.]+\*", last, re.MULTILINE)
    assert difference is not None
    assert float(difference[1]) < 0
    assert (folder / "runs" / "learned" / "policy").is_dir()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(not ENGINE, reason="SERVEGYM_VLLM_PYTHON names no interpreter with vLLM")
@pytest.mark.skipif(shutil.which("curl") is None, reason="the tutorial asks by curl")
def test_it_is_deployed_on_two_engines(simulated: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert simulated.returncode == 0, simulated.stderr
    _, script = _files_and_script(DOCUMENT.read_text(encoding="utf-8").partition(_LIVE)[2])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{probe.getsockname()[1]}"
    try:
        done = _run(script.replace(_ADDRESS, free), folder)
    finally:
        _run("servegym deploy stop || true; servegym cluster down local || true", folder)
    assert done.returncode == 0, done.stderr
    assert '"choices"' in done.stdout
    assert "mode canary 20 %" in done.stdout
    assert '"policy":"' in done.stdout.rpartition("\n{")[2]
