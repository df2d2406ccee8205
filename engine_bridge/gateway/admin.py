"""The admin page of a deployment: status, metrics, another policy, drained engines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web
from pydantic import Field

from servegym.baselines.interface import E_INFLIGHT, E_KV_USAGE, E_PREFILL_TOKENS, E_RUNNING, E_WAITING
from servegym.baselines.policy_spec import PolicySpec
from servegym.configuration import Config, validate
from servegym.engine_bridge.gateway.config import Mode, Percent
from servegym.engine_bridge.gateway.core import Gateway
from servegym.errors import InputError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class SwapRequest(Config):
    """Another policy, mode or share."""

    policy: PolicySpec | None = Field(
        default=None, description="the new engine policy or bundle; null: the present one"
    )
    mode: Mode | None = Field(default=None, description="the new mode; null: the present one")
    percent: Percent | None = Field(default=None, description="of sessions that a canary serves; null: as before")


class DrainRequest(Config):
    """An engine that is to get nothing new, or to get requests again."""

    engine: str = Field(description="its address, HOST:PORT or a URL")
    drain: bool = Field(default=True, description="true: no new requests; false: requests again")


class Admin:
    """Routes of the admin page.

    Args:
        gateway: what it is about.
        facts: what else ``/status`` shows.
        ready: whether requests are decided about.
    """

    def __init__(self, gateway: Gateway, facts: Mapping[str, Any], ready: Callable[[], bool] = lambda: True) -> None:
        self._ready = ready
        self._gateway = gateway
        self._facts = facts
        self._swapping = asyncio.Lock()

    def app(self) -> web.Application:
        """Return the application."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.get("/status", self._status),
                web.post("/policy", _answering(self._policy)),
                web.post("/drain", _answering(self._drain)),
            ]
        )
        return app

    def open_app(self) -> web.Application:
        """Return an application that anybody may ask: it tells of health and metrics, and changes nothing."""
        app = web.Application()
        app.add_routes([web.get("/health", self._health), web.get("/metrics", self._metrics)])
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(text="ok") if self._ready() else web.Response(status=503, text="not serving")

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._gateway.metrics.page(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(self.status())

    def status(self) -> dict[str, Any]:
        """Return what ``servegym deploy status`` shows."""
        gateway, arms = self._gateway, self._gateway.arms
        ages = gateway.table.telemetry_age_s(gateway.now())
        recent = gateway.recent.summary(gateway.now(), len(gateway.endpoints))
        engines = [
            {
                "endpoint": endpoint,
                "state": gateway.health.describe(engine),
                "in_flight": int(row[E_INFLIGHT]),
                "prefill_tokens": int(row[E_PREFILL_TOKENS]),
                "waiting": int(row[E_WAITING]),
                "running": int(row[E_RUNNING]),
                "kv_usage": round(float(row[E_KV_USAGE]), 4),
                "telemetry_age_s": round(float(ages[engine]), 3),
                "ejections": gateway.health.ejections(engine),
            }
            | recent["engines"][engine]
            for engine, (endpoint, row) in enumerate(zip(gateway.endpoints, gateway.table.data, strict=True))
            if endpoint
        ]
        return dict(self._facts) | {
            "mode": arms.mode,
            "percent": arms.percent if arms.mode == "canary" else None,
            "policy": arms.policy.name,
            "version": arms.policy.version,
            "baseline": arms.baseline.name,
            "uptime_s": round(gateway.now(), 1),
            "in_flight": gateway.in_flight,
            "fallbacks": dict(arms.policy.policy.fallbacks),
            "causes": dict(arms.policy.policy.causes),
            "recent": {key: value for key, value in recent.items() if key != "engines"},
            "engines": engines,
        }

    async def _policy(self, content: Mapping[str, Any]) -> None:
        wanted = validate(SwapRequest, content, "deploy swap")
        arms = self._gateway.arms
        async with self._swapping:
            arm = arms.policy
            if wanted.policy is not None:
                # Loading and rehearsing may take long, or hang; the requests go on meanwhile.
                arm = await asyncio.to_thread(arms.prepare, wanted.policy, arms.recent())
            arms.install(arm, wanted.mode, wanted.percent)

    async def _drain(self, content: Mapping[str, Any]) -> None:
        wanted = validate(DrainRequest, content, "deploy drain")
        endpoint = wanted.engine.rstrip("/").rpartition("://")[2]
        known = ", ".join(filter(None, self._gateway.endpoints))
        if not endpoint or endpoint not in self._gateway.endpoints:
            raise InputError("deploy drain", "engine", f"got {wanted.engine}; allowed: {known}")
        self._gateway.health.drain(self._gateway.endpoints.index(endpoint), wanted.drain)


def _answering(action: Callable[[Mapping[str, Any]], Awaitable[None]]) -> Handler:
    """Turn bad input into status 400 and its one line."""

    async def handler(request: web.Request) -> web.Response:
        try:
            content = await request.json()
            if not isinstance(content, dict):
                raise InputError("request", "", "allowed: a JSON object")
            await action(content)
        except json.JSONDecodeError:
            return web.json_response({"error": "not JSON"}, status=400)
        except InputError as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response({"done": True})

    return handler
