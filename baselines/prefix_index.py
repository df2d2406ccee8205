"""What a router believes to be in the prefix caches of its engines, from what it sent there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np
from pydantic import Field

from servegym.baselines.interface import FloatArray
from servegym.configuration import Config


class PrefixIndexConfig(Config):
    """An approximate prefix index, as real routers keep it; two defaults are llm-d's (31,250 and 256 blocks)."""

    block_tokens: int = Field(default=64, ge=1, le=1 << 20, description="tokens per block of the index")
    capacity_blocks: int = Field(
        default=31_250, ge=1, le=1 << 24, description="blocks remembered per engine, oldest forgotten"
    )
    ttl_s: float | None = Field(
        default=None, gt=0, description="seconds until a block is forgotten; none: never (Dynamo: 120)"
    )
    max_match_blocks: int = Field(
        default=256, ge=1, le=1 << 20, description="leading blocks of a prompt that are looked at"
    )


class PrefixIndex:
    """Least recently used blocks of each engine, looked up for all engines in one walk along a prompt.

    A block is named by the hash of all tokens up to its end, so a hit means that everything before it is the same. Of a
    prompt only the first ``max_match_blocks`` full blocks count. An insertion touches the last of them first: of a
    prompt that is too old, the end is forgotten before the beginning, without which it is of no use.

    Args:
        engines: number of engines.
        config: sizes.

    >>> index = PrefixIndex(2, PrefixIndexConfig(block_tokens=16))
    >>> index.insert(1, ["a", "ab"])
    >>> index.match(["a", "ab", "abc"])
    array([ 0., 32.])
    """

    def __init__(self, engines: int, config: PrefixIndexConfig | None = None) -> None:
        self.config = PrefixIndexConfig() if config is None else config
        self._blocks: list[OrderedDict[Hashable, float]] = [OrderedDict() for _ in range(engines)]
        self._holders: dict[Hashable, set[int]] = {}

    def match(self, hashes: Sequence[Hashable], now_s: float = 0.0) -> FloatArray:
        """Return the leading tokens of a prompt that each engine is believed to hold, shape (engines,).

        Args:
            hashes: hash of each full block of the prompt with all that stands before it.
            now_s: time, for ``ttl_s``.
        """
        oldest = -np.inf if self.config.ttl_s is None else now_s - self.config.ttl_s
        tokens = np.zeros(len(self._blocks))
        alive = set(range(len(self._blocks)))
        for block in hashes[: self.config.max_match_blocks]:
            alive = {e for e in alive & self._holders.get(block, set()) if self._blocks[e][block] >= oldest}
            if not alive:
                break
            tokens[list(alive)] += self.config.block_tokens
        return tokens

    def insert(self, engine: int, hashes: Sequence[Hashable], now_s: float = 0.0) -> None:
        """Note that a prompt was sent to an engine."""
        held = self._blocks[engine]
        kept = min(self.config.max_match_blocks, self.config.capacity_blocks)
        for block in reversed(hashes[:kept]):
            held[block] = now_s
            held.move_to_end(block)
            self._holders.setdefault(block, set()).add(engine)
            if len(held) > self.config.capacity_blocks:
                self._forget(engine, held.popitem(last=False)[0])

    def clear(self, engine: int) -> None:
        """Forget an engine, whose cache is gone."""
        for block in self._blocks[engine]:
            self._forget(engine, block)
        self._blocks[engine].clear()

    def tokens(self) -> FloatArray:
        """Return the tokens remembered of each engine, shape (engines,)."""
        return np.array([float(len(held)) for held in self._blocks]) * self.config.block_tokens

    def _forget(self, engine: int, block: Hashable) -> None:
        holders = self._holders[block]
        holders.discard(engine)
        if not holders:
            del self._holders[block]
