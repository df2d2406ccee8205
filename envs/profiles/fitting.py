"""Least squares on relative errors, for step times that span four orders of magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from servegym.envs.profiles.profile import TokenCurve

FloatArray = npt.NDArray[np.float64]
_TOLERANCE = 1e-10


@dataclass(frozen=True, slots=True)
class FitQuality:
    """Relative errors of a fit against what it was fitted to.

    Attributes:
        points: number of values compared.
        median: median of ``|fitted / measured - 1|``.
        worst: the largest of them.
    """

    points: int
    median: float
    worst: float

    @classmethod
    def of(cls, fitted: FloatArray, measured: FloatArray) -> FitQuality:
        """Compare two arrays of one shape.

        >>> str(FitQuality.of(np.array([1.1, 2.0, 3.0]), np.array([1.0, 2.0, 3.0])))
        '3 points, error median 0.0 %, worst 10.0 %'
        """
        error = np.abs(fitted / measured - 1)
        return cls(error.size, float(np.median(error)), float(error.max()))

    def __str__(self) -> str:
        return f"{self.points} points, error median {100 * self.median:.1f} %, worst {100 * self.worst:.1f} %"


def fit_relative(columns: FloatArray, values: FloatArray, unit: FloatArray | None = None) -> FloatArray:
    """Return the non-negative coefficients with the least squared error of ``columns @ coefficients``.

    By the active sets of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23), without scipy. Dropping
    the most negative coefficient once and for all can end far off where terms are alike.

    Args:
        columns: shape (points, coefficients).
        values: positive values, shape (points,).
        unit: in which the error of each point counts, same shape; default: its value, for the relative error.

    >>> fit_relative(np.array([[1.0, 1], [1, 2], [1, 3]]), np.array([5.0, 7, 9])).round(6).tolist()
    [3.0, 2.0]
    """
    unit = values if unit is None else unit
    scaled = columns / unit[:, None]
    size = np.linalg.norm(scaled, axis=0)
    size = np.where(size > 0, size, 1.0)
    scaled, target = scaled / size, values / unit
    enough = _TOLERANCE * np.linalg.norm(target)
    free = np.zeros(len(size), dtype=bool)
    found = np.zeros(len(size))
    for _ in range(10 * len(size)):
        gradient = np.where(free, -np.inf, scaled.T @ (target - scaled @ found))
        best = int(gradient.argmax())
        if gradient[best] <= enough:
            break
        free[best] = True
        while free.any():
            trial = np.zeros(len(size))
            trial[free] = np.linalg.lstsq(scaled[:, free], target, rcond=None)[0]
            bad = free & (trial <= 0)
            if not bad.any():
                found = trial
                break
            # As far towards the solution as nothing turns negative; what arrives at 0 stays there.
            share = (found[bad] / np.maximum(found[bad] - trial[bad], 1e-300)).min()
            found = found + share * (trial - found)
            free &= found > _TOLERANCE
            found[~free] = 0.0
    return found / size


def fit_curve(tokens: FloatArray, us: FloatArray, knots: npt.NDArray[np.int64]) -> FloatArray:
    """Fit a non-decreasing piecewise linear curve to scattered costs.

    Args:
        tokens: where the cost is known, shape (points,), within the knots.
        us: cost there, positive, same shape.
        knots: support points of the curve, increasing, shape (knots,); each needs a point in an adjacent interval.

    Returns:
        The cost at the knots, shape (knots,).

    >>> fit_curve(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 3, 4]), np.array([1, 4])).round(6).tolist()
    [1.0, 4.0]
    """
    hats = np.stack([np.interp(tokens, knots, unit) for unit in np.eye(len(knots))], axis=1)
    return np.maximum.accumulate(fit_relative(hats, us))


def token_curve(tokens: FloatArray, us: FloatArray, knots: Sequence[int]) -> TokenCurve:
    """Return :func:`fit_curve` as a section of a profile."""
    fitted = fit_curve(tokens, us, np.array(knots))
    return TokenCurve(tokens=tuple(knots), us=tuple(significant(value) for value in fitted))


def significant(value: float, digits: int = 4) -> float:
    """Round to a number of significant digits, as the shipped files hold.

    >>> significant(0.00123456)
    0.001235
    """
    return float(f"{value:.{digits}g}")
