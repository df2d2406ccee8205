"""``servegym deploy status``: the page, the line, and watching until Ctrl-C."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from gateway_support import SERVEGYM
from rich.console import Console

from servegym.agents.deploy_cli import status
from servegym.agents.deploy_view import Trends, line, page, sparkline, watch
from servegym.errors import EngineError


def traffic(rate: float, ttft: float | None) -> dict[str, Any]:
    values = None if ttft is None else {"p50": ttft, "p90": 2 * ttft, "p99": 3 * ttft}
    return {"requests_per_s": rate, "ttft_s": values}


def engine(port: int, state: str = "up", **more: Any) -> dict[str, Any]:
    known = {"in_flight": 5, "prefill_tokens": 1200, "waiting": 2, "running": 3, "kv_usage": 0.42}
    known |= {"telemetry_age_s": 0.2, "ejections": 0}
    return {"endpoint": f"127.0.0.1:{port}", "state": state} | known | traffic(6.0, 0.1) | more


STATUS: dict[str, Any] = {
    "name": "default",
    "listen": "127.0.0.1:8000",
    "picker": "127.0.0.1:9000",
    "mode": "canary",
    "percent": 10.0,
    "policy": "mine.py:Mine",
    "version": 2,
    "baseline": "least_requests",
    "uptime_s": 3725.2,
    "in_flight": 10,
    "fallbacks": {"late": 3, "KeyError": 1},
    "causes": {"KeyError": "mine.py:7: KeyError: 'a', in score"},
    "recent": {
        "window_s": 30.0,
        "total": traffic(12.0, 0.123),
        "policies": {
            "mine.py:Mine": {"share": 0.094} | traffic(1.1, 0.2),
            "least_requests": {"share": 0.906} | traffic(10.9, 0.111),
        },
        "unserved_per_s": {"failed": 0.1},
        "agreement": None,
    },
    "engines": [engine(45001), engine(45002, "ejected", ejections=4, telemetry_age_s=33.0)],
}


def drawn(width: int, content: dict[str, Any] = STATUS, trends: Trends | None = None) -> str:
    console = Console(width=width, file=io.StringIO(), no_color=True)
    console.print(page(content, trends, width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(row) <= width for row in text.splitlines())
    return " ".join(text.split())


@pytest.mark.parametrize("width", [80, 140])
def test_the_page_says_who_decides_how_it_goes_and_where(width: int) -> None:
    text = drawn(width)
    for part in (
        "on http://127.0.0.1:8000/v1, up 1:02:05",
        "mine.py:Mine (version 2), mode canary 10 % of sessions (9.4% of recent requests), baseline least_requests",
        "12.0 requests/s, 10 in flight, failed 0.1/s; of the last 30 s",
        "p50 0.123, p90 0.246, p99 0.369 s",
        "to least_requests: 3 late, 1 KeyError",
        "mine.py:7: KeyError: 'a', in score",
        "127.0.0.1:45001 up 2 3",
        "127.0.0.1:45002 ejected 2 3",
        "least_requests 90.6% 10.9 0.111 0.222 0.333",
    ):
        assert part in text, part
    assert ("33.0 s" in text) == (width == 140)


def test_before_the_first_request_there_is_nothing_to_divide_by() -> None:
    silent = {"window_s": 0.1, "total": traffic(0.0, None), "policies": {}, "unserved_per_s": {}, "agreement": None}
    young = STATUS | {"recent": silent, "fallbacks": {}, "causes": {}, "engines": [engine(1, **traffic(0.0, None))]}
    trends = Trends()
    trends.add(young)
    text = drawn(80, young, trends)
    assert "no first token yet" in text
    assert "fallbacks none" in text
    assert "no first token yet" in line(young)


def test_trends_remember_and_scale() -> None:
    trends = Trends()
    for rate in (0.0, 4.0, 8.0):
        trends.add(STATUS | {"recent": STATUS["recent"] | {"total": traffic(rate, 0.1)}})
    assert "requests/s ▄█ 8, at most 8" in drawn(80, trends=trends)
    assert sparkline([0, 0]) == "  "


def test_shadow_tells_how_often_both_agree() -> None:
    shadow = STATUS | {"mode": "shadow", "percent": None, "recent": STATUS["recent"] | {"agreement": 0.75}}
    assert "mode shadow, baseline least_requests; they agree on 75.0%" in drawn(140, shadow)


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Path]:
    """A folder in which somebody answers for a deployment."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(STATUS).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = tmp_path / "runs" / "deploy" / "default"
    folder.mkdir(parents=True)
    state = {"pid": os.getpid(), "admin": f"127.0.0.1:{server.server_port}", "envoy_group": None}
    (folder / "state.json").write_text(json.dumps(state))
    yield tmp_path
    server.shutdown()
    server.server_close()


def test_on_a_terminal_the_page_is_drawn_anew_until_ctrl_c(deployment: Path) -> None:
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TERM": "xterm"}
    command = [*SERVEGYM, "deploy", "status", "--watch", "--interval", "0.1"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        cwd=deployment,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    screen = b""
    while screen.count(b"mode canary") < 2:
        screen += os.read(ours, 65536)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # once the terminal's other side is closed
        while more := os.read(ours, 65536):
            screen += more
    os.close(ours)
    assert process.wait(20) == 0
    assert b"Traceback" not in screen
    assert screen.count(b"\x1b[?25h") == 1  # the cursor is shown again
    assert re.search(rb"\x1b\[\d*A", screen)  # drawn in place


def looks(count: int) -> Callable[[], dict[str, Any]]:
    """Answers so often, and is then interrupted."""
    answers = iter([STATUS] * count)

    def look() -> dict[str, Any]:
        try:
            return next(answers)
        except StopIteration:
            raise KeyboardInterrupt from None

    return look


def test_elsewhere_it_is_a_line_per_interval(capsys: pytest.CaptureFixture[str]) -> None:
    watch(looks(3), 0.01, as_json=False)
    said, errors = capsys.readouterr()
    assert errors == ""
    assert len(said.splitlines()) == 3
    for row in said.splitlines():
        assert re.match(r"\d\d:\d\d:\d\d default mine.py:Mine \(version 2\), mode canary 10 %: 12.0 requests/s", row)
        assert "waiting 2+2, running 3+3, KV 42%+42%, fallbacks 4, failed 0.1/s, 127.0.0.1:45002 ejected" in row
        assert "\x1b" not in row


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    watch(looks(2), 0.01, as_json=True)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["time"] < second["time"]
    assert {key: value for key, value in first.items() if key != "time"} == STATUS


def test_the_end_of_a_deployment_ends_the_watch(deployment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(deployment)
    state = deployment / "runs" / "deploy" / "default" / "state.json"
    threading.Timer(0.3, state.unlink).start()
    with pytest.raises(EngineError, match=r"^default has ended$"):
        status("default", watch=True, interval=0.1, as_json=True)
