"""Why a policy decided as it did: what it saw, its scores and its choice, at sampled decisions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from servegym.baselines.features import ENGINE_FEATURES, Feature, dispatch_features
from servegym.baselines.heuristic import compiled_form
from servegym.baselines.interface import (
    EnginePolicy,
    EngineViews,
    FloatArray,
    QueueView,
    RequestPolicy,
    RequestView,
    pick,
)
from servegym.baselines.queue_features import QUEUE_CONTEXT_FEATURES, QUEUE_FEATURES, fill_queue_features
from servegym.compilation import compiled
from servegym.envs.simulator.timeline import sample_every

if TYPE_CHECKING:
    from servegym.envs.simulator.cluster import SimulatedCluster

_ENGINE_COLUMNS = (
    ("waiting", "waiting requests, telemetry"),
    ("running", "running requests, telemetry"),
    ("kv_usage", "share of KV blocks in use, telemetry"),
    ("telemetry_age_s", "age of the telemetry, s"),
    ("inflight", "requests in flight"),
    ("prefill_requests", "of these without first token"),
    ("prefill_tokens", "their prompt tokens"),
    ("hit_tokens", "prompt tokens of this request believed cached"),
    ("session_home", "served this session last"),
    ("dispatched_since", "sent there since the telemetry"),
    ("ttft_ewma_s", "moving average of TTFT, s"),
    ("itl_ewma_s", "moving average of ITL, s"),
)
_QUEUE_COLUMNS = (
    ("wait_s", "wait so far, s"),
    ("prompt_tokens", "prompt tokens"),
    ("computed_tokens", "of these computed"),
    ("predicted_tokens", "predicted output tokens"),
    ("priority", "priority, smaller first"),
    ("deadline_s", "TTFT objective, s"),
    ("turn", "turn of the session"),
    ("preemptions", "times preempted"),
)
_SHOWN_REQUESTS = 12


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision.

    Attributes:
        time_s: when, on the run's clock.
        subject: index of the request that an engine is chosen for; -1 where an order is chosen.
        facts: what is known of it, in words.
        candidates: names, in order.
        scores: of the candidates, shape (candidates,); the lowest wins.
        chosen: position of the winner.
        seen: rows of numbers that the view holds: name, values of shape (candidates,).
        features: what a learned policy sees of the same.
    """

    time_s: float
    subject: int
    facts: str
    candidates: tuple[str, ...]
    scores: FloatArray
    chosen: int
    seen: tuple[tuple[str, FloatArray], ...]
    features: tuple[tuple[str, FloatArray], ...]


class Interpreted:
    """A policy without its compiled form: it decides the same, in Python, where it can be listened to.

    Args:
        policy: whose decisions.
    """

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        if name in ("compiled", "compiled_params", "native", "static") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._policy, name)


class ExplainedEnginePolicy(Interpreted):
    """An engine policy that decides as another one, and keeps its decisions on some requests.

    Scores come from the compiled form where there is one: those of ``score`` agree with it up to rounding, which would
    break ties differently, and lead to another run.

    Args:
        policy: whose decisions.
        requests: indices of the requests.
    """

    def __init__(self, policy: EnginePolicy, requests: Iterable[int]) -> None:
        super().__init__(policy)
        form = compiled_form(policy)
        self._compiled = None if form is None else (compiled(form[0]), form[1])
        self._requests = frozenset(requests)
        self.decisions: list[Decision] = []

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the policy's scores, shape (engines,)."""
        if self._compiled is None:
            scores = np.array(self._policy.score(request, engines), dtype=np.float64)
        else:
            function, params = self._compiled
            scores = np.empty(len(engines))
            function(request.row(), np.asfortranarray(engines.data), params, scores)
        if request.index in self._requests:
            self.decisions.append(_engine_decision(request, engines, scores))
        return scores


def readable_queue(policy: RequestPolicy) -> Any:
    """Return the same policy, or an interpreted one, so that the waiting queue can be read in order of arrival.

    The kernel keeps the queue of a score that never changes as a heap, which cannot.
    """
    heap = getattr(policy, "native", None) == "priority" or getattr(policy, "static", False)
    return Interpreted(policy) if heap and getattr(policy, "native", None) != "fcfs" else policy


def _engine_decision(request: RequestView, engines: EngineViews, scores: FloatArray) -> Decision:
    encoded, _ = dispatch_features(request, engines)
    facts = f"a prompt of {request.prompt_tokens:,} tokens"
    facts += f", turn {request.turn + 1} of session {request.session}" if request.session >= 0 else ""
    facts += f", first token due in {request.deadline_s:g} s" if np.isfinite(request.deadline_s) else ""
    return Decision(
        time_s=request.now_s,
        subject=request.index,
        facts=facts,
        candidates=tuple(
            f"engine {number}{'' if there else ' (takes none)'}" for number, there in enumerate(engines.available > 0)
        ),
        scores=scores,
        chosen=pick(scores, engines.available),
        seen=tuple((text, np.array(getattr(engines, name))) for name, text in _ENGINE_COLUMNS),
        features=_named(ENGINE_FEATURES, encoded),
    )


class QueueWatch:
    """Keeps how a request policy orders the longest waiting queue of a cluster, in intervals while it runs.

    Args:
        cluster: the cluster, not yet run, whose queues are readable.
        policy: its request policy.
        every_s: length of an interval, seconds.
    """

    def __init__(self, cluster: SimulatedCluster, policy: RequestPolicy, every_s: float) -> None:
        self._cluster = cluster
        self._policy = policy
        self.decisions: list[Decision] = []
        sample_every(cluster, every_s, self._sample)

    def _sample(self) -> None:
        engine = int(self._cluster.memory.engines["waiting"].argmax())
        queue, members = self._cluster.waiting_requests(engine)
        if len(queue) > 1:
            self.decisions.append(_queue_decision(engine, queue, members, self._policy.score(queue)))


def _queue_decision(engine: int, queue: QueueView, members: npt.NDArray[np.int32], scores: FloatArray) -> Decision:
    first = np.argsort(scores, kind="stable")[:_SHOWN_REQUESTS]
    rows = np.ascontiguousarray(queue.data[first])
    features = np.empty((len(rows), len(QUEUE_FEATURES)), dtype=np.float32)
    fill_queue_features(rows, queue.context(), features, np.empty(len(QUEUE_CONTEXT_FEATURES), dtype=np.float32))
    shown = f"; the first {len(first)} are shown" if len(first) < len(queue) else ""
    return Decision(
        time_s=queue.now_s,
        subject=-1,
        facts=f"engine {engine}: {len(queue)} wait, {queue.running} of {queue.max_num_seqs} slots are taken{shown}",
        candidates=tuple(f"request {member}" for member in members[first].tolist()),
        scores=scores[first],
        chosen=0,
        seen=tuple((text, np.array(getattr(queue, name)[first])) for name, text in _QUEUE_COLUMNS),
        features=_named(QUEUE_FEATURES, features),
    )


def _named(features: tuple[Feature, ...], values: npt.NDArray[np.float32]) -> tuple[tuple[str, FloatArray], ...]:
    """Rows of encoded features: name and meaning, values."""
    return tuple(
        (f"{one.name}: {one.meaning}", values[:, column].astype(np.float64)) for column, one in enumerate(features)
    )
