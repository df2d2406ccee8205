"""Statistics of paired evaluations, in plain numpy.

Policies are compared on the same requests: a pair is one workload, load and seed. The primary statistic of a metric is
the ratio policy / baseline, averaged over seeds as a logarithm, with Student's t interval: with some five seeds a
percentile bootstrap covers far less than it claims, since five values have few distinct resamples, while log ratios of
means over thousands of requests are close to normal. The bootstrap serves pooled statistics over many cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]

# Two-sided 95 % quantiles of Student's t by degrees of freedom, from 1; the normal quantile beyond.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval; the ends are NaN where one value cannot tell."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def t_quantile(degrees: int) -> float:
    """Return the two-sided 95 % quantile of Student's t distribution.

    >>> t_quantile(4)
    2.776
    """
    return _T95[degrees - 1] if degrees <= len(_T95) else 1.96 + 2.4 / degrees


def mean_interval(values: npt.ArrayLike) -> Interval:
    """Mean over seeds with Student's t interval.

    >>> mean_interval([1.0, 2.0, 3.0]).value
    2.0
    """
    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if len(data) < 2:
        return Interval(mean, np.nan, np.nan)
    half = t_quantile(len(data) - 1) * float(data.std(ddof=1)) / np.sqrt(len(data))
    return Interval(mean, mean - half, mean + half)


def relative_difference(policy: npt.ArrayLike, baseline: npt.ArrayLike) -> Interval:
    """Paired relative difference ``policy / baseline - 1`` with its 95 % interval.

    Args:
        policy: positive values of one metric, shape (seeds,).
        baseline: the values that they are paired with, shape (seeds,).

    >>> relative_difference([1.1, 2.2], [1.0, 2.0]).value.__round__(3)
    0.1
    """
    logs = np.log(np.asarray(policy, dtype=np.float64)) - np.log(np.asarray(baseline, dtype=np.float64))
    interval = mean_interval(logs)
    value, low, high = np.expm1([interval.value, interval.low, interval.high]).tolist()
    return Interval(value, low, high)


def interquartile_mean(values: npt.ArrayLike) -> float:
    """Mean of the middle half of all values (Agarwal et al. 2021, as in rliable).

    >>> interquartile_mean([0.0, 1.0, 2.0, 100.0])
    1.5
    """
    data = np.sort(np.ravel(np.asarray(values, dtype=np.float64)))
    cut = len(data) // 4
    return float(data[cut : len(data) - cut].mean())


def stratified_bootstrap(
    strata: Sequence[npt.ArrayLike],
    statistic: Callable[[list[Float]], float],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap that resamples seeds within each cell.

    Args:
        strata: the values of each cell.
        statistic: of a list of such arrays.
        resamples: number of resamples.
        seed: seed of the resampling.
    """
    data = [np.asarray(stratum, dtype=np.float64) for stratum in strata]
    rng = np.random.default_rng(seed)
    draws = [statistic([cell[rng.integers(len(cell), size=len(cell))] for cell in data]) for _ in range(resamples)]
    low, high = np.quantile(draws, (0.025, 0.975)).tolist()
    return Interval(statistic(data), low, high)


def probability_of_improvement(policy: Sequence[npt.ArrayLike], baseline: Sequence[npt.ArrayLike]) -> float:
    """Probability that the policy's value is lower than the baseline's, averaged over cells; ties count half.

    >>> probability_of_improvement([[1.0, 2.0]], [[3.0, 2.0]])
    0.875
    """
    shares = []
    for mine, other in zip(policy, baseline, strict=True):
        gaps = np.subtract.outer(np.asarray(other, dtype=np.float64), np.asarray(mine, dtype=np.float64))
        shares.append(float((gaps > 0).mean() + 0.5 * (gaps == 0).mean()))
    return float(np.mean(shares))
