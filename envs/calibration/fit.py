"""From measured steps to the terms of a profile, with their uncertainty.

The terms are those of :class:`~servegym.envs.profiles.profile.StepTime`, fitted by least squares on relative errors
with coefficients of at least 0. The curve over tokens is piecewise linear and never falls; its value at 0 is part of
the fixed term, as no step without tokens was ever measured. A measurement through HTTP alone sees the first token of a
request after the frontend's delay too, which is one more term.

Steps of traffic enter as windows of some consecutive ones: what a request costs beside its own prefill (its arrival at
the engine, its first tokens, its end) falls on the steps around it, so that only their sum has what a profile promises.
They say how long steps take in service, some percent longer than alone where caches are shared; the points of the
design say how that divides into terms.

What disturbs a step disturbs its neighbours: those of a cell (one point in one round) come within a second or so. So a
cell of many steps counts little more than one of a single step, the weights of a random-effects model; else some
hundred decode steps would drown the five prefills of a length. For the same reason intervals are percentiles of a
bootstrap over cells.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from servegym.envs.profiles.fitting import FitQuality, FloatArray, fit_relative, significant
from servegym.envs.profiles.profile import StepTime, TokenCurve

# A second token activates other experts than the first; later ones ever fewer new ones.
_KNOTS = (2, 16, 128, 512)
_RESAMPLES = 200
_CONFIDENCE = 0.95
_CORRELATED = 0.9
STRAGGLER = 2.0
"""A step that takes this many times its usual duration was disturbed by something else."""
_TRIMMED = 0.5
# Share of the variance around the fit that the steps of a cell have in common. On a CPU engine, 0.1 to 1 gave nearly
# the same terms.
_SHARED = 0.5


@dataclass(frozen=True, slots=True)
class Sample:
    """Steps of one composition, measured together.

    Attributes:
        point: name of the point of the design.
        round: repetition.
        sequences, prefill_tokens, prefill_pairs, decodes, context_tokens: what the step computes.
        us: its duration, microseconds.
        first_token: whether ``us`` is the time to the first token of a request alone, as a client sees it.
        prior_tokens: context of the prefill chunks before them.
        window: of the same point and round, steps with the same number count together; None: alone.
    """

    point: str
    round: int
    sequences: float
    prefill_tokens: float
    prefill_pairs: float
    decodes: float
    context_tokens: float
    us: float
    first_token: bool = False
    prior_tokens: float = 0.0
    window: int | None = None

    @property
    def kind(self) -> str:
        """What the step, or the window, is made of."""
        if self.window is not None:
            return "traffic"
        if self.prefill_tokens:
            return "mixed" if self.decodes else "prefill"
        return "decode"

    @property
    def tokens(self) -> float:
        """All tokens of the step."""
        return self.prefill_tokens + self.decodes


@dataclass(frozen=True, slots=True)
class Term:
    """A fitted coefficient in microseconds per unit, with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether the interval excludes 0 and is narrower than the value on either side."""
        return self.value > 0 and self.low > 0 and self.high - self.low < 2 * self.value


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted step time.

    Attributes:
        step_time: for a profile.
        terms: coefficients with their intervals.
        rows: what was fitted: samples, of a window its first step with the time of all.
        fitted_us: of each row, shape (rows,), the frontend's delay included where a client measured it.
        quality: relative errors by kind of point.
        noise: robust coefficient of variation of a step around the fit.
        stragglers: share of samples that took more than twice the fit.
        levels: time of all steps of each round over what the fit says of them. A run that lasts as long as a round
            cannot be predicted better than these lie apart: that is the machine's doing, not the model's.
        unidentified: what the measurements do not tell, one sentence each.
    """

    step_time: StepTime
    terms: tuple[Term, ...]
    rows: tuple[Sample, ...]
    fitted_us: FloatArray
    quality: dict[str, FitQuality]
    noise: float
    stragglers: float
    levels: tuple[float, ...]
    unidentified: tuple[str, ...]

    @property
    def drift(self) -> float | None:
        """Standard deviation of the levels of rounds; None for a single one."""
        return float(np.std(self.levels, ddof=1)) if len(self.levels) > 1 else None

    def term(self, name: str) -> Term | None:
        """Return a coefficient; None if there was nothing to tell it from."""
        return next((term for term in self.terms if term.name == name), None)

    def report(self) -> dict[str, Any]:
        """Return the fit as plain data."""
        return {
            "terms": {t.name: {"us": t.value, "low": t.low, "high": t.high, "known": t.known} for t in self.terms},
            "residuals": {
                name: {"points": q.points, "median": q.median, "worst": q.worst} for name, q in self.quality.items()
            },
            "noise": self.noise,
            "stragglers": self.stragglers,
            "levels": list(self.levels),
            "drift": self.drift,
            "unidentified": list(self.unidentified),
        }


