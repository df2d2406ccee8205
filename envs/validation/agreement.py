"""How well two rankings of the same policies agree, and how far two runs of the same requests lie apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]


def ranks(values: npt.ArrayLike) -> Float:
    """Return the rank of each value, from 1; equal values share their mean rank.

    >>> ranks([3.0, 1.0, 3.0]).tolist()
    [2.5, 1.0, 2.5]
    """
    _, group, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[group])


def spearman(left: npt.ArrayLike, right: npt.ArrayLike) -> float:
    """Return Spearman's rank correlation; NaN where all values of a side are equal.

    >>> round(spearman([1, 2, 3], [10, 30, 20]), 6)
    0.5
    """
    a, b = ranks(left), ranks(right)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / size) if size > 0 else float("nan")


def kendall(left: npt.ArrayLike, right: npt.ArrayLike) -> float:
    """Return Kendall's tau-b, the share of pairs in the same order less that of pairs in the other, ties accounted for.

    >>> round(kendall([1, 2, 3], [10, 30, 20]), 6)
    0.333333
    """
    a, b = (np.asarray(values, dtype=np.float64) for values in (left, right))
    i, j = np.triu_indices(len(a), 1)
    one, other = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
    size = float(np.sqrt(np.abs(one).sum() * np.abs(other).sum()))
    return float((one * other).sum() / size) if size > 0 else float("nan")


@dataclass(frozen=True, slots=True)
class QueueLengths:
    """Requests that have been sent and have no token yet, as mean over intervals of equal length.

    Attributes:
        time_s: end of each interval, shape (intervals,).
        length: mean number of such requests, same shape.
    """

    time_s: Float
    length: Float

    @classmethod
    def of(cls, sent_s: Float, first_s: Float, every_s: float, until_s: float) -> QueueLengths:
        """Count from what a client knows, so that live and simulated runs are measured by one rule.

        Args:
            sent_s: when each request was sent, shape (requests,); NaN: never.
            first_s: when its first token came, same shape; NaN: never.
            every_s: length of an interval.
            until_s: end of the last one, rounded up.

        >>> QueueLengths.of(np.array([0.0]), np.array([0.5]), 1.0, 2.0).length.tolist()
        [0.5, 0.0]
        """
        edges = np.arange(int(np.ceil(until_s / every_s)) + 1, dtype=np.float64) * every_s
        known = np.isfinite(sent_s)
        begin, end = sent_s[known], np.nan_to_num(first_s[known], nan=np.inf)
        inside = np.minimum(end[:, None], edges[1:]) - np.maximum(begin[:, None], edges[:-1])
        return cls(edges[1:], np.asarray(np.maximum(inside, 0.0).sum(axis=0) / every_s, dtype=np.float64))

    def error(self, measured: QueueLengths) -> float:
        """Return the mean absolute difference to a measured course over that course's mean length."""
        count = max(len(self.length), len(measured.length))
        mine, theirs = (np.pad(q.length, (0, count - len(q.length))) for q in (self, measured))
        return float(np.abs(mine - theirs).mean() / max(float(theirs.mean()), 1e-9))
