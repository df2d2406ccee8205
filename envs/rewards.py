"""Exact rewards: integrals over time of what the objective counts, taken event by event.

The sum over requests of TTFT is the integral over time of the number of requests without first token, that of E2E the
integral of the number of requests in flight, and that of TPOT the integral of ``1 / (output - 1)`` summed over decoding
requests. The kernel extends these integrals at each change of a count, so that the undiscounted return of an episode
equals the metric of its finished requests to rounding (BASELINES: Park's load-balancing environment does this for E2E).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from servegym.configuration import Config

Weight = Annotated[float, Field(ge=0)]

PARTS = ("ttft", "e2e", "tpot")


class RewardConfig(Config):
    """Weights of the parts of the reward; each part is the negated integral since the last decision, in seconds.

    With a reference policy the reference's integral over the same span, on the same requests, is subtracted: a baseline
    that depends on the arrivals alone, which removes most of the variance and none of the gradient.
    """

    ttft: Weight = Field(default=1.0, description="weight of summed TTFT, per second")
    e2e: Weight = Field(default=0.0, description="weight of summed E2E latency, per second")
    tpot: Weight = Field(default=0.0, description="weight of summed TPOT, per second")
    scale_s: Annotated[float, Field(gt=0)] = Field(default=1.0, description="seconds that make a reward of one")

    def weights(self) -> npt.NDArray[np.float64]:
        """Return the weights in the order of :data:`PARTS`, divided by the scale. Shape (3,)."""
        return np.array([self.ttft, self.e2e, self.tpot]) / self.scale_s
