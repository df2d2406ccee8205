"""KV blocks: vLLM's block pool with its free queue, reference counts and prefix cache.

Without prefix caching blocks are interchangeable and a count is all. With it, the order in which free blocks are reused
decides what stays cached, so the free queue is kept exactly as vLLM 0.32 keeps it (``block_pool.py``): blocks are taken
from the front; of a freed request, blocks without hash go to the front, hashed ones to the back, last block first.

Only blocks that can be found again have a number here. Others, those whose content no other request can have (most
blocks of most workloads), remain interchangeable: a number is given as a block enters the hash table and taken back as
it leaves it, and a private block enters it when its request is preempted, the only event after which it can be found.
The free queue so is the number of blocks without hash at its front, among them those never used, and a ring: runs of
private blocks, and blocks of the hash table, which are taken out by leaving a hole when they are found.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import block_at, ints, longs, request_at
from servegym.envs.simulator.kernel.state import DECODE, NONE, Engine, State

PRIVATE = 0  # instead of a hash: the content is no other request's
PUBLIC = 1 << 30  # flag of an entry of the ring: a block of the hash table; without it, how many private ones
HOLE = -1
ALL = 1 << 30
_SLOT_SHIFT = 7  # bits of a hash from which its slot follows


@jit
def mix(a: int, b: int) -> int:
    """Combine two 64-bit numbers into a hash other than 0 (splitmix64 finaliser)."""
    z = np.uint64(a) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(b) * np.uint64(0xD1B54A32D192ED03)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return np.int64(z | np.uint64(2))  # type: ignore[return-value]


@jit
def _block_hash(content: int, block: int) -> int:
    """Hash of a block whose content a number and its place determine; neighbours are neighbours in the hash table."""
    return (mix(content, block >> 3) & ~(7 << _SLOT_SHIFT)) | ((block & 7) << _SLOT_SHIFT)


@jit
def content_hash(s: State, r: int, block: int, block_size: int) -> int:
    """Hash of a full block of a request, equal for two requests iff their tokens up to its end are equal.

    Returns PRIVATE where no other request shares the content.
    """
    request = request_at(s.requests_at, r)
    end = (block + 1) * block_size
    if end <= request.template_tokens:
        return _block_hash(request.template * 2 + 1, block)
    granularity = s.prefix_block_tokens
    if granularity > 0:
        index = longs(s.prefix_start_at)[r] + (end - 1) // granularity
        if index < longs(s.prefix_start_at)[r + 1]:
            return _block_hash(longs(s.prefix_ids_at)[index], block)
    if request.shared_stream:
        return _block_hash(~request.stream, block)
    return PRIVATE


@jit
def own_hash(s: State, r: int, block: int, block_size: int) -> int:
    """Hash under which a preempted request finds a block of its own again."""
    value = content_hash(s, r, block, block_size)
    return _block_hash(~r, ~block) if value == PRIVATE else value


@jit
def findable_blocks(s: State, r: int, block_size: int) -> int:
    """Number of leading blocks of a request that are not private: for others to find, or, preempted, for itself."""
    request = request_at(s.requests_at, r)
    if request.preemptions > 0 or request.shared_stream:
        return ALL
    tokens = int(request.template_tokens)
    if s.prefix_block_tokens > 0:
        given = longs(s.prefix_start_at)[r + 1] - longs(s.prefix_start_at)[r]
        tokens = max(tokens, given * s.prefix_block_tokens)
    return tokens // block_size


# ---------------------------------------------------------------------------------------------- hash table
@jit
def _slot(engine: Engine, key: int) -> int:
    """Slot that holds ``key``, or the empty slot where it would go."""
    mask = engine.table_mask
    i = np.int64(key >> _SLOT_SHIFT) & mask
    while longs(engine.table_keys_at)[i] != 0 and longs(engine.table_keys_at)[i] != key:
        i = (i + 1) & mask
    return i


@jit
def find_block(engine: Engine, key: int) -> int:
    """First block inserted with this hash, or NONE."""
    if not engine.table_used:
        return NONE
    i = _slot(engine, key)
    return ints(engine.table_blocks_at)[i] if longs(engine.table_keys_at)[i] != 0 else NONE


@jit
def _number(engine: Engine) -> int:
    """A number that no other block has."""
    if engine.returned > 0:
        engine.returned -= 1
        return ints(engine.returned_at)[engine.returned]
    engine.numbered += 1
    return engine.numbered - 1


@jit
def insert_block(engine: Engine, key: int) -> int:
    """Enter a block that one request refers to under its hash, behind others of the same hash; returns its number."""
    if not engine.table_used:  # most engines of most runs never need it
        for i in range(engine.table_mask + 1):
            longs(engine.table_keys_at)[i] = 0
        engine.table_used = 1
    block = _number(engine)
    record = block_at(engine.blocks_at, block)
    record.hash = key
    record.twin = NONE
    record.refs = 1
    i = _slot(engine, key)
    if longs(engine.table_keys_at)[i] == 0:
        longs(engine.table_keys_at)[i] = key
        ints(engine.table_blocks_at)[i] = block
        return block
    last = ints(engine.table_blocks_at)[i]
    while block_at(engine.blocks_at, last).twin != NONE:
        last = block_at(engine.blocks_at, last).twin
    block_at(engine.blocks_at, last).twin = block
    return block


@jit
def remove_block(engine: Engine, block: int) -> None:
    """Take a block out of the prefix cache."""
    ints(engine.returned_at)[engine.returned] = block
    engine.returned += 1
    i = _slot(engine, block_at(engine.blocks_at, block).hash)
    if ints(engine.table_blocks_at)[i] != block:
        before = ints(engine.table_blocks_at)[i]
        while block_at(engine.blocks_at, before).twin != block:
            before = block_at(engine.blocks_at, before).twin
        block_at(engine.blocks_at, before).twin = block_at(engine.blocks_at, block).twin
        return
    if block_at(engine.blocks_at, block).twin != NONE:
        ints(engine.table_blocks_at)[i] = block_at(engine.blocks_at, block).twin
        return
    # Backward-shift deletion keeps probe sequences unbroken without tombstones.
    mask = engine.table_mask
    hole, j = i, i
    while True:
        j = (j + 1) & mask
        moved = longs(engine.table_keys_at)[j]
        if moved == 0:
            break
        home = np.int64(moved >> _SLOT_SHIFT) & mask
        if ((j - home) & mask) >= ((j - hole) & mask):
            longs(engine.table_keys_at)[hole] = moved
            ints(engine.table_blocks_at)[hole] = ints(engine.table_blocks_at)[j]
            hole = j
    longs(engine.table_keys_at)[hole] = 0


# ---------------------------------------------------------------------------------------------- free queue
@jit
def _append(engine: Engine, entry: int) -> None:
    """Put an entry behind all others; when the ring is full of holes, close them first."""
    mask = engine.free_mask
    if engine.free_entries > mask:
        _compact(engine)
    position = (engine.free_head + engine.free_entries) & mask
    ints(engine.free_at)[position] = entry
    engine.free_entries += 1
    if entry & PUBLIC:
        block_at(engine.blocks_at, entry & ~PUBLIC).position = position


@jit
def _append_private(engine: Engine, count: int) -> None:
    """Put private blocks behind all others."""
    if count <= 0:
        return
    engine.free_blocks += count
    last = (engine.free_head + engine.free_entries - 1) & engine.free_mask
    if engine.free_entries > 0:
        entry = ints(engine.free_at)[last]
        if entry != HOLE and not entry & PUBLIC:
            ints(engine.free_at)[last] = entry + count
            return
    _append(engine, count)


@jit
def _compact(engine: Engine) -> None:
    """Close the holes that taken-out blocks left in the ring."""
    mask, kept = engine.free_mask, 0
    for k in range(engine.free_entries):
        entry = ints(engine.free_at)[(engine.free_head + k) & mask]
        if entry == HOLE:
            continue
        position = (engine.free_head + kept) & mask
        ints(engine.free_at)[position] = entry
        if entry & PUBLIC:
            block_at(engine.blocks_at, entry & ~PUBLIC).position = position
        kept += 1
    engine.free_entries = kept


@jit
def take_blocks(engine: Engine, count: int) -> None:
    """Take the first free blocks, evicting what they cached."""
    engine.free_blocks -= count
    unhashed = min(count, engine.unhashed)
    engine.unhashed -= unhashed
    count -= unhashed
    while count > 0:
        entry = ints(engine.free_at)[engine.free_head]
        if entry != HOLE and not entry & PUBLIC:
            if entry > count:
                ints(engine.free_at)[engine.free_head] = entry - count
                return
            count -= entry
        elif entry != HOLE:
            remove_block(engine, entry & ~PUBLIC)
            count -= 1
        engine.free_head = (engine.free_head + 1) & engine.free_mask
        engine.free_entries -= 1


@jit
def touch_block(engine: Engine, block: int) -> None:
    """Add a reference to a cached block, taking it out of the free queue if it is there."""
    record = block_at(engine.blocks_at, block)
    if record.refs == 0:
        ints(engine.free_at)[record.position] = HOLE
        engine.free_blocks -= 1
    record.refs += 1


@jit
def reset_pool(engine: Engine) -> None:
    """All blocks free, nothing cached; one block is vLLM's null block and never handed out."""
    engine.free_blocks = engine.unhashed = engine.num_blocks - 1
    if not engine.prefix_caching:
        return
    engine.table_used = engine.numbered = engine.returned = 0
    engine.free_head = engine.free_entries = engine.findable = 0
    for row in range(engine.max_num_seqs):
        ints(engine.rows_at)[row] = row
    engine.rows_free = engine.max_num_seqs


