"""Exact step records of an engine that our scheduler runs in; see servegym.engine_bridge.vllm_plugin.steps."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from servegym.envs.calibration.fit import STRAGGLER, Sample
from servegym.errors import EngineError

_PATIENCE_S = 10.0
WINDOW = 16
"""Steps of a window of traffic."""


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the records; times in seconds."""

    start_s: float
    end_s: float
    busy: bool
    sequences: int
    prefill_tokens: int
    prior_tokens: int
    prefill_pairs: float
    decodes: int
    context_tokens: int


class StepRecords:
    """Asks an engine for records of its steps while it is entered.

    Args:
        path: where the engine's scheduler writes them.

    Attributes:
        limits: the engine's, as far as its scheduler tells.
        prefill_tokens_per_s: what policies inside the engine take for its prefill rate.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.limits: dict[str, Any] = {}
        self.prefill_tokens_per_s: float | None = None

    def __enter__(self) -> StepRecords:
        self._path.unlink(missing_ok=True)
        self._path.touch()
        return self

    def __exit__(self, *error: object) -> None:
        self._path.unlink(missing_ok=True)

    def wait(self, nudge: Any) -> None:
        """Wait for the first line.

        Args:
            nudge: gives the engine something to do; it looks for the file only then.

        Raises:
            EngineError: nothing comes.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while not self.limits:
            nudge()
            with self._path.open("rb") as file:
                line = file.readline()
                if line.endswith(b"\n"):
                    self.limits, self._offset = json.loads(line), file.tell()
                    self.prefill_tokens_per_s = self.limits.pop("prefill_tokens_per_s", None)
                    return
            if time.monotonic() > deadline:
                raise EngineError(f"the engine's scheduler writes no records to {self._path}; is it of this version?")
            time.sleep(0.12)

    def read(self) -> list[Step]:
        """Return the steps since the last call.

        Raises:
            EngineError: the file is gone.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            raise EngineError(f"{self._path} is gone: another calibration or validation used the engine") from None
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [_parse(line) for line in whole.splitlines()]


def _parse(line: bytes) -> Step:
    start, end, busy, sequences, prefill, prior, pairs, decodes, context = line.split()
    return Step(
        float(start),
        float(end),
        busy == b"1",
        int(sequences),
        int(prefill),
        int(prior),
        float(pairs),
        int(decodes),
        int(context),
    )


def samples_of(steps: list[Step], point: str, round_: int) -> list[Sample]:
    """Turn the steps of a point into samples.

    Decode steps of one batch become one sample, their mean composition with their mean duration, stragglers apart.
    """
    found: list[Sample] = []
    decoding: dict[int, list[tuple[Step, float]]] = {}
    for step, seconds in durations(steps):
        us = 1e6 * seconds
        if step.prefill_tokens:
            found.append(_sample(point, round_, step, us))
        else:
            decoding.setdefault(step.decodes, []).append((step, us))
    for batch, measured in decoding.items():
        context = sum(step.context_tokens for step, _ in measured) / len(measured)
        middle = statistics.median(us for _, us in measured)
        usual = statistics.fmean(us for _, us in measured if us <= STRAGGLER * middle)
        found.append(Sample(point, round_, batch, 0.0, 0.0, batch, context, usual))
    return found


def each_step(steps: list[Step], point: str, round_: int) -> list[Sample]:
    """Turn steps of traffic into samples, one each, that count in windows of some consecutive ones."""
    measured = list(durations(steps))
    return [
        replace(_sample(point, round_, step, 1e6 * seconds), window=i // WINDOW)
        for i, (step, seconds) in enumerate(measured[: len(measured) // WINDOW * WINDOW])
    ]


def durations(steps: list[Step]) -> Iterator[tuple[Step, float]]:
    """Yield steps with their durations in seconds: a step lasts until the next one begins, if requests are left.

    The last step of a busy spell has no successor to last until and is left out.
    """
    for step, after in itertools.pairwise(steps):
        if step.busy:
            yield step, after.start_s - step.start_s


def _sample(point: str, round_: int, step: Step, us: float) -> Sample:
    return Sample(
        point,
        round_,
        step.sequences,
        step.prefill_tokens,
        step.prefill_pairs,
        step.decodes,
        step.context_tokens,
        us,
        prior_tokens=step.prior_tokens,
    )
