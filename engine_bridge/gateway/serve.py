"""A deployment as a process: picker, access log, admin page, telemetry, and Envoy as its child."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import grpc
import grpc.aio
from aiohttp import web

from servegym.engine_bridge.cluster.engine import check_port, free_port, process_alive, stop_groups
from servegym.engine_bridge.gateway.access_log import AccessLog
from servegym.engine_bridge.gateway.admin import Admin
from servegym.engine_bridge.gateway.arms import Arms
from servegym.engine_bridge.gateway.config import DeployConfig, Tls, split_address
from servegym.engine_bridge.gateway.core import Gateway
from servegym.engine_bridge.gateway.decision_log import DecisionLog
from servegym.engine_bridge.gateway.envoy import Envoy
from servegym.engine_bridge.gateway.envoy_config import envoy_config, write_json
from servegym.engine_bridge.gateway.metrics import GatewayMetrics
from servegym.engine_bridge.gateway.picker import Picker
from servegym.engine_bridge.gateway.static_key import StaticKey
from servegym.engine_bridge.router.discovery import Discovery, discover, endpoint_of
from servegym.engine_bridge.router.telemetry import watch
from servegym.errors import EngineError, InputError

STATE = "state.json"
_BACKOFF_S = (0.2, 1.0, 5.0)
_logger = logging.getLogger("servegym.gateway")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Deployment:
    """A deployment that serves.

    Attributes:
        listen: address of the OpenAI-compatible endpoint; None without Envoy.
        picker: address of the Endpoint Picker.
        admin: address of status and metrics.
        gateway: its decisions.
        envoy: its data plane; None without one.
    """

    listen: str | None
    picker: str
    admin: str
    gateway: Gateway
    envoy: Envoy | None


def endpoints_of(urls: Sequence[str]) -> tuple[str, ...]:
    """Return ``host:port`` of engines, with hosts as IP addresses, as Envoy wants them.

    Raises:
        InputError: a host without an address, or TLS to an engine.
    """
    endpoints = []
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None or parts.port is None:
            raise InputError("deploy", "engines", f"got {url}; allowed: http://HOST:PORT")
        try:
            address = str(socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            raise InputError("deploy", "engines", f"got {url}: {error.strerror}") from None
        endpoints.append(endpoint_of(address, parts.port))
    return tuple(endpoints)


@asynccontextmanager
async def deployed(
    config: DeployConfig,
    folder: Path,
    urls: Sequence[str],
    *,
    discovery: Discovery | None = None,
    static_key: StaticKey | None = None,
    with_envoy: bool = True,
    facts: dict[str, Any] | None = None,
    say: Say = lambda text: None,
) -> AsyncIterator[Deployment]:
    """Serve while the context is open; on leaving, running streams may finish within ``drain_s``.

    Args:
        config: settings.
        folder: for state, logs and Envoy's files; made if absent.
        urls: of the engines; none with ``discovery``.
        discovery: engines that come and go.
        static_key: priority of requests, where the engines take one.
        with_envoy: start Envoy; otherwise only the picker, for a gateway that brings its own.
        facts: what else ``deploy status`` shows.
        say: told of what happens, a line each.

    Raises:
        InputError: an address in use, a policy that cannot be loaded, a log that cannot be written.
        EngineError: Envoy does not start.
    """
    if with_envoy and config.picker_tls is not None:
        raise InputError("deploy", "picker_tls", "is for gateways that bring their own Envoy; allowed: with --no-envoy")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    _end_earlier(folder, config.name)
    log = DecisionLog(config.log or folder / "decisions.jsonl", config.prefix.block_tokens)
    deadline_s = config.deadline_ms / 1000
    endpoints = endpoints_of(urls) if discovery is None else ("",) * discovery.most_engines
    arms = Arms(config.policy, config.baseline, config.mode, config.percent, deadline_s, config.seed)
    envoy: Envoy | None = None

    def rewrite() -> None:
        up = gateway.healthy_endpoints()
        _logger.warning("engines in rotation: %s", ", ".join(up) or "none")
        if envoy is not None:
            envoy.write_endpoints(up)

    gateway = Gateway(config, endpoints, arms, log, GatewayMetrics(), static_key, rewrite)
    picker = Picker(gateway)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(log.close)
        picker_address = await stack.enter_async_context(_grpc_server(config, picker, gateway))
        listen = _with_port(config.listen, "listen") if with_envoy else None
        known = {"name": config.name, "listen": listen, "picker": picker_address, "pid": os.getpid()} | (facts or {})
        admin = Admin(gateway, known, lambda: picker.serving)
        admin_address = await stack.enter_async_context(_web_server(config.admin, "admin", admin.app()))
        if config.metrics is not None:
            known["metrics"] = await stack.enter_async_context(_web_server(config.metrics, "metrics", admin.open_app()))
        if with_envoy:
            assert listen is not None
            page = f"127.0.0.1:{free_port('127.0.0.1')}"
            settings = config.model_copy(update={"listen": listen})
            envoy = Envoy(folder, envoy_config(settings, folder, picker_address, len(endpoints), page), page)
            envoy.write_endpoints(gateway.healthy_endpoints())
            await envoy.start()
            stack.callback(envoy.stop)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        await stack.enter_async_context(
            _background(
                watch(
                    session,
                    gateway.urls,
                    gateway.table,
                    gateway.health,
                    period_s=config.telemetry_period_s,
                    clock=gateway.now,
                ),
                _housekeeping(gateway),
                *([] if discovery is None else [_discover(gateway, discovery, say)]),
                *([] if envoy is None else [_keep_alive(envoy, folder, known, admin_address, say)]),
            )
        )
        _write_state(folder, known, admin_address, envoy)
        stack.callback((folder / STATE).unlink, missing_ok=True)
        picker.serving = True
        try:
            yield Deployment(listen, picker_address, admin_address, gateway, envoy)
        finally:
            picker.serving = False
            await _drain(picker, gateway, envoy, config.drain_s, say)


async def serve(
    config: DeployConfig,
    folder: Path,
    urls: Sequence[str],
    *,
    discovery: Discovery | None = None,
    static_key: StaticKey | None = None,
    with_envoy: bool = True,
    facts: dict[str, Any] | None = None,
    say: Say = print,
) -> None:
    """Serve until SIGTERM or Ctrl-C; a second one ends at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            for task in asyncio.all_tasks():
                task.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    async with deployed(
        config, folder, urls, discovery=discovery, static_key=static_key, with_envoy=with_envoy, facts=facts, say=say
    ) as deployment:
        arms = deployment.gateway.arms
        front = "behind your gateway" if deployment.listen is None else f"on http://{deployment.listen}/v1"
        share = f" {config.percent:g} %" if arms.mode == "canary" else ""
        say(f"serving {front}: {arms.policy.name}, mode {arms.mode}{share}; Endpoint Picker {deployment.picker}")
        say(f"status and metrics on http://{deployment.admin}; Ctrl-C drains and ends")
        await stop.wait()


