"""Exact records of an engine's steps, written only while somebody asks for them.

The file beside the scheduler's state file, with the suffix ``.steps``, is the request: who wants records creates it
empty, who has enough removes it. The first line is JSON with the engine's limits; each further line is one step::

    start end busy sequences prefill_tokens prior_tokens prefill_pairs decodes context_tokens

Times are ``time.perf_counter()`` seconds, which processes of one Linux machine share; ``start`` is the call of
``schedule()``, or, of a step that was scheduled ahead, the end of the step before; ``end`` is the return of
``update_from_output()``, and ``busy`` says whether requests were left.
``prefill_pairs`` is the sum of ``c * (p + (c + 1) / 2)`` of :class:`~servegym.envs.profiles.profile.StepTime`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_logger = logging.getLogger("vllm.servegym")
_LOOK_S = 0.1


def steps_file(state: Path) -> Path:
    """Return where the scheduler with a state file writes its steps."""
    return state.with_suffix(".steps")


class StepRecorder:
    """Appends a line for each step while the file exists; a failure ends the recording and nothing else.

    Args:
        path: the file; None for never.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: int | None = None
        self._inode = 0
        self._look_at = 0.0
        self._begun: deque[tuple[Any, float, str]] = deque()
        self._ended_s = 0.0

    @property
    def recording(self) -> bool:
        """Whether steps are recorded."""
        return self._file is not None

    def refresh(self, limits: Callable[[], Mapping[str, float]]) -> bool:
        """Look, at most ten times a second, whether records are wanted.

        Args:
            limits: called without arguments for the limits to write first, when a recording begins.

        Returns:
            Whether steps are recorded.
        """
        now = time.monotonic()
        if self._path is None or now < self._look_at:
            return self._file is not None
        self._look_at = now + _LOOK_S
        try:
            inode = os.stat(self._path).st_ino
        except OSError:
            self.close()
            return False
        if inode != self._inode:
            self.close()
            try:
                # Without O_CREAT: who removed the file in the meantime wants no records.
                self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
                self._inode = inode
                self._write(json.dumps(limits()))
            except Exception as error:
                self._fail(error)
        return self._file is not None

    def scheduled(self, start_s: float, output: Any, requests: Any) -> None:
        """Note what a step does.

        Args:
            start_s: when its scheduling began.
            output: vLLM's SchedulerOutput.
            requests: the scheduler's requests by id.
        """
        try:
            composition = _composition(output, requests)
            # Asynchronous scheduling begins the next step before this one has ended.
            if composition is not None:
                self._begun.append((output, start_s, composition))
        except Exception as error:
            self._fail(error)

    def updated(self, output: Any, end_s: float, busy: bool) -> None:
        """Write the step that a SchedulerOutput belongs to."""
        while self._begun and self._file is not None:
            begun, start_s, composition = self._begun.popleft()
            if begun is output:
                start_s, self._ended_s = max(start_s, self._ended_s), end_s
                try:
                    self._write(f"{start_s:.7f} {end_s:.7f} {int(busy)} {composition}")
                except OSError as error:
                    self._fail(error)
                return

    def close(self) -> None:
        """End the recording."""
        self._begun.clear()
        self._inode = 0
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, line: str) -> None:
        if self._file is not None:
            os.write(self._file, f"{line}\n".encode())

    def _fail(self, error: Exception) -> None:
        _logger.warning("servegym: steps are not recorded: %s: %s", type(error).__name__, error)
        self.close()
        self._path = None


def _composition(output: Any, requests: Any) -> str | None:
    """Write what a step computes; None for a step without tokens."""
    before = {new.req_id: int(new.num_computed_tokens) for new in output.scheduled_new_reqs}
    cached = output.scheduled_cached_reqs
    before.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    prefill = prior = decodes = context = 0
    pairs = 0.0
    for name, tokens in output.num_scheduled_tokens.items():
        done = before[name]
        if tokens == 1 and done >= requests[name].num_prompt_tokens:
            decodes += 1
            context += done + 1
        else:
            prefill += tokens
            prior += done
            pairs += tokens * (done + (tokens + 1) / 2)
    sequences = len(output.num_scheduled_tokens)
    return f"{sequences} {prefill} {prior} {pairs:.1f} {decodes} {context}" if sequences else None
