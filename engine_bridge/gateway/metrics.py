"""Prometheus metrics of a gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from servegym.baselines.interface import (
    E_INFLIGHT,
    E_INFLIGHT_PROMPT_TOKENS,
    E_KV_USAGE,
    E_PREFILL_TOKENS,
    E_RUNNING,
    E_WAITING,
)
from servegym.engine_bridge.gateway.messages import Outcome
from servegym.engine_bridge.router.health import Health
from servegym.engine_bridge.router.table import EngineTable

_DECISION_S = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.2, 1.0)
_TTFT_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_TPOT_S = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5)
_E2E_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)
_GAUGES = {
    "inflight": (E_INFLIGHT, "Requests sent there that have not ended"),
    "inflight_prompt_tokens": (E_INFLIGHT_PROMPT_TOKENS, "Prompt tokens of the requests in flight"),
    "prefill_tokens": (E_PREFILL_TOKENS, "Prompt tokens of requests in flight without a first token"),
    "waiting": (E_WAITING, "Requests in the engine's waiting queue, by its own account"),
    "running": (E_RUNNING, "Requests in the engine's batch, by its own account"),
    "kv_usage": (E_KV_USAGE, "Share of KV blocks in use, by its own account"),
}


class GatewayMetrics:
    """Counters and histograms of a gateway, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._decisions = Counter(
            "servegym_decisions",
            "Requests sent on, by policy and chosen engine",
            ["policy", "engine"],
            registry=registry,
        )
        self._seconds = Histogram(
            "servegym_decision_seconds", "From a request's body to its decision", buckets=_DECISION_S, registry=registry
        )
        self._fallbacks = Counter(
            "servegym_fallbacks", "Decisions made by the heuristic instead", ["policy", "reason"], registry=registry
        )
        self._undecided = Counter(
            "servegym_undecided_requests",
            "Requests that Envoy sent on by itself: the picker had not answered in time",
            ["engine"],
            registry=registry,
        )
        self._refusals = Counter(
            "servegym_refusals", "Requests answered without an engine", ["reason", "code"], registry=registry
        )
        self._requests = Counter(
            "servegym_requests", "Requests that have ended", ["policy", "engine", "code", "ended"], registry=registry
        )
        self._retries = Counter(
            "servegym_retries", "Engines that failed before the first byte", ["engine"], registry=registry
        )
        self._shadow = Counter(
            "servegym_shadow_decisions", "Decisions of a watching policy", ["policy", "agrees"], registry=registry
        )
        latencies = {"ttft": _TTFT_S, "tpot": _TPOT_S, "e2e": _E2E_S}
        self._latencies = {
            name: Histogram(
                f"servegym_{name}_seconds", f"{name.upper()}", ["policy"], buckets=buckets, registry=registry
            )
            for name, buckets in latencies.items()
        }

    def watch(self, table: EngineTable, health: Health, endpoints: Sequence[str], now: Callable[[], float]) -> None:
        """Report the engines of a table, as they are when the page is read; "" is nobody's place."""
        self._registry.register(_Engines(table, health, endpoints, now))

    def page(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def decided(self, policy: str, engine: str, seconds: float) -> None:
        """Count a decision."""
        self._decisions.labels(policy, engine).inc()
        self._seconds.observe(seconds)

    def fallback(self, policy: str, reason: str) -> None:
        """Count a decision that the policy did not make; nothing if ``reason`` is empty."""
        if reason:
            self._fallbacks.labels(policy, reason).inc()

    def undecided(self, engine: str) -> None:
        """Count a request that an engine has served without a decision."""
        self._undecided.labels(engine).inc()

    def shadow(self, policy: str, agrees: bool) -> None:
        """Count what a watching policy would have done."""
        self._shadow.labels(policy, str(agrees).lower()).inc()

    def refused(self, reason: str, status: int) -> None:
        """Count a request that no engine has seen."""
        self._refusals.labels(reason, str(status)).inc()

    def retried(self, engine: str) -> None:
        """Count an engine that failed before the first byte."""
        self._retries.labels(engine).inc()

    def ended(self, policy: str, engine: str, outcome: Outcome, ended: str) -> None:
        """Count a request's end, and its latencies if it is complete."""
        self._requests.labels(policy, engine, str(outcome.status), ended).inc()
        if outcome.ttft_s is not None:
            self._latencies["ttft"].labels(policy).observe(outcome.ttft_s)
        if ended != "complete" or outcome.total_s is None:
            return
        self._latencies["e2e"].labels(policy).observe(outcome.total_s)
        if outcome.ttft_s is not None and outcome.output_tokens and outcome.output_tokens > 1:
            tpot = (outcome.total_s - outcome.ttft_s) / (outcome.output_tokens - 1)
            self._latencies["tpot"].labels(policy).observe(tpot)


class _Engines:
    """Collects the state of engines."""

    def __init__(self, table: EngineTable, health: Health, endpoints: Sequence[str], now: Callable[[], float]) -> None:
        self._table, self._health, self._endpoints, self._now = table, health, endpoints, now

    def collect(self) -> Iterable[Metric]:
        """Return a gauge per property, labelled by engine."""
        up = GaugeMetricFamily("servegym_engine_available", "1 if it may be sent to", labels=["engine"])
        age = GaugeMetricFamily("servegym_engine_telemetry_age_seconds", "Since its last reading", labels=["engine"])
        ages = self._table.telemetry_age_s(self._now())
        engines = [(engine, endpoint) for engine, endpoint in enumerate(self._endpoints) if endpoint]
        for engine, endpoint in engines:
            up.add_metric([endpoint], float(self._health.available(engine)))
            age.add_metric([endpoint], float(ages[engine]))
        yield up
        yield age
        for name, (column, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"servegym_engine_{name}", text, labels=["engine"])
            for engine, endpoint in engines:
                gauge.add_metric([endpoint], float(self._table.data[engine, column]))
            yield gauge
