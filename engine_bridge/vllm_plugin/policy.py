"""The request policy that orders an engine's queue: reloaded when its file changes, harmless when it fails."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from servegym.baselines.interface import FloatArray, QueueView, RequestPolicy
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create_live, names
from servegym.engine_bridge.vllm_plugin.protocol import read_policy, write_state
from servegym.errors import InputError

_logger = logging.getLogger("vllm.servegym")
_LOOK_S = 0.1


class LivePolicy:
    """Scores waiting queues by the policy that a file names.

    An exception, a wrong shape or a number that is not finite never reaches the engine: the queue keeps its order of
    arrival at that step, and the failure is counted.

    Args:
        path: the policy file.
        state: where to report, None for nowhere.

    Attributes:
        failures: decisions that failed.
        version: of the policy in force, 0 for none.
    """

    def __init__(self, path: Path, state: Path | None) -> None:
        self.failures = 0
        self.version = 0
        self._path = path
        self._state = state
        self._policy: RequestPolicy | None = None
        self._spec: PolicySpec | None = None
        self._reason = ""
        self._modified = 0
        self._look_at = 0.0
        self._reported_failures = 0
        self._loading: threading.Thread | None = None
        self._loaded: _Loaded | None = None
        self.refresh()

    def refresh(self) -> None:
        """Take up a new policy file, at most ten times a second; a bad one leaves the old policy in force.

        What comes from a file of its own, a bundle or somebody's code, is read beside the engine's steps.
        """
        if self._loaded is not None:
            self._take_up(self._loaded)
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        try:
            modified = os.stat(self._path).st_mtime_ns
        except OSError:
            modified = 0
        if modified != self._modified or (modified == 0 and not self._reason):
            if self._loading is None or not self._loading.is_alive():
                self._modified = modified
                self._begin_loading()
        elif self.failures != self._reported_failures:
            self._report()

    @property
    def served_weights(self) -> tuple[float, float] | None:
        """Weights of prompt and output tokens in the counters that the policy reads; None if it reads none."""
        weights: tuple[float, float] | None = getattr(self._policy, "served_weights", None)
        return weights

    @property
    def budget_share(self) -> float | None:
        """Share of the engine's token budget that the policy lets a step use; None: all of it."""
        try:
            share: float | None = getattr(self._policy, "budget_share", None)
            if share is None or 0.0 < share <= 1.0:
                return share
            self.failed(f"budget_share is {share}; allowed: 0 to 1")
        except Exception as error:
            self.failed(f"{type(error).__name__}: {error}")
        return None

    def scores(self, queue: QueueView) -> FloatArray | None:
        """Return the scores of a queue, shape (waiting,), lowest first; None for the order of arrival."""
        if self._policy is None:
            return None
        try:
            scores = np.asarray(self._policy.score(queue), dtype=np.float64)
        except Exception as error:
            self.failed(f"{type(error).__name__}: {error}")
            return None
        if scores.shape != (len(queue),) or np.isnan(scores).any():
            self.failed(f"scores of shape {scores.shape}, {int(np.isnan(scores).sum())} not a number")
            return None
        return scores

    def stand_down(self, reason: str) -> None:
        """Report that vLLM's own order is in force, and why."""
        self._policy = None
        self._reason = reason
        _logger.warning("servegym: vLLM's own order: %s", reason)
        self._report()

    def _begin_loading(self) -> None:
        try:
            version, spec = read_policy(self._path)
        except InputError as error:
            self._take_up(_Loaded(0, None, None, str(error)))
            return
        if self._policy is None or spec.name in names("request"):
            self._take_up(_load(version, spec))
            return
        self._loading = threading.Thread(target=self._load_beside, args=(version, spec), daemon=True)
        self._loading.start()

    def _load_beside(self, version: int, spec: PolicySpec) -> None:
        self._loaded = _load(version, spec)

    def _take_up(self, loaded: _Loaded) -> None:
        self._loaded = None
        self._reason = loaded.reason
        if loaded.policy is None:
            _logger.warning("servegym: policy not taken up: %s", loaded.reason)
        else:
            self._policy, self._spec, self.version = loaded.policy, loaded.spec, loaded.version
            _logger.info("servegym: waiting queue ordered by %s", loaded.spec)
        self._report()

    def failed(self, reason: str) -> None:
        """Count a failure, after which the queue keeps its order of arrival for a step."""
        if self.failures == 0:
            _logger.warning("servegym: order of arrival for a step: %s", reason)
        self.failures += 1
        self._reason = reason

    def _report(self) -> None:
        self._reported_failures = self.failures
        if self._state is None:
            return
        content: dict[str, Any] = {
            "tier": "stock" if self._policy is None else "policy",
            "policy": str(self._spec) if self._spec is not None else "",
            "version": self.version,
            "failures": self.failures,
            "reason": self._reason,
            "pid": os.getpid(),
        }
        try:
            write_state(self._state, content)
        except OSError as error:
            _logger.warning("servegym: state not written: %s", error)
            self._state = None


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A policy that was read, or why it was not."""

    version: int
    spec: PolicySpec | None
    policy: RequestPolicy | None
    reason: str = ""


def _load(version: int, spec: PolicySpec) -> _Loaded:
    try:
        if spec.name not in names("request"):
            import servegym.engine_bridge.bundle  # noqa: F401 - makes bundles available by path
        return _Loaded(version, spec, create_live("request", spec))
    except Exception as error:
        return _Loaded(version, spec, None, str(error))
