"""The decision log: a line of JSON for each request that has ended; a trace that ``servegym simulate`` replays.

No prompt is ever written: users, sessions and blocks of prompts appear as hashes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from servegym.engine_bridge.gateway.messages import Outcome
from servegym.errors import InputError


@dataclass(slots=True)
class DecisionRecord:
    """A decision and what became of the request. Seconds count from the start of the deployment.

    Attributes:
        request_id: of the data plane, which the engine's log has too.
        arrival_s: at the gateway.
        prompt_tokens: as the engine counted, or else as estimated for the decision.
        user: number or hash; None if unknown.
        session: likewise.
        turn: of the session.
        priority: smaller runs first.
        deadline_s: until the first token is due; None without one.
        prefix_blocks: hashes of the prompt's leading blocks, of 53 bits.
        policy: that decided.
        version: of that policy in this deployment.
        chosen: engine.
        scores: of all engines; None for infinity.
        propensity: probability with which this engine was chosen.
        fallback: why the heuristic decided in the policy's place; empty if it did not.
        decision_us: time that the policy took, microseconds.
        shadow: policy that only watched.
        shadow_engine: that it would have chosen.
        observation: the policy's view, if asked for: ``request`` (``R_*``) and ``engines`` (``E_*``).
        engine: that served the request; another one than chosen after a retry.
        status: HTTP status.
        ended: complete, failed, or client left.
        attempts: engines tried.
        ttft_s: at the gateway.
        e2e_s: at the gateway.
        output_tokens: as the engine counted; None if nobody said.
    """

    request_id: str
    arrival_s: float
    prompt_tokens: int
    user: int | None
    session: int | None
    turn: int
    priority: int
    deadline_s: float | None
    prefix_blocks: list[int]
    policy: str
    version: int
    chosen: int
    scores: list[float | None]
    propensity: float
    fallback: str
    decision_us: float
    shadow: str = ""
    shadow_engine: int = -1
    observation: dict[str, Any] | None = None
    engine: int = -1
    status: int = 0
    ended: str = ""
    attempts: int = 0
    ttft_s: float | None = None
    e2e_s: float | None = None
    output_tokens: int | None = None

    def end(self, engine: int, outcome: Outcome, ended: str) -> None:
        """Enter what became of the request."""
        self.engine, self.status, self.ended, self.attempts = engine, outcome.status, ended, outcome.attempts
        self.ttft_s, self.e2e_s, self.output_tokens = outcome.ttft_s, outcome.total_s, outcome.output_tokens
        self.prompt_tokens = outcome.prompt_tokens or self.prompt_tokens


class DecisionLog:
    """Writes records as they come; a line is whole or absent.

    Args:
        path: file to append to; None for nowhere.
        block_tokens: tokens per block of a prompt, for whoever reads the log.

    Raises:
        InputError: it cannot be written to.
    """

    def __init__(self, path: Path | None, block_tokens: int) -> None:
        self._file: TextIO | None = None
        self._block_tokens = block_tokens
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                # Line buffered: what has ended is on disk when the process is killed.
                self._file = path.open("a", encoding="utf-8", buffering=1)
            except OSError as error:
                raise InputError("deploy", "log", f"got {path}: {error.strerror}") from None

    def write(self, record: DecisionRecord) -> None:
        """Append a record."""
        if self._file is not None:
            content = asdict(record) | {"prefix_block_tokens": self._block_tokens}
            if record.observation is None:
                del content["observation"]
            self._file.write(json.dumps(content, separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
