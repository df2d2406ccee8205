"""The router's approximate prefix index; ``servegym.baselines.prefix_index`` says what it means.

One hash table over all engines: a key is the hash of a block, its value the head of a chain with a node per engine that
holds the block, so that a lookup walks a prompt once for all engines and a cold prompt costs one probe. The nodes of an
engine are linked in order of use. A node belongs to its engine for good; the oldest one is used again when the engine
has no fresh one left.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.simulator.kernel.blocks import PRIVATE, content_hash
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import index_node_at, ints, lru_at, request_at
from servegym.envs.simulator.kernel.state import NONE, State

_KEY_MASK = (1 << 52) - 1


@jit
def _slot(s: State, key: int) -> int:
    """Slot that holds ``key``, or the empty slot where it would go."""
    i = np.int64(key >> 7) & s.index_mask
    while True:
        head = ints(s.index_slots_at)[i]
        if head == NONE or index_node_at(s.index_nodes_at, head).key == key:
            return i
        i = (i + 1) & s.index_mask


@jit
def _clear_slot(s: State, hole: int) -> None:
    """Backward-shift deletion keeps probe sequences unbroken without tombstones."""
    mask = s.index_mask
    j = hole
    while True:
        j = (j + 1) & mask
        head = ints(s.index_slots_at)[j]
        if head == NONE:
            break
        home = np.int64(index_node_at(s.index_nodes_at, head).key >> 7) & mask
        if ((j - home) & mask) >= ((j - hole) & mask):
            ints(s.index_slots_at)[hole] = head
            hole = j
    ints(s.index_slots_at)[hole] = NONE


@jit
def _forget(s: State, n: int) -> None:
    """Take a node out of the chain of its key."""
    node = index_node_at(s.index_nodes_at, n)
    i = _slot(s, node.key)
    before = ints(s.index_slots_at)[i]
    if before == n:
        if node.chain == NONE:
            _clear_slot(s, i)
        else:
            ints(s.index_slots_at)[i] = node.chain
        return
    while index_node_at(s.index_nodes_at, before).chain != n:
        before = index_node_at(s.index_nodes_at, before).chain
    index_node_at(s.index_nodes_at, before).chain = node.chain


@jit
def _unlink(s: State, e: int, n: int) -> None:
    """Take a node out of its engine's list of use."""
    lru, node = lru_at(s.index_lru_at, e), index_node_at(s.index_nodes_at, n)
    if node.older == NONE:
        lru.oldest = node.newer
    else:
        index_node_at(s.index_nodes_at, node.older).newer = node.newer
    if node.newer == NONE:
        lru.newest = node.older
    else:
        index_node_at(s.index_nodes_at, node.newer).older = node.older


@jit
def _link_newest(s: State, e: int, n: int) -> None:
    lru, node = lru_at(s.index_lru_at, e), index_node_at(s.index_nodes_at, n)
    node.older = lru.newest
    node.newer = NONE
    if lru.newest == NONE:
        lru.oldest = n
    else:
        index_node_at(s.index_nodes_at, lru.newest).newer = n
    lru.newest = n


@jit
def _touch(s: State, e: int, key: int, now: float) -> None:
    """Note that engine ``e`` has just been sent a block."""
    n = ints(s.index_slots_at)[_slot(s, key)]
    while n != NONE and index_node_at(s.index_nodes_at, n).engine != e:
        n = index_node_at(s.index_nodes_at, n).chain
    lru = lru_at(s.index_lru_at, e)
    if n != NONE:
        if lru.newest != n:
            _unlink(s, e, n)
            _link_newest(s, e, n)
    else:
        if lru.count < s.index_capacity:
            n = e * s.index_capacity + lru.count
            lru.count += 1
        else:
            n = lru.oldest
            _unlink(s, e, n)
            _forget(s, n)
        i = _slot(s, key)  # after forgetting, which moves slots
        node = index_node_at(s.index_nodes_at, n)
        node.key = key
        node.engine = e
        node.chain = ints(s.index_slots_at)[i]
        ints(s.index_slots_at)[i] = n
        _link_newest(s, e, n)
    index_node_at(s.index_nodes_at, n).time_s = now


@jit
def _blocks(s: State, r: int) -> int:
    """How many leading blocks of a prompt the index looks at."""
    return min(request_at(s.requests_at, r).prompt // s.index_block_tokens, s.index_max_match)


@jit
def match_prefix(s: State, r: int, now: float) -> int:
    """Count the leading blocks of a prompt that each engine is believed to hold, into ``lru.matched``.

    Returns:
        The largest count; the counts are valid only if it is not zero.
    """
    count = _blocks(s, r)
    oldest = now - s.index_ttl_s
    for j in range(count):
        key = content_hash(s, r, j, s.index_block_tokens)
        if key == PRIVATE:
            return j
        n = ints(s.index_slots_at)[_slot(s, key)]
        if n == NONE:
            return j
        if j == 0:
            for e in range(s.engine_count):
                lru_at(s.index_lru_at, e).matched = 0
        alive = False
        while n != NONE:
            node = index_node_at(s.index_nodes_at, n)
            lru = lru_at(s.index_lru_at, node.engine)
            if lru.matched == j and node.time_s >= oldest:
                lru.matched = j + 1
                alive = True
            n = node.chain
        if not alive:
            return j
    return count


@jit
def insert_prefix(s: State, r: int, e: int, now: float) -> None:
    """Note that a prompt was sent to an engine, last block first, so that its beginning is forgotten last."""
    count = min(_blocks(s, r), s.index_capacity)
    shared = 0
    while shared < count and content_hash(s, r, shared, s.index_block_tokens) != PRIVATE:
        shared += 1
    for j in range(shared - 1, -1, -1):
        _touch(s, e, content_hash(s, r, j, s.index_block_tokens), now)


@jit
def forget_engine(s: State, e: int) -> None:
    """Forget all blocks of an engine, whose cache is gone."""
    lru = lru_at(s.index_lru_at, e)
    n = lru.oldest
    while n != NONE:
        _forget(s, n)
        n = index_node_at(s.index_nodes_at, n).newer
    lru.oldest = lru.newest = NONE
    lru.count = 0


@jit
def prefix_key(s: State, r: int) -> int:
    """Hash of the first ``prefix_key_blocks`` blocks of a prompt, or of the shared ones among them; 0 if none is."""
    count = min(_blocks(s, r), s.prefix_key_blocks)
    found = PRIVATE
    for j in range(count):
        key = content_hash(s, r, j, s.index_block_tokens)
        if key == PRIVATE:
            break
        found = key
    return int(np.int64(found) & _KEY_MASK)
