"""Stands for an environment's interpreter with vLLM: a tiny server with the paths that we use, and faults on demand.

The environment variable FAKE_VLLM holds JSON: ``crash`` (end at once, after some words), ``broken`` (healthy, completes
nothing), ``ttft_s``, ``itl_s``, ``fail_every`` (503 to each n-th streamed request), ``cut`` (streams break off),
``immovable`` (experts cannot be moved), ``policy`` (the scheduler's), ``slots`` (serves so many streams at once and
tells on ``/metrics`` how many run and wait). ``/seen`` tells the priorities of
the requests so far.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OPTIONS: dict[str, Any] = json.loads(os.environ.get("FAKE_VLLM", "{}"))
STREAMED = 0
TAKEN = 0  # streams that run or wait
SLOTS = threading.Semaphore(OPTIONS.get("slots", 10_000))
PRIORITIES: list[int] = []
# Two layers of four experts on two ranks: the first expert of each layer gets most tokens.
HELD = [[[0, 1], [0, 1]], [[2, 3], [2, 3]]]
COUNTS = [[70, 20, 5, 5], [60, 30, 5, 5]]


def _argument(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def _call(method: str, *arguments: str) -> list[dict[str, Any]]:
    """What the two ranks answer to a call of our worker extension."""
    if method == "servegym_start":
        return [{"layers": 2, "experts": 4}] * 2
    if method == "servegym_counts":
        return [{"counts": COUNTS, "steps": 9}] * 2
    if method == "servegym_placement":
        return [{"held": rank} for rank in HELD]
    if OPTIONS.get("immovable"):
        return [{"error": "out of memory"}] * 2
    layer, ranks = int(arguments[0]), json.loads(arguments[1])
    moved = []
    for rank, held in enumerate(HELD):
        wanted = [expert for expert, place in enumerate(ranks) if place == rank]
        moved.append({"moved": len(set(wanted) - set(held[layer]))})
        held[layer] = wanted
    return moved


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as vLLM's server does: tokens are not held back

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._answer(200, {"data": [{"id": _argument("--served-model-name")}]})
        elif self.path.startswith("/server_info") and "policy" in OPTIONS:
            self._answer(200, {"vllm_config": {"scheduler_config": {"policy": OPTIONS["policy"]}}})
        elif self.path == "/seen":
            self._answer(200, PRIORITIES)
        elif self.path == "/metrics" and "slots" in OPTIONS:
            running = min(TAKEN, OPTIONS["slots"])
            page = f"vllm:num_requests_running {running}\nvllm:num_requests_waiting {TAKEN - running}\n"
            self._answer(200, page + f"vllm:kv_cache_usage_perc {running / OPTIONS['slots']}\n")
        else:
            self._answer(200, None)

    def do_POST(self) -> None:
        global STREAMED
        body = json.loads(self._body())
        if self.path == "/collective_rpc":
            self._answer(200, {"results": _call(body["method"], *body["args"])})
        elif OPTIONS.get("broken"):
            self._answer(500, {"error": "broken"})
        elif not body.get("stream"):
            time.sleep(OPTIONS.get("ttft_s", 0.0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            self._answer(200, {"choices": [{"text": "a"}], "headers": headers, "port": _argument("--port")})
        else:
            STREAMED += 1
            PRIORITIES.append(body.get("priority", 0))
            if OPTIONS.get("fail_every") and STREAMED % OPTIONS["fail_every"] == 0:
                self._answer(503, {"error": "busy"})
            else:
                self._in_turn(body)

    def _in_turn(self, body: dict[str, Any]) -> None:
        global TAKEN
        TAKEN += 1
        try:
            with SLOTS:
                self._stream(body)
        finally:
            TAKEN -= 1

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, content: Any) -> None:
        data = (
            b"" if content is None else content.encode() if isinstance(content, str) else json.dumps(content).encode()
        )
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        time.sleep(OPTIONS.get("ttft_s", 0.01))
        for token in range(body["max_tokens"]):
            time.sleep(OPTIONS.get("itl_s", 0.001) if token else 0.0)
            self._event({"choices": [{"text": "a"}]})
            if OPTIONS.get("cut") and token == 2:
                self.close_connection = True
                return
        usage = {"completion_tokens": body["max_tokens"], "prompt_tokens_details": {"cached_tokens": 3}}
        if isinstance(body.get("prompt"), str):
            usage["prompt_tokens"] = len(body["prompt"].split())
        elif isinstance(body.get("prompt"), list):
            usage["prompt_tokens"] = len(body["prompt"])
        self._event({"choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, content: Any) -> None:
        self._chunk(b"data: " + json.dumps(content).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


if __name__ == "__main__":
    if OPTIONS.get("crash"):
        print("loading the model\nout of memory, alas", flush=True)
        sys.exit(3)
    # A child of its own, as vLLM has, which ends only if somebody ends it.
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(2, signal.SIG_IGN); signal.pause()"])
    # Clients come by the hundred; those that find the backlog full would be taken for a failed engine.
    ThreadingHTTPServer.request_queue_size = 512
    server = ThreadingHTTPServer(("127.0.0.1", int(_argument("--port"))), Handler)
    server.daemon_threads = True
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    server.serve_forever()
