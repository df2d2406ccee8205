"""Keyed draws and consistent hashing, compiled so that both forms of a policy give the same numbers."""

from __future__ import annotations

import math

import numpy as np

from servegym.baselines.interface import R_INDEX, R_PREFIX_KEY, R_SESSION, R_USER, FloatArray
from servegym.compilation import compiled


@compiled
def keyed_uniform(key: int, salt: int) -> float:
    """Return a number in (0, 1) that depends on a key and a salt alone (splitmix64)."""
    z = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt) * np.uint64(0xD1B54A32D192ED03)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (np.float64(z >> np.uint64(12)) + 0.5) * 2.0**-52


@compiled
def keyed_normal(key: int, salt: int) -> float:
    """Return a standard normal draw that depends on a key and a salt alone (Box and Muller)."""
    radius = math.sqrt(-2.0 * math.log(keyed_uniform(key, 2 * salt)))
    return radius * math.cos(2.0 * math.pi * keyed_uniform(key, 2 * salt + 1))


@compiled
def affinity_key(request: FloatArray) -> int:
    """Return what a request has in common with others: its prefix, else its session, else its user, else nothing.

    Args:
        request: row of ``R_*`` entries, shape (REQUEST_COLUMNS,).
    """
    if request[R_PREFIX_KEY] > 0.0:
        return 4 * int(request[R_PREFIX_KEY])
    if request[R_SESSION] >= 0.0:
        return 4 * int(request[R_SESSION]) + 1
    if request[R_USER] >= 0.0:
        return 4 * int(request[R_USER]) + 2
    return 4 * int(request[R_INDEX]) + 3
