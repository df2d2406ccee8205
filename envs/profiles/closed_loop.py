"""A closed loop on one engine, for comparison with published benchmarks: TTFT and TPOT at a fixed concurrency.

A benchmark client keeps ``concurrency`` requests in flight and sends the next one when one ends. The engine schedules
as vLLM does: running sequences first, one token each, then prefill chunks in order of arrival until the token budget
is spent. No prefix is shared. Stretches of steps without prefill are summed in closed form, since a step's cost is
linear in its context.

With asynchronous scheduling vLLM decides on a step when the step before it starts. A request that follows one that has
just ended has then missed the next step and mostly the one after it, and waits for both: in a closed loop that is a
large part of a TTFT.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from servegym.envs.profiles.profile import StepCost


@dataclass(frozen=True, slots=True)
class LoopTimes:
    """Seconds, by request in the order of sending; shape (requests,)."""

    ttft_s: npt.NDArray[np.float64]
    tpot_s: npt.NDArray[np.float64]


def closed_loop(
    cost: StepCost,
    prompts: npt.NDArray[np.int64],
    outputs: npt.NDArray[np.int64],
    concurrency: int,
    budget: int,
    *,
    ahead: bool = False,
    frontend_s: float = 0.0,
    capacity: int | None = None,
) -> LoopTimes:
    """Serve the requests in a closed loop.

    Args:
        cost: a compiled profile, tabulated to at least ``budget`` tokens.
        prompts: prompt tokens, at least 1, shape (requests,).
        outputs: output tokens, at least 2, same shape.
        concurrency: requests in flight, of which at most ``budget`` decode.
        budget: tokens of a step, vLLM's ``max_num_batched_tokens``.
        ahead: asynchronous scheduling.
        frontend_s: seconds between the sending of a request and its arrival at the engine.
        capacity: tokens that the KV cache holds, at least those of any one request; a request is admitted when its
            prompt fits, and when the cache is full the last one is preempted and computed anew. None: no limit.

    Raises:
        ValueError: a request that ``capacity`` does not hold.
    """
    longest = int((prompts + outputs).max())
    if capacity is not None and capacity < longest:
        raise ValueError(f"capacity: got {capacity}; allowed: at least the longest request, {longest} tokens")
    loop = _Loop(cost, prompts, outputs, budget, ahead, frontend_s, capacity or int((prompts + outputs).sum()))
    for _ in range(min(concurrency, len(prompts))):
        loop.send()
    while loop.pending or loop.waiting or loop.running:
        loop.step()
    return LoopTimes(loop.first - loop.sent, (loop.done - loop.first) / (outputs - 1))


class _Loop:
    """The engine and its client; a request is its index."""

    def __init__(
        self,
        cost: StepCost,
        prompts: npt.NDArray[np.int64],
        outputs: npt.NDArray[np.int64],
        budget: int,
        ahead: bool,
        frontend_s: float,
        capacity: int,
    ) -> None:
        self.cost, self.budget = cost, budget
        self.ahead, self.frontend_s, self.capacity = ahead, frontend_s, capacity
        self.sent, self.first, self.done = (np.zeros(len(prompts)) for _ in range(3))
        self.prompts: list[int] = prompts.tolist()
        self.outputs: list[int] = outputs.tolist()
        self.left: list[int] = outputs.tolist()  # tokens to come
        self.filled = [0] * len(prompts)  # tokens of the prefill that are computed
        self.following = 0
        self.now = self.step_began = 0.0
        self.pending: deque[int] = deque()  # on their way to the engine
        self.waiting: deque[int] = deque()
        self.running: dict[int, None] = {}  # in order of admission
        self.context = 0  # tokens of the running requests

    def send(self) -> None:
        self.sent[self.following] = self.now
        self.pending.append(self.following)
        self.following += 1

    def step(self) -> None:
        """Run one step, or as many as differ in nothing but the context."""
        self._receive()
        preempted = self._preempt()
        batch = len(self.running)
        chunks, completed = ([], []) if preempted else self._prefill(self.budget - batch)
        steps = 1
        if not (chunks or preempted or self.pending):
            steps = min((self.capacity - self.context) // batch, *(self.left[request] for request in self.running))
        tokens = batch + sum(chunk for _, chunk in chunks)
        first_s = self.cost.fixed_s + self.cost.sequence_s * (batch + len(chunks))
        first_s += float(self.cost.local_table_s[tokens] + self.cost.moe_table_s[tokens])
        first_s += self.cost.pair_s * sum(chunk * (prior + (chunk + 1) / 2) for prior, chunk in chunks)
        first_s += self.cost.context_s * self.context
        growth_s = self.cost.context_s * batch
        self.step_began = self.now + (steps - 1) * first_s + growth_s * (steps - 1) * (steps - 2) / 2
        self.now = self.step_began + first_s + growth_s * (steps - 1)
        self._finish(steps, completed)

    def _receive(self) -> None:
        """Take up the requests that had arrived when this step was decided on."""
        if not self.waiting and not self.running:
            self.now = self.step_began = max(self.now, self.sent[self.pending[0]] + self.frontend_s)
        decided = self.step_began if self.ahead else self.now
        while self.pending and self.sent[self.pending[0]] + self.frontend_s <= decided:
            self.waiting.append(self.pending.popleft())

    def _preempt(self) -> bool:
        """Give up the last requests until each running one has room for a token."""
        preempted = False
        while self.context + self._held() + len(self.running) > self.capacity:
            if self._held():
                self.filled[self.waiting[0]] = 0
            else:
                request, _ = self.running.popitem()
                self.context -= self._length(request)
                self.filled[request] = 0
                self.waiting.appendleft(request)
            preempted = True
        return preempted

    def _held(self) -> int:
        """Tokens of the request whose prefill has begun but not ended."""
        return self._length(self.waiting[0]) if self.waiting and self.filled[self.waiting[0]] else 0

    def _length(self, request: int) -> int:
        return self.prompts[request] + self.outputs[request] - self.left[request]

    def _prefill(self, left: int) -> tuple[list[tuple[int, int]], list[int]]:
        """Return (tokens before, tokens) of this step's prefill chunks, and the requests that they complete."""
        chunks, completed = [], []
        used = self.context + len(self.running)
        while self.waiting and left > 0:
            request = self.waiting[0]
            before, length = self.filled[request], self._length(request)
            used += length
            if not before and used > self.capacity:
                break
            chunk = min(left, length - before)
            chunks.append((before, chunk))
            self.filled[request] += chunk
            left -= chunk
            if before + chunk < length:
                break
            completed.append(self.waiting.popleft())
        return chunks, completed

    def _finish(self, steps: int, completed: list[int]) -> None:
        """Count the tokens of the step, note first and last ones, and send what follows."""
        self.context += len(self.running) * steps
        for request in self.running:
            self.left[request] -= steps
        for request in completed:
            if self.left[request] == self.outputs[request]:
                self.first[request] = self.now
            self.left[request] -= 1
            self.context += self._length(request)
            self.running[request] = None
        for request in [request for request in self.running if self.left[request] <= 0]:
            del self.running[request]
            self.context -= self._length(request)
            self.done[request] = self.now
            if self.following < len(self.prompts):
                self.send()
