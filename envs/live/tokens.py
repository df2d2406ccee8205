"""Token values for requests that a workload describes by lengths and by what they share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from servegym.envs.workloads.table import RequestTable

_TEMPLATE, _STREAM, _BLOCK = 1, 2, 3


def prompt_tokens(table: RequestTable, r: int, vocabulary: int, salt: int = 0) -> npt.NDArray[np.int64]:
    """Return the prompt of a request, shape (prompt_tokens,): equal identities give equal tokens, others random ones.

    Token ``p`` depends on its template, else on its block of the trace, else on its stream, and on ``p``, as
    :class:`~servegym.envs.workloads.table.RequestTable` says. A follow-up turn repeats the *planned* output of the turn
    before; what a live model said in its place is another text, so that its KV blocks are found up to that point only.

    Args:
        table: the requests.
        r: which one.
        vocabulary: token ids are below this number.
        salt: another number, other tokens throughout.
    """
    length = int(table.prompt_tokens[r])
    position = np.arange(length, dtype=np.uint64)
    kind = np.full(length, _STREAM, dtype=np.uint64)
    key = np.full(length, np.int64(table.stream[r])).view(np.uint64)
    if table.prefix_block_tokens:
        ids = table.prefix_ids[table.prefix_start[r] : table.prefix_start[r + 1]]
        blocks = np.repeat(ids, table.prefix_block_tokens)[:length]
        kind[: len(blocks)], key[: len(blocks)] = _BLOCK, blocks.view(np.uint64)
    shared = min(int(table.template_tokens[r]), length)
    if table.template[r] >= 0 and shared:
        kind[:shared], key[:shared] = _TEMPLATE, np.uint64(table.template[r])
    salted = _mix(key, kind + np.uint64(4 * (salt % 2**60)))
    return np.asarray(_mix(salted, position) % np.uint64(vocabulary), dtype=np.int64)


def _mix(a: npt.NDArray[np.uint64], b: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64 of two numbers."""
    z = a * np.uint64(0x9E3779B97F4A7C15) + (b + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))
