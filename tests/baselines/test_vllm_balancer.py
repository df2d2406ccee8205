"""vLLM's three balancers, against the stateful arithmetic of vLLM's client and against the real code."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.baselines import registry
from servegym.baselines.interface import pick

Event = list[Any]
Counts = list[list[float]]


class Client:
    """What vLLM's client keeps: counts that it corrects after each choice, and where its scan begins."""

    def __init__(self, engines: int) -> None:
        self.counts: Counts = [[0, 0, 0.0] for _ in range(engines)]
        self.inflight = [0] * engines
        self.start = 0

    def scan(self, load: Callable[[int], Any]) -> int:
        order = [(self.start + k) % len(self.counts) for k in range(len(self.counts))]
        return min(order, key=load)  # the first of equal ones

    def vllm_0_9(self) -> int:
        engine = self.scan(lambda e: self.counts[e][:2])
        self.counts[engine][0 if self.counts[engine][0] else 1] += 1
        return engine

    def vllm_2025_11(self) -> int:
        engine = self.scan(lambda e: 4 * self.counts[e][0] + self.counts[e][1])
        self.counts[engine][0] += 1
        return engine

    def vllm(self) -> int:
        def load(e: int) -> float:
            waiting, running, kv = self.counts[e]
            return max(self.inflight[e], waiting + running) + waiting * 6.0 * max(0.0, kv - 0.5)

        engine = self.scan(load)
        self.counts[engine][0] += 1
        self.start = (self.start + 1) % len(self.counts)
        return engine


def draw_events(seed: int, engines: int, length: int = 400) -> list[Event]:
    """Requests, completions and snapshots in random order; a snapshot need not agree with the requests in flight."""
    rng = np.random.default_rng(seed)
    events: list[Event] = []
    running: list[int] = []
    requests = 0
    for _ in range(length):
        kind = rng.choice(["request", "finish", "snapshot"], p=[0.6, 0.3, 0.1])
        if kind == "request":
            running.append(requests)
            requests += 1
            events.append(["request"])
        elif kind == "snapshot":
            kv = rng.choice([0.2, 0.5, 0.55, 0.8, 1.0], engines)
            counts = [[int(rng.integers(4)), int(rng.integers(6)), float(share)] for share in kv]
            events.append(["snapshot", counts])
        elif running:
            events.append(["finish", running.pop(rng.integers(len(running)))])
    return events


def reference_choices(rule: str, engines: int, events: list[Event]) -> list[int]:
    client, chosen = Client(engines), []
    for kind, *argument in events:
        if kind == "request":
            chosen.append(getattr(client, rule)())
            client.inflight[chosen[-1]] += 1
        elif kind == "finish":
            client.inflight[chosen[argument[0]]] -= 1
        else:
            client.counts = [list(counts) for counts in argument[0]]
    return chosen


def policy_choices(rule: str, engines: int, events: list[Event], make_request, make_engines) -> list[int]:
    """The same run through the policy, which sees the snapshot and the router's own counters."""
    policy = registry.create("engine", rule)
    snapshot: Counts = [[0, 0, 0.0] for _ in range(engines)]
    inflight, dispatched, since = (np.zeros(engines) for _ in range(3))
    chosen: list[int] = []
    for kind, *argument in events:
        if kind == "request":
            waiting, running, kv = np.array(snapshot).T
            views = make_engines(
                engines,
                waiting=waiting,
                running=running,
                kv_usage=kv,
                inflight=inflight,
                dispatched=dispatched,
                dispatched_since=since,
            )
            chosen.append(pick(policy.score(make_request(), views), views.available))
            for counter in (inflight, dispatched, since):
                counter[chosen[-1]] += 1
        elif kind == "finish":
            inflight[chosen[argument[0]]] -= 1
        else:
            snapshot, since = argument[0], np.zeros(engines)
    return chosen


@pytest.mark.parametrize("engines", [2, 3, 8])
@pytest.mark.parametrize("rule", ["vllm", "vllm_2025_11", "vllm_0_9"])
def test_choices_are_those_of_the_stateful_rule(rule, engines, make_request, make_engines) -> None:
    for seed in range(5):
        events = draw_events(seed, engines)
        expected = reference_choices(rule, engines, events)
        assert policy_choices(rule, engines, events, make_request, make_engines) == expected
        assert len(set(expected)) == engines


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        # max(2, 1 + 3) + 1 * 6 * 0.3;  in flight 9 exceeds the snapshot;  2 sent since: max(1, 2 + 0) + 2 * 6 * 0.5
        (
            {
                "waiting": [1, 0, 0],
                "running": [3, 5, 0],
                "kv_usage": [0.8, 1.0, 1.0],
                "inflight": [2, 9, 1],
                "dispatched_since": [0, 0, 2],
            },
            [5.8, 9.0, 8.0],
        ),
        # No penalty up to half a cache, three per waiting request at a full one.
        ({"waiting": [4, 4, 4], "running": [1, 1, 1], "kv_usage": [0.5, 0.75, 1.0]}, [5.0, 11.0, 17.0]),
    ],
)
def test_loads_of_vllm_worked_by_hand(columns, expected, make_request, make_engines) -> None:
    scores = registry.create("engine", "vllm").score(make_request(), make_engines(3, **columns))
    assert scores == pytest.approx(expected, abs=1e-8)


def test_older_rules_worked_by_hand(make_request, make_engines) -> None:
    engines = make_engines(3, waiting=[1, 0, 2], running=[0, 6, 0], dispatched_since=[1, 1, 0])
    assert registry.create("engine", "vllm_2025_11").score(make_request(), engines).tolist() == [8, 10, 8]
    assert registry.create("engine", "vllm_0_9").score(make_request(), engines).tolist() == [2e6, 7, 2e6]


def test_idle_engines_are_scanned_from_one_later_each_time(make_request, make_engines) -> None:
    policy = registry.create("engine", "vllm")
    for sent, expected in [([0, 0, 0], 0), ([1, 0, 0], 1), ([3, 2, 0], 2), ([2, 2, 2], 0)]:
        assert policy.score(make_request(), make_engines(3, dispatched=sent)).argmin() == expected


@pytest.mark.vllm
def test_choices_are_those_of_the_real_vllm(make_request, make_engines) -> None:
    python = os.environ.get("SERVEGYM_VLLM_PYTHON")
    if not python:
        pytest.skip("SERVEGYM_VLLM_PYTHON does not name the interpreter of an environment with vLLM")
    events = draw_events(7, 4, length=2000)
    run = subprocess.run(
        [python, str(Path(__file__).with_name("vllm_balancer.py"))],
        input=json.dumps({"engines": 4, "events": events}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    real = json.loads(run.stdout.splitlines()[-1])
    assert policy_choices("vllm", 4, events, make_request, make_engines) == real
