"""Sending the requests of a workload or a trace to live engines at their own times.

Open loop: a request is sent when it is due, however slow the engines are; a follow-up turn is due its think time after
the turn before has ended. What the client's own scheduling adds (the *slip*) is measured and part of the result, as
TTFT counts from the time at which a request was due.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Self

import aiohttp
import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from servegym.envs.live.client import Completion, complete
from servegym.envs.live.dispatch import Dispatcher, InTurn
from servegym.envs.live.options import LiveOptions
from servegym.envs.live.tokens import prompt_tokens
from servegym.envs.requests import WorkloadChoice
from servegym.envs.simulation import Objectives
from servegym.envs.simulator.metrics import RunOutcome, summary
from servegym.envs.workloads.table import RequestTable
from servegym.errors import EngineError


class ReplayConfig(LiveOptions):
    """Input of ``servegym replay``."""

    workload: WorkloadChoice = Field(description="with rate_rps, or a trace; live engines have no known capacity")
    slo: Objectives = Field(default=Objectives(), description="what goodput counts as met")
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of the first requests that is not counted"
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="of the requests and their prompts")

    @model_validator(mode="after")
    def _has_a_rate(self) -> Self:
        if self.workload.load is not None:
            raise ValueError("workload.rate_rps in place of workload.load: the capacity of live engines is not known")
        return self


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """A finished replay.

    Attributes:
        outcome: of each request.
        slip_s: time from when a request was due to when it was sent, shape (requests,).
        errors: what failed, by request.
        wall_s: duration.
        start_s: ``time.perf_counter()`` at which its clock was 0.
    """

    outcome: RunOutcome
    slip_s: npt.NDArray[np.float64]
    errors: dict[int, str]
    wall_s: float
    start_s: float

    def metrics(self, slo: Objectives, warmup_share: float = 0.0) -> dict[str, Any]:
        """Summarise; the same keys as a simulation has, as far as a client can see them."""
        found = self.outcome.metrics(warmup_share=warmup_share, ttft_slo_s=slo.ttft_s, tpot_slo_s=slo.tpot_s)
        served = self.outcome.engine
        count = int(served.max()) + 1 if len(served) else 0
        found |= {
            "failed": len(self.errors),
            "slip_s": summary(self.slip_s) | {"max": float(np.nanmax(self.slip_s))},
            "per_engine": [{"requests": int((served == e).sum())} for e in range(count)],
            "wall_s": self.wall_s,
        }
        del found["preemptions"]  # nobody tells the client
        return found


def replay(
    table: RequestTable,
    urls: tuple[str, ...],
    model: str,
    config: LiveOptions,
    *,
    dispatcher: Dispatcher | None = None,
    progress: Callable[[float], None] | None = None,
) -> ReplayResult:
    """Send all requests and wait for the last answer.

    Args:
        table: the requests.
        urls: servers.
        model: name in requests.
        config: token values, timeouts.
        dispatcher: chooses the server of each request when it is due; default: in turn.
        progress: called now and then with the share of requests that have ended.

    Raises:
        EngineError: no request at all was answered.
    """
    return asyncio.run(Replayer(table, urls, model, config, dispatcher or InTurn(len(urls)), progress).run())


class Replayer:
    """One replay; see :func:`replay`."""

    def __init__(
        self,
        table: RequestTable,
        urls: tuple[str, ...],
        model: str,
        config: LiveOptions,
        dispatcher: Dispatcher,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self._table, self._urls, self._model, self._config = table, urls, model, config
        self._dispatcher = dispatcher
        self._progress = progress
        count = len(table)
        self._ended = 0
        self._due_s = np.full(count, np.nan)
        self._engine = np.full(count, -1, dtype=np.int32)
        self._results: list[Completion | None] = [None] * count
        self._child = np.full(count, -1, dtype=np.int64)
        followers = np.flatnonzero(table.parent >= 0)
        self._child[table.parent[followers]] = followers
        # Other tokens than in any replay before: the engines may still have those cached.
        self._salt = time.time_ns()
        # Written before the clock starts, so that making them delays nobody.
        self._tokens = [prompt_tokens(table, r, config.vocabulary, self._salt) for r in range(count)]
        self._bodies = [self._body(r) for r in range(count)]

    async def run(self) -> ReplayResult:
        """Send everything and wait for the last answer."""
        limits = aiohttp.TCPConnector(limit=0, force_close=False)
        timeout = aiohttp.ClientTimeout(total=self._config.timeout_s, connect=30)
        roots = np.flatnonzero(self._table.parent < 0)
        async with aiohttp.ClientSession(connector=limits, timeout=timeout, read_bufsize=2**20) as session:
            self._session = session
            self._start_s = time.perf_counter()
            try:
                await self._send_all(session, roots[np.argsort(self._table.arrival_s[roots], kind="stable")])
            except BaseExceptionGroup as group:
                error: BaseException = group
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                raise error from None
        return self._result()

    async def _send_all(self, session: aiohttp.ClientSession, roots: npt.NDArray[np.int64]) -> None:
        """Send the requests that begin conversations at their times, and wait for the ends of all."""
        async with asyncio.TaskGroup() as beside:
            watching = beside.create_task(self._dispatcher.watch(session, self._urls, self._start_s))
            async with asyncio.TaskGroup() as tasks:
                for r in roots:
                    due = float(self._table.arrival_s[r])
                    await self._sleep_until(due)
                    tasks.create_task(self._conversation(int(r), due))
            watching.cancel()

    def give_priority(self, r: int, priority: int) -> None:
        """Send a request with another priority than the workload's; before it is sent."""
        self._bodies[r][0]["priority"] = priority

    async def _conversation(self, r: int, due: float) -> None:
        """Send a request and, one after the other, the turns that follow it."""
        while True:
            self._due_s[r] = due
            result = await self._one(r)
            self._results[r] = result
            self._ended += 1
            if self._progress is not None:
                self._progress(self._ended / len(self._table))
            child = int(self._child[r])
            if child < 0 or result.error:
                return
            r, due = child, result.last_s - self._start_s + float(self._table.think_s[child])
            await self._sleep_until(due)

    async def _sleep_until(self, due: float) -> None:
        wait = due - (time.perf_counter() - self._start_s)
        await asyncio.sleep(max(wait, 0.0))

    async def _one(self, r: int) -> Completion:
        start_s, heard = self._start_s, self._dispatcher
        engine = await heard.dispatch(r, self._due_s[r], time.perf_counter() - start_s, self._tokens[r])
        self._engine[r] = engine
        body, headers = self._bodies[r]
        result = await complete(
            self._session,
            self._urls[engine],
            body,
            headers,
            lambda now_s: heard.first_token(r, engine, now_s - start_s),
        )
        if result.error:
            heard.lost(r)
        else:
            heard.finished(r, engine, result.last_s - start_s, result.output_tokens, result.hit_tokens)
        return result

    def _body(self, r: int) -> tuple[dict[str, Any], dict[str, str]]:
        table = self._table
        output = int(table.output_tokens[r])
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": self._tokens[r].tolist(),
            "max_tokens": output,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        extra: dict[str, float] = {}
        for name, value in (("user", table.user[r]), ("session", table.session[r])):
            if value >= 0:
                extra[name] = int(value)
        if extra.get("session") is not None:
            extra["turn"] = int(table.turn[r])
        if np.isfinite(table.deadline_s[r]):
            extra["deadline_s"] = float(table.deadline_s[r])
        if np.isfinite(table.predicted_tokens[r]):
            extra["predicted_tokens"] = float(table.predicted_tokens[r])
        if extra:
            body["vllm_xargs"] = extra
        if table.user[r] >= 0:
            body["user"] = f"user-{table.user[r]}"
        if table.priority[r]:
            body["priority"] = int(table.priority[r])
        headers = {"X-Request-Id": f"servegym-{self._salt}-{r}"}
        if table.session[r] >= 0:
            headers["X-Session-Id"] = f"session-{table.session[r]}"
        return body, headers

    def _result(self) -> ReplayResult:
        wall = time.perf_counter() - self._start_s
        table = self._table
        results = [Completion(np.nan, error="its turn never came") if one is None else one for one in self._results]
        errors = {r: one.error for r, one in enumerate(results) if one.error}
        if len(errors) == len(results):
            raise EngineError(f"no request was answered; the first: {errors[0]}")
        good = np.array([not one.error for one in results])
        sent, first, last = (
            np.array([getattr(one, name) for one in results]) - self._start_s
            for name in ("sent_s", "first_s", "last_s")
        )
        output = np.array([one.output_tokens for one in results])
        finish = np.where(good, last, np.nan)
        gaps = np.where(output > 1, output - 1, np.nan)
        outcome = RunOutcome(
            arrival_s=np.where(np.isnan(self._due_s), table.arrival_s, self._due_s),
            ttft_s=np.where(good, first - self._due_s, np.nan),
            tpot_s=np.where(good, (last - first) / gaps, np.nan),
            e2e_s=finish - self._due_s,
            finish_s=finish,
            prompt_tokens=table.prompt_tokens,
            output_tokens=output.astype(np.int32),
            deadline_s=table.deadline_s,
            engine=np.where(good, self._engine, -1).astype(np.int32),
            preemptions=np.zeros(len(table), dtype=np.int32),
            hit_tokens=np.array([one.hit_tokens for one in results], dtype=np.int32),
        )
        return ReplayResult(outcome, sent - self._due_s, errors, wall, self._start_s)