def fit_steps(samples: Sequence[Sample], seed: int = 0) -> Fit:
    """Fit the terms of a step time.

    Args:
        samples: of at least two different numbers of tokens.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer samples than terms.
    """
    top = int(max(sample.tokens for sample in samples))
    knots = np.array([0, *(knot for knot in _KNOTS if knot < top / 2), top])
    names, columns = _columns(samples, knots)
    if len(samples) < len(names):
        raise ValueError(f"{len(samples)} measured steps for {len(names)} terms")
    present = [j for j in range(len(names)) if np.ptp(columns[:, j]) > 0 or names[j] == "fixed"]
    names, columns = [names[j] for j in present], columns[:, present]
    rows, columns = _windows(samples, columns)
    us = np.array([row.us for row in rows])
    kept = _usual(columns, us)
    # Relative to what is fitted rather than to what was measured: else short steps would count more than long ones.
    unit = columns @ fit_relative(columns[kept], us[kept], us[kept]) / _weights(rows)
    coefficients = fit_relative(columns[kept], us[kept], unit[kept])
    good = [row for row, usual in zip(rows, kept, strict=True) if usual]
    resampled = _bootstrap(good, columns[kept], us[kept], unit[kept], seed)
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(resampled, [tail, 100 - tail], axis=0)
    terms = tuple(
        Term(name, float(value), float(down), float(up))
        for name, value, down, up in zip(names, coefficients, low, high, strict=True)
    )
    fitted = columns @ coefficients
    ratio = us / fitted
    deviation = ratio / np.median(ratio) - 1
    return Fit(
        step_time=_step_time(dict(zip(names, coefficients, strict=True)), knots),
        terms=terms,
        rows=tuple(rows),
        fitted_us=fitted,
        quality=_quality(rows, fitted, us),
        noise=float(1.4826 * np.median(np.abs(deviation))),
        stragglers=float(np.mean(ratio > STRAGGLER)),
        levels=_levels(rows, fitted, us),
        unidentified=tuple(_unidentified(terms, resampled, samples)),
    )


def _columns(samples: Sequence[Sample], knots: npt.NDArray[np.int64]) -> tuple[list[str], FloatArray]:
    tokens = np.array([sample.tokens for sample in samples])
    columns = {
        "fixed": np.ones(len(samples)),
        "per_sequence": np.array([sample.sequences for sample in samples]),
        "prefill_pair": np.array([sample.prefill_pairs for sample in samples]),
        "decode_context": np.array([sample.context_tokens for sample in samples]),
        "frontend": np.array([float(sample.first_token) for sample in samples]),
    }
    # Slopes of the segments: at least 0 each, so that the curve never falls.
    for left, right in itertools.pairwise(knots):
        columns[f"token_{left}_{right}"] = np.clip(tokens - left, 0, right - left)
    return list(columns), np.stack(list(columns.values()), axis=1)


def _windows(samples: Sequence[Sample], columns: FloatArray) -> tuple[list[Sample], FloatArray]:
    """Add up the steps of each window: the rows of the fit, and their columns, shape (rows, terms)."""
    numbers: dict[Any, int] = {}
    keys = [(s.point, s.round, s.window) if s.window is not None else i for i, s in enumerate(samples)]
    row = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    us, summed = np.zeros(len(numbers)), np.zeros((len(numbers), columns.shape[1]))
    np.add.at(us, row, [sample.us for sample in samples])
    np.add.at(summed, row, columns)
    _, first = np.unique(row, return_index=True)
    return [replace(samples[i], us=float(us[row[i]])) for i in first], summed


