"""The half of a live episode that sends requests, in a thread of its own, and asks the other half for decisions."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np
import numpy.typing as npt

from servegym.baselines.interface import (
    E_AVAILABLE,
    E_KV_USAGE,
    E_RUNNING,
    E_TTFT_EWMA_S,
    EnginePolicy,
    FloatArray,
    QueueView,
    pick,
)
from servegym.engine_bridge.router.guard import GuardedPolicy
from servegym.engine_bridge.router.health import Health
from servegym.engine_bridge.router.table import EngineTable
from servegym.engine_bridge.router.telemetry import watch
from servegym.envs.live.dispatch import block_hashes, request_view
from servegym.envs.live.options import LiveOptions, Target
from servegym.envs.live.placement import LivePlacement
from servegym.envs.live.records import LiveMemory
from servegym.envs.live.replay import Replayer
from servegym.envs.workloads.table import RequestTable
from servegym.errors import EngineError

_BUDGET_S = 1.0


@dataclass(frozen=True, slots=True)
class Question:
    """What the environment is asked: an engine for a request, or a request for an engine.

    Attributes:
        at_s: time of the decision.
        request_row: ``R_*`` entries, of a request that needs an engine.
        engine_view: ``E_*`` columns, likewise.
        engine: that has a free slot; -1 where a request needs an engine.
        queue: that waits for the slot.
        members: which requests those are.
    """

    at_s: float
    request_row: FloatArray | None = None
    engine_view: FloatArray | None = None
    engine: int = -1
    queue: QueueView | None = None
    members: npt.NDArray[np.int32] | None = None


class Sender:
    """Sends the requests of an episode; a :class:`~servegym.envs.live.dispatch.Dispatcher` of the replayer.

    Args:
        table: the requests.
        target: the engines.
        options: how they are sent to.
        memory: where it writes what it learns.
        engine_policy: chooses engines; None: asks.
        hold: keep requests back that find no free slot, and ask which one goes next.
        seed: of randomised policies.
        placement: moves experts meanwhile.

    Attributes:
        asked: the questions; an exception if sending has failed, None at the end.
        arrived: requests that were due.
        ended: requests that have ended.
        held: requests that are kept back, by engine.
    """

    def __init__(
        self,
        table: RequestTable,
        target: Target,
        options: LiveOptions,
        memory: LiveMemory,
        engine_policy: EnginePolicy | None,
        hold: bool,
        seed: int,
        placement: LivePlacement | None = None,
    ) -> None:
        self.asked: queue.Queue[Question | BaseException | None] = queue.Queue()
        self.arrived = self.ended = 0
        self.held: list[dict[int, asyncio.Event]] = [{} for _ in target.urls]
        self._table, self._options, self._memory, self._seed = table, options, memory, seed
        self._policy = None if engine_policy is None else GuardedPolicy(engine_policy, _BUDGET_S)
        self._engines = EngineTable([options.limits] * len(target.urls))
        self._hold = hold
        self._placement = placement
        self._sent = [0] * len(target.urls)
        self._waiting: dict[int, int] = {}
        self._answer: asyncio.Future[int] | None = None
        self._loop = asyncio.new_event_loop()
        self._asking = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._replayer = Replayer(table, target.urls, target.model, options, self)
        self._start_s = time.perf_counter()
        self._thread = threading.Thread(target=self._serve, name="live episode", daemon=True)
        self._thread.start()

    # For the environment's thread.
    @property
    def now_s(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._start_s

    def answer(self, value: int) -> None:
        """Answer the question that was taken last."""
        future = self._answer
        assert future is not None
        self._loop.call_soon_threadsafe(future.set_result, value)

    def stop(self) -> None:
        """Cut what runs; the engines notice that their client is gone."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._cancel)
            self._thread.join(timeout=10.0)

    def look(self) -> None:
        """Write the engines' state into the records."""
        records, columns = self._memory.engines, self._engines.data
        records["alive"] = columns[:, E_AVAILABLE]
        records["running"] = records["decoding"] = columns[:, E_RUNNING]
        records["ttft_ewma_s"] = columns[:, E_TTFT_EWMA_S]
        records["free_blocks"] = np.round((1.0 - columns[:, E_KV_USAGE]) * (records["num_blocks"] - 1))
        for engine in range(len(records)):
            records["waiting"][engine] = len(self.without_token(engine))

    def without_token(self, engine: int) -> list[int]:
        """Return the requests of an engine that have no token yet, in the order of their arrival."""
        if self._hold:
            return list(self.held[engine])
        return [r for r, where in list(self._waiting.items()) if where == engine]

    # For the replayer, in the sending thread.
    async def dispatch(self, r: int, due_s: float, now_s: float, tokens: npt.NDArray[np.int64]) -> int:
        """Return the engine of a request that is due, once it may go."""
        memory = self._memory
        memory.requests["arrival_s"][r] = due_s
        self.arrived += 1
        async with self._asking:
            # Others may have been decided about while this one waited for its turn.
            now = self.now_s
            request = request_view(self._table, r, len(tokens), due_s, now, self._seed, self._engines.last_engine)
            blocks = block_hashes(tokens, self._engines.prefixes.config.block_tokens)
            view = self._engines.view(request, blocks)
            if not (view.available > 0).any():
                raise EngineError("no engine answers")
            if self._policy is None:
                engine = await self._ask(Question(now, request.row(), view.data))
            else:
                engine = pick(self._policy.score(request, view).scores, view.available)
                self._policy.tell("on_dispatch", request, engine)
            self._engines.dispatched(request, engine, blocks)
        memory.requests["engine"][r] = engine
        if memory.requests["priority"][r] != self._table.priority[r]:
            self._replayer.give_priority(r, int(memory.requests["priority"][r]))
        self._waiting[r] = engine
        if self._hold:
            self.held[engine][r] = asyncio.Event()
            go = self.held[engine][r]
            self._fill(engine)
            await go.wait()
        return engine

    def first_token(self, r: int, engine: int, now_s: float) -> None:
        """Note a first token."""
        self._memory.requests["first_s"][r] = now_s
        self._waiting.pop(r, None)
        self._engines.first_token(r, now_s)
        if self._policy is not None:
            self._policy.tell("on_first_token", r, engine, now_s)

    def finished(self, r: int, engine: int, now_s: float, output_tokens: int, hit_tokens: int) -> None:
        """Note a request's end."""
        requests = self._memory.requests
        requests["finish_s"][r], requests["output"][r], requests["hit_tokens"][r] = now_s, output_tokens, hit_tokens
        self._engines.finished(r, now_s, output_tokens)
        if self._policy is not None:
            self._policy.tell("on_finish", r, engine, now_s, output_tokens)
        self._gone(r, engine)

    def lost(self, r: int) -> None:
        """Note a request's failure."""
        requests = self._memory.requests
        engine = int(requests["engine"][r])
        requests["engine"][r] = -1
        self._engines.lost(r)
        self._gone(r, engine)

    async def watch(self, session: aiohttp.ClientSession, urls: Sequence[str], start_s: float) -> None:
        """Read the engines' telemetry, and place their experts."""
        self._start_s = start_s
        health, period = Health(self._engines), self._options.telemetry_period_s
        telemetry = watch(session, urls, self._engines, health, period_s=period, clock=lambda: self.now_s)
        if self._placement is None:
            await telemetry
        else:
            await asyncio.gather(telemetry, self._placement.run())

    def _gone(self, r: int, engine: int) -> None:
        self.ended += 1
        self._waiting.pop(r, None)
        if self._hold and engine >= 0:
            self._sent[engine] -= 1
            self._fill(engine)

    def _fill(self, engine: int) -> None:
        task = self._loop.create_task(self._admit(engine))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _admit(self, engine: int) -> None:
        """Send held requests while slots last; without a choice nobody is asked."""
        slots = int(self._memory.engines["max_num_seqs"][engine])
        async with self._asking:
            while self.held[engine] and self._sent[engine] < slots:
                members = list(self.held[engine])
                chosen = members[0]
                if len(members) > 1:
                    now = self.now_s
                    self.look()
                    waiting = self._memory.queue(engine, members, now, self._table)
                    numbers = np.array(members, dtype=np.int32)
                    chosen = await self._ask(Question(now, engine=engine, queue=waiting, members=numbers))
                self._sent[engine] += 1
                self.held[engine].pop(chosen).set()

    async def _ask(self, question: Question) -> int:
        self._answer = self._loop.create_future()
        self.asked.put(question)
        return await self._answer

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._replayer.run())
            self.asked.put(None)
        except BaseException as error:
            self.asked.put(error)
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def _cancel(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
