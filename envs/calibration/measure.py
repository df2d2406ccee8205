"""Sending the requests of a design to an engine, and reading how long its steps took."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from servegym.envs.calibration.design import STEPS, TRAFFIC_OUTPUTS, TRAFFIC_REQUESTS, Point
from servegym.envs.calibration.fit import Sample
from servegym.envs.calibration.records import Step, StepRecords, each_step, samples_of
from servegym.envs.live.client import Completion, complete
from servegym.errors import EngineError

_TIMEOUT_S = 120.0
_WORDS = 400
_SHORTEST = 16


@dataclass(frozen=True, slots=True)
class Delay:
    """What a client waited for beside the engine's steps.

    Attributes:
        prompt_tokens: of the request.
        least_s, most_s: bounds of the time from sending to the engine's queue: it missed the step before its own and
            caught that. Equal if it found the engine idle.
        after_s: from the end of the step that made its first token to the client's receipt.
        traffic: whether other requests came and went meanwhile.
    """

    prompt_tokens: int
    least_s: float
    most_s: float
    after_s: float
    traffic: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """What one visit of a point gave.

    Attributes:
        samples: its steps.
        delays: with exact records, of requests: what a client waited for outside of the steps.
    """

    samples: list[Sample]
    delays: list[Delay]


class Probe:
    """One client of one engine; async context manager.

    Args:
        url: the server.
        model: its name in requests.
        vocabulary: token ids are below this number.
        records: of the engine's steps; None to go by what a client sees.
        seed: of the tokens.
    """

    def __init__(self, url: str, model: str, vocabulary: int, records: StepRecords | None, seed: int) -> None:
        self._url, self._model, self._vocabulary, self._records = url, model, vocabulary, records
        # Other tokens than in any calibration before: the engine may still have those cached.
        self._rng = np.random.default_rng([seed, time.time_ns()])
        self._names = itertools.count()

    async def __aenter__(self) -> Probe:
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S, connect=10)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def visit(self, point: Point, round_: int) -> Measured:
        """Measure a point once.

        Raises:
            EngineError: a request failed.
        """
        if point.streams:
            return await self._traffic(point, round_)
        if not point.decodes:
            return await self._alone(point, round_)
        return await self._batch(point, round_)

    async def overheads(self) -> dict[str, float | None]:
        """Return what a request costs beside the engine: HTTP, and the tokeniser per token; seconds, None unknown."""
        http = await self._median(lambda: self._get("/health"))
        text = "word " * _WORDS
        count = 0

        async def tokenise() -> None:
            nonlocal count
            body = {"model": self._model, "prompt": text}
            async with self._session.post(f"{self._url}/tokenize", json=body) as response:
                data = await response.read()
                count = int(json.loads(data).get("count", 0)) if response.status == 200 else 0

        try:
            whole = await self._median(tokenise)
        except (ValueError, TypeError, AttributeError):
            count = 0
        per_token = max(whole - http, 0.0) / count if count else None
        return {"http_s": http, "tokeniser_s_per_token": per_token}

    async def _get(self, path: str) -> None:
        async with self._session.get(self._url + path) as response:
            await response.read()

    async def _median(self, act: Any, repetitions: int = 9) -> float:
        times = []
        for _ in range(repetitions):
            start = time.perf_counter()
            try:
                await act()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise EngineError(f"{self._url}: {type(error).__name__}: {error}") from None
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    async def _alone(self, point: Point, round_: int) -> Measured:
        prefix = self._tokens(point.prior)
        if prefix:
            await self._send(prefix, 1)
        self._steps()
        # Two tokens: the prefill is followed by a step, so that it has an end of its own.
        result = await self._send([*prefix, *self._tokens(point.chunk)], 2)
        if prefix and result.hit_tokens < point.prior and self._records is None:
            return Measured([], [])
        ttft_s = result.first_s - result.sent_s
        if self._records is None:
            pairs = point.chunk * (point.prior + (point.chunk + 1) / 2)
            one = Sample(point.name, round_, 1, point.chunk, pairs, 0, 0, 1e6 * ttft_s, True, point.prior)
            return Measured([one], [])
        steps = await self._settled()
        delays = []
        prefills = [step for step in steps if step.prefill_tokens]
        if len(prefills) == 1:
            before_s, after_s = prefills[0].start_s - result.sent_s, result.first_s - prefills[0].end_s
            delays = [Delay(point.chunk + point.prior, before_s, before_s, after_s)]
        return Measured(samples_of(steps, point.name, round_), delays)

    async def _traffic(self, point: Point, round_: int) -> Measured:
        """Keep requests of many lengths in flight, short ones as frequent as long ones by order of magnitude.

        The lengths are those of a grid in random order, so that every visit has the same work.
        """
        self._steps()
        low, high = np.log2((_SHORTEST, point.chunk))
        grid = (np.arange(TRAFFIC_REQUESTS) + 0.5) / TRAFFIC_REQUESTS
        lengths = self._rng.permutation(np.exp2(low + (high - low) * grid).astype(int))
        shortest, longest = TRAFFIC_OUTPUTS
        outputs = self._rng.permutation((shortest + (longest + 1 - shortest) * grid).astype(int))
        prompts = [self._tokens(int(length)) for length in lengths]
        done: list[tuple[int, Completion]] = []

        async def stream(first: int) -> None:
            for i in range(first, TRAFFIC_REQUESTS, point.streams):
                result = await self._send(prompts[i], int(outputs[i]))
                done.append((len(prompts[i]), result))

        await asyncio.gather(*(stream(first) for first in range(point.streams)))
        steps = await self._settled()
        found = (_delay(tokens, result, steps) for tokens, result in done)
        return Measured(each_step(steps, point.name, round_), [delay for delay in found if delay is not None])

    async def _batch(self, point: Point, round_: int) -> Measured:
        self._steps()
        outputs = (4 if point.chunk else 2) * STEPS
        events: list[list[float]] = [[] for _ in range(point.decodes)]
        tasks = [asyncio.create_task(self._send(self._tokens(point.context), outputs, seen)) for seen in events]
        late: Completion | None = None
        if point.chunk:
            while not all(len(seen) >= STEPS // 2 for seen in events) and not any(task.done() for task in tasks):
                await asyncio.sleep(0.001)
            late = await self._send(self._tokens(point.chunk), 1)
        await asyncio.gather(*tasks)
        if self._records is not None:
            return Measured(samples_of(await self._settled(), point.name, round_), [])
        return Measured(list(self._seen(point, round_, events, late)), [])

    def _seen(self, point: Point, round_: int, events: list[list[float]], late: Completion | None) -> Any:
        """Steps as the longest-lived stream shows them: gaps between its tokens while all decode."""
        begin, end = max(seen[0] for seen in events), min(seen[-1] for seen in events)
        stream = max(events, key=len)
        gaps = [(t, 1e6 * (t - s)) for s, t in itertools.pairwise(stream) if begin <= s and t <= end]
        if late is not None:
            gaps = [(t, us) for t, us in gaps if late.sent_s <= t <= late.first_s + 0.01]
        if not gaps:
            return
        context = point.decodes * (point.context + STEPS)
        if late is None:
            # The mean: a network that holds tokens back and lets them go together changes single gaps, not the sum.
            us = statistics.fmean(us for _, us in gaps)
            yield Sample(point.name, round_, point.decodes, 0, 0, point.decodes, context, us)
            return
        pairs = point.chunk * (point.chunk + 1) / 2
        us = max(us for _, us in gaps)
        yield Sample(point.name, round_, point.decodes + 1, point.chunk, pairs, point.decodes, context, us)

    def _tokens(self, count: int) -> list[int]:
        tokens: list[int] = self._rng.integers(self._vocabulary, size=count).tolist()
        return tokens

    async def _send(self, prompt: list[int], outputs: int, seen: list[float] | None = None) -> Completion:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": outputs,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"X-Request-Id": f"servegym-calibrate-{next(self._names)}"}
        listen = None if seen is None else seen.append
        result = await complete(self._session, self._url, body, headers, on_token=listen)
        if result.error:
            raise EngineError(f"{self._url}: {result.error}")
        return result

    def _steps(self) -> list[Step]:
        return [] if self._records is None else self._records.read()

    async def _settled(self) -> list[Step]:
        """Return the steps since the last call, once the engine has come to rest."""
        steps = self._steps()
        for _ in range(50):
            if steps and not steps[-1].busy:
                break
            await asyncio.sleep(0.01)
            steps += self._steps()
        return steps


def _delay(prompt_tokens: int, result: Completion, steps: list[Step]) -> Delay | None:
    """What a request of traffic waited for beside its prefill, which is the last one that ended before its token."""
    made = [i for i, step in enumerate(steps) if step.prefill_tokens and step.end_s <= result.first_s]
    if not made or steps[made[-1]].start_s < result.sent_s:
        return None
    own, before = steps[made[-1]], steps[made[-1] - 1] if made[-1] else None
    most_s = own.start_s - result.sent_s
    least_s = before.start_s - result.sent_s if before is not None and before.busy else most_s
    return Delay(prompt_tokens, least_s, most_s, result.first_s - own.end_s, traffic=True)