@jit
def reset_pools(engines: Any) -> None:
    """Reset the pools of all engines, an array of ENGINE records."""
    for e in range(engines.shape[0]):
        reset_pool(engines[e])


# ---------------------------------------------------------------------------------------------- requests
@jit
def in_flight(engine: Engine, request: Any) -> bool:
    """Scheduling ahead: whether the running step computes a token of a running request."""
    return request.status == DECODE and request.skipped != engine.tick


@jit
def block_table(engine: Engine, row: int) -> Any:
    """One row of the block tables: the blocks of a running request in order."""
    return ints(engine.block_tables_at + 4 * row * engine.row_length)


@jit
def cached_prefix(s: State, engine: Engine, r: int, tokens: int) -> int:
    """Number of leading blocks of a request found in the prefix cache; the last token is always recomputed.

    Fills the head of a scratch row of the block table: the row that the request will get.
    """
    size = engine.block_size
    table = block_table(engine, ints(engine.rows_at)[engine.rows_free - 1])
    most = min((tokens - 1) // size, findable_blocks(s, r, size))
    for count in range(most):
        block = find_block(engine, own_hash(s, r, count, size))
        if block == NONE:
            return count
        table[count] = block
    return max(most, 0)


@jit
def evictable(engine: Engine, count: int) -> int:
    """How many of the blocks just found are in the free queue, so that using them takes free blocks."""
    table = block_table(engine, ints(engine.rows_at)[engine.rows_free - 1])
    free = 0
    for j in range(count):
        if block_at(engine.blocks_at, table[j]).refs == 0:
            free += 1
    return free


@jit
def adopt_prefix(s: State, engine: Engine, r: int, count: int) -> None:
    """Give the request its row of the block table and a reference to each block found in the cache."""
    request = request_at(s.requests_at, r)
    engine.rows_free -= 1
    request.row = ints(engine.rows_at)[engine.rows_free]
    request.cached = count
    request.findable = findable_blocks(s, r, engine.block_size)
    engine.findable += request.findable > 0
    table = block_table(engine, request.row)
    for j in range(count):
        touch_block(engine, table[j])


@jit
def cache_blocks(s: State, engine: Engine, r: int, first: int, last: int) -> None:
    """Enter full blocks ``first`` to ``last - 1`` of a request into the prefix cache, private ones apart."""
    request = request_at(s.requests_at, r)
    table = block_table(engine, request.row)
    for j in range(first, min(last, request.findable)):
        table[j] = insert_block(engine, own_hash(s, r, j, engine.block_size))


@jit
def cache_known(s: State, engine: Engine, r: int, tokens: int) -> None:
    """Scheduling ahead: cache what is full of the first ``tokens`` tokens, whose values are known."""
    request = request_at(s.requests_at, r)
    full = tokens // engine.block_size
    if full > request.cached:
        cache_blocks(s, engine, r, request.cached, full)
        request.cached = full


@jit
def grow(s: State, engine: Engine, r: int, computed: int, tokens: int) -> bool:
    """Allocate blocks so that ``computed + tokens`` tokens have a slot, and cache those that become full.

    Returns:
        False, with nothing changed, if there are too few free blocks.
    """
    size = engine.block_size
    have = (computed + size - 1) // size
    want = (computed + tokens + size - 1) // size
    if want - have > engine.free_blocks:
        return False
    if not engine.prefix_caching:
        engine.free_blocks -= want - have
        return True
    take_blocks(engine, want - have)
    if engine.ahead:
        # A block with a token that is in flight has no hash yet.
        flying = in_flight(engine, request_at(s.requests_at, r))
        cache_known(s, engine, r, computed if flying else computed + tokens)
    else:
        cache_blocks(s, engine, r, computed // size, (computed + tokens) // size)
    return True


@jit
def release(s: State, engine: Engine, r: int, computed: int, preempted: bool) -> None:
    """Free the blocks of a request that has ``computed`` tokens in the cache, last block first."""
    size = engine.block_size
    count = (computed + size - 1) // size
    if not engine.prefix_caching:
        engine.free_blocks += count
        return
    request = request_at(s.requests_at, r)
    full = request.cached if engine.ahead else computed // size
    findable = min(full, request.findable)
    engine.unhashed += count - full
    engine.free_blocks += count - full
    table = block_table(engine, request.row)
    if preempted:
        for j in range(full - 1, findable - 1, -1):
            table[j] = insert_block(engine, own_hash(s, r, j, size))
        findable = full
    _append_private(engine, full - findable)
    for j in range(findable - 1, -1, -1):
        record = block_at(engine.blocks_at, table[j])
        record.refs -= 1
        if record.refs == 0:
            _append(engine, table[j] | PUBLIC)
            engine.free_blocks += 1
    ints(engine.rows_at)[engine.rows_free] = request.row
    engine.rows_free += 1
    engine.findable -= request.findable > 0
    request.row = NONE
