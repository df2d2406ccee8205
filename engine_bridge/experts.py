"""The expert level of a live engine: loads, routing traces, placement, through the engine's remote procedure call."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from servegym.baselines.interface import ExpertLoad, Placement
from servegym.errors import EngineError, InputError

_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class LiveExperts:
    """Experts of one engine that was started with ``experts: true`` in its cluster file.

    Attributes:
        url: the engine.
    """

    url: str

    def start(self, *, keep: bool = False) -> tuple[int, int]:
        """Begin to count tokens by layer and expert from zero.

        Args:
            keep: keep the experts of each token, for :meth:`save_trace`.

        Returns:
            MoE layers, logical experts of a layer.
        """
        answer = self._call("servegym_start", "1" if keep else "0")[0]
        return int(answer["layers"]), int(answer["experts"])

    def load(self) -> ExpertLoad:
        """Return what was counted since the start; tensor-parallel ranks route alike, the first one stands for all."""
        answer = self._call("servegym_counts")[0]
        return ExpertLoad(np.array(answer["counts"], dtype=np.float64), steps=int(answer["steps"]))

    def save_trace(self, path: Path) -> int:
        """Write the experts of each token since the start as ``.npz``, on the engine's machine.

        The format is that of :mod:`servegym.envs.simulator.experts.routing.recorded`.

        Returns:
            Tokens written.

        Raises:
            EngineError: nothing was kept.
        """
        answer = self._call("servegym_save", str(path.resolve()))[0]
        if not answer["tokens"]:
            raise EngineError(f"{self.url}: no tokens to write; begin with start(keep=True) and send requests")
        return int(answer["tokens"])

    def placement(self) -> Placement:
        """Return which expert stands where.

        Raises:
            EngineError: the engine has no expert parallelism.
        """
        held = [answer["held"] for answer in self._call("servegym_placement")]
        if any(layer is None for rank in held for layer in rank):
            raise EngineError(f"{self.url}: no expert parallelism (enable-expert-parallel)")
        return Placement(np.concatenate([np.array(rank, dtype=np.int64) for rank in held], axis=1), len(held))

    def place(self, wanted: Placement) -> list[int]:
        """Move experts, layer by layer, while the engine serves (tensor parallelism) or is paused (data parallelism).

        Returns:
            Experts that the ranks received, by layer.

        Raises:
            InputError: the placement has replicas, which vLLM's own EPLB alone can serve.
            EngineError: the engine refuses.
        """
        slots = wanted.physical_to_logical
        if any(len(np.unique(layer)) < len(layer) for layer in slots):
            raise InputError("placement", "physical_to_logical", "has replicas; allowed: each expert once")
        moved = []
        for index, layer in enumerate(slots):
            ranks = np.empty(len(layer), dtype=np.int64)
            ranks[layer] = np.arange(len(layer)) // (len(layer) // wanted.ranks)
            answers = self._call("servegym_place", str(index), json.dumps(ranks.tolist()))
            moved.append(sum(int(answer["moved"]) for answer in answers))
        return moved

    def _call(self, method: str, *arguments: str) -> list[dict[str, Any]]:
        body = json.dumps({"method": method, "args": list(arguments)}).encode()
        request = urllib.request.Request(f"{self.url}/collective_rpc", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                answers: list[dict[str, Any]] = json.load(response)["results"]
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise EngineError(f"{self.url} takes no calls; its cluster file needs experts: true") from None
            raise EngineError(f"{self.url}: {method} failed: {error.read()[:300].decode(errors='replace')}") from None
        except (OSError, ValueError, KeyError) as error:
            raise EngineError(f"{self.url}: {method} failed: {error}") from None
        for answer in answers:
            if "error" in answer:
                raise EngineError(f"{self.url}: {method}: {answer['error']}")
        return answers
