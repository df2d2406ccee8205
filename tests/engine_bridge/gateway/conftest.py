"""Fake engines before which a real Envoy stands."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gateway_support import FakeEngine


@pytest.fixture
def fakes() -> Iterator[Callable[..., list[FakeEngine]]]:
    """Starts fake engines; one for each mapping of options of fake_vllm.py."""
    started: list[FakeEngine] = []

    def start(*options: dict[str, Any]) -> list[FakeEngine]:
        engines = [FakeEngine(one) for one in options]
        started.extend(engines)
        return engines

    yield start
    for engine in started:
        if engine.process.poll() is None:
            engine.signal(signal.SIGCONT)
            engine.signal(signal.SIGKILL)