def _weights(rows: Sequence[Sample]) -> FloatArray:
    """Return what the error of each row counts, shape (rows,): those of one kind in a cell as if correlated."""
    cells = [(row.point, row.round, row.kind) for row in rows]
    sizes = Counter(cells)
    return 1 / np.sqrt(1 + _SHARED * (np.array([sizes[cell] for cell in cells], dtype=np.float64) - 1))


def _usual(columns: FloatArray, us: FloatArray) -> npt.NDArray[np.bool_]:
    """Say which samples are not off by more than half and five robust deviations, shape (samples,)."""
    fitted = columns @ fit_relative(columns, us, us)
    error = np.abs(us / np.maximum(fitted, 1e-9) - 1)
    kept = error <= max(_TRIMMED, 5 * 1.4826 * float(np.median(error)))
    return kept if kept.sum() > columns.shape[1] else np.ones(len(us), dtype=bool)


def _bootstrap(rows: Sequence[Sample], columns: FloatArray, us: FloatArray, unit: FloatArray, seed: int) -> FloatArray:
    cells: dict[tuple[str, int], list[int]] = {}
    for i, row in enumerate(rows):
        cells.setdefault((row.point, row.round), []).append(i)
    rng = np.random.default_rng(seed)
    found = []
    groups = [np.array(rows) for rows in cells.values()]
    for _ in range(_RESAMPLES):
        drawn = np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
        found.append(fit_relative(columns[drawn], us[drawn], unit[drawn]))
    return np.array(found)


def _step_time(found: dict[str, float], knots: npt.NDArray[np.int64]) -> StepTime:
    slopes = [found.get(f"token_{left}_{right}", 0.0) for left, right in itertools.pairwise(knots)]
    heights = np.concatenate([[0.0], np.cumsum(np.array(slopes) * np.diff(knots))])
    # The curve begins at one token: below its first point it would be constant.
    support = (1, *(int(knot) for knot in knots[1:]))
    return StepTime(
        fixed_us=significant(found["fixed"]),
        per_sequence_us=significant(found.get("per_sequence", 0.0)),
        dense_us=TokenCurve(
            tokens=support, us=tuple(significant(float(v)) for v in np.interp(support, knots, heights))
        ),
        prefill_pair_us=significant(found.get("prefill_pair", 0.0)),
        decode_context_us=significant(found.get("decode_context", 0.0)),
    )


def _quality(rows: Sequence[Sample], fitted: FloatArray, us: FloatArray) -> dict[str, FitQuality]:
    """Compare medians over the rounds: what a profile promises is the usual step."""
    cells: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        cells.setdefault((row.kind, row.point), []).append(i)
    ratios: dict[str, list[float]] = {}
    for (kind, _), members in cells.items():
        ratios.setdefault(kind, []).append(float(np.median(fitted[members] / us[members])))
    return {kind: FitQuality.of(np.array(found), np.ones(len(found))) for kind, found in sorted(ratios.items())}


def _levels(rows: Sequence[Sample], fitted: FloatArray, us: FloatArray) -> tuple[float, ...]:
    rounds = np.array([row.round for row in rows])
    return tuple(float(us[rounds == r].sum() / fitted[rounds == r].sum()) for r in np.unique(rounds))


def _unidentified(terms: tuple[Term, ...], resampled: FloatArray, samples: Sequence[Sample]) -> list[str]:
    said = ["dense and MoE layers, and communication, are one curve over tokens: steps alone do not tell them apart"]
    said += [
        f"{term.name}: {term.value:.4g} us, 95 % interval {term.low:.4g} to {term.high:.4g}"
        for term in terms
        if not term.known
    ]
    spread = resampled.std(axis=0)
    for i, left in enumerate(terms):
        for j, right in enumerate(terms[:i]):
            if spread[i] and spread[j]:
                correlation = float(np.corrcoef(resampled[:, i], resampled[:, j])[0, 1])
                if correlation < -_CORRELATED:
                    said.append(
                        f"{right.name} and {left.name} trade against each other (correlation {correlation:.2f})"
                    )
    if not any(sample.prior_tokens for sample in samples):
        said.append("prefill after a prior context: no such step was measured")
    if not any(sample.prefill_tokens and sample.decodes for sample in samples):
        said.append("mixed steps: none was measured")
    return said
