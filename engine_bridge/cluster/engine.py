"""One vLLM engine as a process group of its own: command line, start, readiness, end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servegym.errors import EngineError, InputError

SERVER = "vllm.entrypoints.openai.api_server"
_LAST_LINES = 12
_PROBE_S = 5.0
_ORPHANS_S = 2.0


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """What starts one engine.

    Attributes:
        url: where it will listen.
        model: its name in requests.
        argv: the command.
        environment: its whole environment.
        log: file of its output.
    """

    url: str
    model: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path


def vllm_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Write a mapping as vLLM's command line takes it.

    >>> vllm_arguments({"async-scheduling": False, "max-num-seqs": 8, "eplb-config": {"window_size": 10}})
    ['--no-async-scheduling', '--max-num-seqs', '8', '--eplb-config', '{"window_size": 10}']
    """
    words: list[str] = []
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, Mapping):
            words += [flag, json.dumps(value)]
        elif isinstance(value, list | tuple):
            words += [flag, *(str(item) for item in value)]
        else:
            words += [flag, str(value)]
    return words


def free_port(host: str) -> int:
    """Return a port that nobody listens on at the moment."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int, source: str, field: str) -> None:
    """Make sure that a port can be listened on.

    Raises:
        InputError: somebody does already.
    """
    with socket.socket(_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(source, field, f"got {port}; {error.strerror} on {host}") from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class EngineProcess:
    """A running engine.

    Args:
        command: what starts it.
    """

    def __init__(self, command: EngineCommand) -> None:
        self.command = command
        command.log.parent.mkdir(parents=True, exist_ok=True)
        with command.log.open("wb") as log:
            # A session of its own: Ctrl-C at the terminal reaches the launcher alone, which then ends engines in order.
            self._process = subprocess.Popen(
                command.argv,
                env=dict(command.environment),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process and process group id."""
        return self._process.pid

    def check_alive(self) -> None:
        """Make sure that the engine still runs.

        Raises:
            EngineError: it has ended; its last words are in the message.
        """
        code = self._process.poll()
        if code is not None:
            raise self._error(f"ended with code {code}")

    def wait_ready(self, deadline: float) -> None:
        """Wait until the engine has completed a request: a server that answers is not yet an engine that works.

        Args:
            deadline: time.monotonic() to give up at.

        Raises:
            EngineError: the engine ended, or took too long.
        """
        while True:
            self.check_alive()
            if healthy(self.command.url) and completes(self.command.url, self.command.model):
                return
            if time.monotonic() > deadline:
                raise self._error("was not ready within ready_timeout_s")
            time.sleep(0.5)

    def _error(self, what: str) -> EngineError:
        log, words = self.command.log, last_lines(self.command.log)
        if "No module named 'vllm'" in words:
            words += "\n  SERVEGYM_VLLM_PYTHON, or python in the cluster file, names an interpreter that has vLLM"
        return EngineError(f"the engine at {self.command.url} {what}; {log} ends with:\n{words}")


def stop_groups(pids: Sequence[int], timeout_s: float = 15.0) -> None:
    """Interrupt process groups, wait, and kill what is left of them.

    Args:
        pids: leaders of the groups.
        timeout_s: time for a leader to end by itself; what it leaves behind gets two seconds more.
    """
    left = {pid: time.monotonic() + timeout_s for pid in pids if _signal_group(pid, signal.SIGINT)}
    led = set(left)
    while left:
        time.sleep(0.05)
        now = time.monotonic()
        for pid, deadline in list(left.items()):
            if pid in led and not _leader_alive(pid):
                led.discard(pid)
                left[pid] = deadline = min(deadline, now + _ORPHANS_S)
            if not group_alive(pid):
                del left[pid]
            elif now > deadline:
                _signal_group(pid, signal.SIGKILL)
                left[pid] = now + 1.0


def _leader_alive(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):  # our own child stays a zombie until it is waited for
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _signal_group(pid: int, number: int) -> bool:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def group_alive(pid: int) -> bool:
    """Whether a process group has a member that is not a zombie."""
    if not Path("/proc/self/stat").exists():  # not Linux
        return _signal_group(pid, 0)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == pid and fields[0] != "Z":
            return True
    return False


def process_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # it has just ended, or this is not Linux
        return not Path("/proc/self/stat").exists()


def last_lines(log: Path, count: int = _LAST_LINES) -> str:
    """Return the last lines of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return "\n".join(f"  {line}" for line in lines[-count:])


def healthy(url: str) -> bool:
    """Whether an engine's server answers."""
    return ask_json(f"{url}/health") is not None


def completes(url: str, model: str) -> bool:
    """Whether an engine completes a request of one token."""
    body = {"model": model, "prompt": "servegym", "max_tokens": 1, "temperature": 0}
    return ask_json(f"{url}/v1/completions", body) is not None


def served_models(url: str) -> Sequence[str]:
    """Return the names of the models that an engine serves.

    Raises:
        InputError: nobody answers there, or not as vLLM does.
    """
    answer = ask_json(f"{url}/v1/models")
    try:
        names = [str(entry["id"]) for entry in (answer or {})["data"]]
    except (KeyError, TypeError):
        raise InputError("cluster", "attach", f"got {url}, where no vLLM engine answers") from None
    return names


def ask_json(url: str, body: Mapping[str, Any] | None = None, timeout_s: float = _PROBE_S) -> Any:
    """Return the JSON of a good answer ({} for an empty one), None for any other."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            content = response.read()
        return json.loads(content) if content else {}
    except (OSError, ValueError, urllib.error.URLError):
        return None


def find_python(configured: str | None) -> str:
    """Return the interpreter of the environment that has vLLM.

    Raises:
        InputError: it does not exist.
    """
    python = configured or os.environ.get("SERVEGYM_VLLM_PYTHON") or shutil.which("python3") or "python3"
    if shutil.which(python) is None:
        raise InputError("cluster", "python", f"got {python}, which is no program; allowed: an interpreter with vLLM")
    return python