@asynccontextmanager
async def _grpc_server(config: DeployConfig, picker: Picker, gateway: Gateway) -> AsyncIterator[str]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers([*picker.handlers(), AccessLog(gateway).handler()])
    address = _with_port(config.picker, "picker")
    try:
        if config.picker_tls is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, _credentials(config.picker_tls))
    except RuntimeError as error:
        raise InputError("deploy", "picker", f"got {address}; {error}") from None
    await server.start()
    try:
        yield address
    finally:
        await server.stop(grace=0.2)


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    try:
        pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
    except OSError as error:
        raise InputError("deploy", "picker_tls", f"got {error.filename}: {error.strerror}") from None
    return grpc.ssl_server_credentials([pair])


@asynccontextmanager
async def _web_server(wanted: str, field: str, app: web.Application) -> AsyncIterator[str]:
    address = _with_port(wanted, field)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, *split_address(address)).start()
        yield address
    finally:
        await runner.cleanup()


@asynccontextmanager
async def _background(*coroutines: Any) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _housekeeping(gateway: Gateway) -> None:
    while True:
        await asyncio.sleep(30.0)
        gateway.forget()


async def _discover(gateway: Gateway, discovery: Discovery, say: Say) -> None:
    """Give the engines that are found their places."""
    left: tuple[str, ...] = ()

    def found(endpoints: frozenset[str]) -> None:
        nonlocal left
        before, left = left, gateway.found(endpoints)
        if left and left != before:
            say(f"no place for {', '.join(left)}: most_engines is {discovery.most_engines}, and requests may still run")

    await discover(discovery.url, found)


async def _keep_alive(envoy: Envoy, folder: Path, known: dict[str, Any], admin: str, say: Say) -> None:
    """Start Envoy again when it has died."""
    died = 0
    while True:
        await asyncio.sleep(0.2)
        if not envoy.ended:
            continue
        wait = _BACKOFF_S[min(died, len(_BACKOFF_S) - 1)]
        died += 1
        say(f"Envoy has ended; starting it again in {wait:g} s, log {envoy.log}")
        await asyncio.sleep(wait)
        with contextlib.suppress(EngineError):
            await envoy.start()
            _write_state(folder, known, admin, envoy)


async def _drain(picker: Picker, gateway: Gateway, envoy: Envoy | None, seconds: float, say: Say) -> None:
    if envoy is not None:
        if envoy.ended:
            return
        await envoy.close_listener()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    said = False
    while (active := picker.streams if envoy is None else await envoy.active_requests()) and loop.time() < deadline:
        if not said:
            say(f"draining: {active} requests run; again Ctrl-C ends them")
            said = True
        await asyncio.sleep(0.1)
    # The last ends come with the access log's next flush.
    for _ in range(10):
        if not gateway.in_flight:
            break
        await asyncio.sleep(0.1)


def _with_port(address: str, field: str) -> str:
    """Return an address whose port is free, any if it is 0.

    Raises:
        InputError: somebody listens there.
    """
    host, port = split_address(address)
    if port == 0:
        port = free_port(host)
    else:
        check_port(host, port, "deploy", field)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return what a deployment's folder says of it; None if nothing serves there."""
    try:
        content: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content


def _write_state(folder: Path, known: dict[str, Any], admin: str, envoy: Envoy | None) -> None:
    write_json(folder / STATE, known | {"admin": admin, "envoy_group": None if envoy is None else envoy.group})


def _end_earlier(folder: Path, name: str) -> None:
    """Take over from a deployment that was killed: its Envoy still serves.

    Raises:
        InputError: it was not killed.
    """
    state = read_state(folder)
    if state is None:
        return
    if process_alive(state["pid"]) and state["pid"] != os.getpid():
        raise InputError("deploy", "name", f"got {name}, which serves already (process {state['pid']})")
    if state.get("envoy_group"):
        stop_groups([state["envoy_group"]], timeout_s=3.0)
