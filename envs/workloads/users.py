"""Who sends a request and what is promised: users, priorities, deadlines, and a predictor of output lengths."""

from __future__ import annotations

import numpy as np
from pydantic import Field, field_validator

from servegym.configuration import Config
from servegym.envs.workloads.distributions import (
    Float,
    Int32,
    NonNegative,
    Positive,
    PositiveInt,
    choose,
    zipf_weights,
)


class Users(Config):
    """Users by popularity: user ``k`` (from 0) has the share ``(k + 1) ** -zipf_exponent`` of the sessions."""

    count: PositiveInt = Field(description="number of users")
    zipf_exponent: NonNegative = Field(default=1.0, description="0: all alike; larger: fewer users send most")

    def sample(self, rng: np.random.Generator, count: int) -> Int32:
        """Draw user ids, shape (count,)."""
        return choose(zipf_weights(self.count, self.zipf_exponent), rng, count).astype(np.int32)


class Priorities(Config):
    """Priority classes by share of the sessions; smaller runs first, as in vLLM."""

    shares: dict[int, Positive] = Field(description="priority: share; only the ratios count")

    @field_validator("shares")
    @classmethod
    def _some(cls, shares: dict[int, float]) -> dict[int, float]:
        if not shares:
            raise ValueError("at least one priority class")
        return shares

    def sample(self, rng: np.random.Generator, count: int) -> Int32:
        """Draw priorities, shape (count,)."""
        classes = np.array(list(self.shares), dtype=np.int32)
        return classes[choose(list(self.shares.values()), rng, count)]


class Deadline(Config):
    """Time by which the first token is due: ``base_s + per_1k_prompt_tokens_s * prompt_tokens / 1000``."""

    base_s: Positive = Field(description="seconds for any prompt")
    per_1k_prompt_tokens_s: NonNegative = Field(default=0.0, description="seconds more per thousand prompt tokens")

    def of(self, prompt_tokens: Int32) -> Float:
        """Return the deadlines in seconds after arrival, shape as ``prompt_tokens``."""
        return np.asarray(self.base_s + self.per_1k_prompt_tokens_s * prompt_tokens / 1000.0)


class Prediction(Config):
    """A predictor of output lengths with lognormal error: ``output_tokens * exp(sigma * z)``, ``z`` standard normal.

    The median prediction is right, and ``sigma`` 0 is an oracle.
    """

    sigma: NonNegative = Field(description="standard deviation of the logarithm of the error; 0: exact")

    def sample(self, output_tokens: Int32, rng: np.random.Generator) -> Float:
        """Draw predictions, shape as ``output_tokens``."""
        return np.asarray(output_tokens * np.exp(self.sigma * rng.standard_normal(len(output_tokens))))
