"""Exact rewards: integrals over time of what the objective counts, never sampled.

The sum over requests of TTFT is the integral over time of the number of requests without first token, that of E2E the
integral of the number of requests in flight, and that of TPOT the integral of ``1 / (output - 1)`` summed over decoding
requests. The kernel extends these integrals at each change of a count, so that the undiscounted return of an episode
equals the metric of its finished requests to rounding (Park's load-balancing environment, NeurIPS 2019, does this for
E2E). The other parts are functions of how long each request has waited for its first token, taken in closed form:
``sum_i w_i max(0, min(t, first_i) - arrival_i - d_i)`` up to time ``t``, whose growth from one decision to the next is
the reward.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from servegym.baselines.interface import FloatArray
from servegym.compilation import compiled
from servegym.configuration import Config
from servegym.envs.backend import ServingRun
from servegym.envs.simulator.cluster import SimulatedCluster

Weight = Annotated[float, Field(ge=0)]

PARTS = ("ttft", "e2e", "tpot", "slowdown", "tardiness", "violations", "tail")
KERNEL_PARTS = 3
"""How many of them the kernel integrates, the first ones."""


class RewardConfig(Config):
    """Weights of the parts of the reward; each part is the negated growth of its sum since the last decision.

    With a reference policy the reference's growth over the same span, on the same requests, is subtracted: a baseline
    that depends on the arrivals alone, which removes most of the variance and none of the gradient.
    """

    ttft: Weight = Field(default=1.0, description="weight of summed TTFT, per second")
    e2e: Weight = Field(default=0.0, description="weight of summed E2E latency, per second")
    tpot: Weight = Field(default=0.0, description="weight of summed TPOT, per second")
    slowdown: Weight = Field(
        default=0.0, description="weight of summed TTFT over that of the prompt alone on the fastest engine"
    )
    tardiness: Weight = Field(
        default=0.0, description="weight of summed TTFT beyond the requests' deadlines, per second"
    )
    violations: Weight = Field(default=0.0, description="weight of a missed deadline, at the moment it is missed")
    tail: Weight = Field(
        default=0.0,
        description="weight of summed TTFT beyond tail_s, over 1 - tail_quantile, per second: CVaR of TTFT where tail_s"
        " is its quantile",
    )
    tail_quantile: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.95, description="quantile of TTFT at which the tail begins"
    )
    tail_s: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="where the tail begins; default: at the quantile of the reference's TTFT"
    )
    scale_s: Annotated[float, Field(gt=0)] | Literal["reference"] = Field(
        default=1.0,
        description="seconds that make a reward of one; reference: the mean TTFT of the reference in the episode, so"
        " that seconds count the less the more of them there are",
    )

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        if not self.weights().any():
            raise ValueError(f"a weight above 0 for one of {', '.join(PARTS)}")
        return self

    def weights(self) -> FloatArray:
        """Return the weights in the order of :data:`PARTS`, shape (parts,)."""
        return np.array([getattr(self, part) for part in PARTS])

    def scale(self, reference_ttft_s: float) -> float:
        """Return the seconds that make a reward of one in an episode.

        Args:
            reference_ttft_s: mean TTFT of the reference in that episode.
        """
        return reference_ttft_s if self.scale_s == "reference" else self.scale_s


class RewardMeter:
    """Takes the rewards of one episode from its run, part by part.

    Args:
        config: the weights.
        run: the episode's run, at its start. What happens before the first decision enters the first reward, so that
            the undiscounted return is the metric.
        reference: a finished run of another policy on the same requests; with recorded totals (open-loop tables only)
            where rewards are taken by arrivals.

    The arrays are written in place: lanes of the kernel (:mod:`.simulator.kernel.lanes`) take rewards with them too.

    Attributes:
        weights: by part, shape (parts,).
        seen: sums up to the last call, shape (parts,).
        reference_seen: the same of the reference.
        reference_sums: the reference's kernel parts by request, and at its end, shape (requests + 1, 3); None without.
        now: time up to which rewards were taken, seconds, shape (1,).
        of_kernel: whether no part but the kernel's has a weight.
    """

    def __init__(self, config: RewardConfig, run: ServingRun, reference: SimulatedCluster | None = None) -> None:
        self.now = np.zeros(1)
        self._run = run
        self.weights = config.weights() / config.scale(_mean_ttft_s(reference))
        self.seen, self.reference_seen = np.zeros(len(PARTS)), np.zeros(len(PARTS))
        self.reference_sums: FloatArray | None = None
        self.of_kernel = not self.weights[KERNEL_PARTS:].any()
        self._waiting = None
        self._reference: npt.NDArray[Any] | None = None  # its records alone: its engines' memory serves other runs
        self._reference_at: _Totals | None = None
        if not self.of_kernel:
            self._waiting = _Waiting.of(config, run, reference)
        if reference is not None:
            self._reference = reference.memory.requests
            self.reference_sums = np.vstack([reference.memory.totals, reference.totals])

    @property
    def now_s(self) -> float:
        """Time up to which rewards were taken."""
        return float(self.now[0])

    def take(self, row: int | None = None, until_s: float | None = None) -> FloatArray:
        """Return the weighted parts since the last call, shape (parts,).

        With a reference, the span that counts of it ends at the arrival of ``row``, which the pending decision is, or
        at ``until_s``, or, at the end of an episode, with its run.

        Args:
            row: a request.
            until_s: a time.
        """
        self.now[0] = max(self._run.decided_s, self.now_s)
        sums = self._sums(self._run.totals, self._run.memory.requests, self.now_s)
        gained = sums - self.seen
        self.seen[:] = sums
        if self._reference is not None:
            assert self.reference_sums is not None
            requests = self._reference
            if until_s is not None:
                if self._reference_at is None:
                    self._reference_at = _Totals(requests)
                sums = self._sums(self._reference_at(until_s), requests, until_s)
            else:
                until = np.inf if row is None else float(requests["arrival_s"][row])
                sums = self._sums(self.reference_sums[-1 if row is None else row], requests, until)
            gained -= sums - self.reference_seen
            self.reference_seen[:] = sums
        return np.asarray(-self.weights * gained)

    def _sums(self, kernel: FloatArray, requests: npt.NDArray[Any], until_s: float) -> FloatArray:
        sums = np.zeros(len(PARTS))
        sums[:KERNEL_PARTS] = kernel
        if self._waiting is not None:
            sums[KERNEL_PARTS:] = self._waiting.sums(requests, until_s)
        return sums


def _mean_ttft_s(reference: SimulatedCluster | None) -> float:
    if reference is None:
        return float("nan")
    requests = reference.memory.requests
    return float(np.nanmean(requests["first_s"] - requests["arrival_s"]))


class _Totals:
    """The kernel's integrals of a finished run at any time, in closed form.

    Each is a sum over requests of ``w (min(t, end) - start)``, which is the difference of two sums of ramps
    ``w max(0, t - start)``; sorted starts and cumulative weights give a sum of ramps in logarithmic time.

    Args:
        requests: records of the run.
    """

    def __init__(self, requests: npt.NDArray[Any]) -> None:
        one = np.ones(len(requests))
        gaps = requests["output"] - 1
        rate = np.where(gaps > 0, 1.0 / np.maximum(gaps, 1), 0.0)
        ends = [np.nan_to_num(requests[name], nan=np.inf) for name in ("arrival_s", "first_s", "finish_s")]
        ramps = [(ends[0], one), (ends[1], one), (ends[2], one), (ends[1], rate), (ends[2], rate)]
        orders = [np.argsort(starts, kind="stable") for starts, _ in ramps]
        self._starts = np.stack([starts[order] for (starts, _), order in zip(ramps, orders, strict=True)])
        weights = np.stack([weight[order] for (_, weight), order in zip(ramps, orders, strict=True)])
        finite = np.where(np.isfinite(self._starts), self._starts, 0.0)  # what has no end is never reached
        self._weights = np.cumsum(weights, axis=1)
        self._moments = np.cumsum(weights * finite, axis=1)

    def __call__(self, until_s: float) -> FloatArray:
        """Return the integrals of TTFT, E2E and TPOT, shape (3,)."""
        arrival, first, finish, decoding, decoded = _ramp_sums(self._starts, self._weights, self._moments, until_s)
        return np.array([arrival - first, arrival - finish, decoding - decoded])


@compiled
def _ramp_sums(starts: FloatArray, weights: FloatArray, moments: FloatArray, until: float) -> FloatArray:
    sums = np.zeros(len(starts))
    for k in range(len(starts)):
        count = np.searchsorted(starts[k], until)
        if count > 0:
            sums[k] = weights[k, count - 1] * until - moments[k, count - 1]
    return sums


class _Waiting:
    """The parts that depend on how long each request has waited for its first token.

    Args:
        weights: of the waits beyond the thresholds, of their number for violations, shape (4, requests).
        thresholds: waits that are free, seconds, same shape.
        parent: the turn before each, -1 for none, shape (requests,).
    """

    def __init__(self, weights: FloatArray, thresholds: FloatArray, parent: npt.NDArray[np.int32]) -> None:
        self._weights = weights
        self._thresholds = thresholds
        self._parent = parent

    @classmethod
    def of(cls, config: RewardConfig, run: ServingRun, reference: SimulatedCluster | None) -> _Waiting:
        engines, table = run.memory.engines, run.table
        alone = table.prompt_tokens / engines["prefill_tokens_per_s"].max() + engines["decode_step_s"].min()
        tail_s = config.tail_s
        if tail_s is None:
            tail_s = np.inf
            if reference is not None:
                requests = reference.memory.requests
                tail_s = float(np.nanquantile(requests["first_s"] - requests["arrival_s"], config.tail_quantile))
        one = np.ones(len(table))
        weights = np.stack([1.0 / alone, one, one, one / (1.0 - config.tail_quantile)])
        thresholds = np.stack([0.0 * one, table.deadline_s, table.deadline_s, tail_s * one])
        return cls(weights, thresholds, table.parent)

    def sums(self, requests: npt.NDArray[Any], until_s: float) -> FloatArray:
        """Return the sums up to a time, shape (4,)."""
        sums = np.zeros(4)
        _add_waits(
            requests["arrival_s"],
            requests["first_s"],
            requests["finish_s"],
            self._parent,
            self._weights,
            self._thresholds,
            until_s,
            sums,
        )
        return sums


@compiled
def _add_waits(
    arrival: FloatArray,
    first: FloatArray,
    finish: FloatArray,
    parent: npt.NDArray[np.int32],
    weights: FloatArray,
    thresholds: FloatArray,
    until: float,
    out: FloatArray,
) -> None:
    for i in range(len(arrival)):
        if arrival[i] > until or (parent[i] >= 0 and np.isnan(finish[parent[i]])):
            continue
        end = until if np.isnan(first[i]) else min(first[i], until)
        for k in range(4):
            late = end - arrival[i] - thresholds[k, i]
            if late > 0.0:
                out[k] += weights[k, i] * (1.0 if k == 2 else late)
