"""Profiles: the step time of one model on one hardware, and the limits of the engine that runs it.

A profile is a YAML file, found by name among the shipped ones (``configs/profiles``) or by path::

    name: my-model-my-gpu
    description: what it is, in one line
    model: owner/model
    hardware: the GPU or CPU
    source: what is measured and where, what is modelled
    engine:                       # EngineLimits: vLLM's settings under vLLM's names
      block_size: 16
      num_blocks: 40000
    step_time:                    # StepTime: all in microseconds
      fixed_us: 900
      dense_us: {tokens: [1, 256, 8192], us: [1500, 2000, 30000]}
      prefill_pair_us: 1.2e-3
      decode_context_us: 0.02

Units are in the names of the fields. Unknown keys, wrong types and numbers that are not finite are errors that name the
file, the field, the value and what is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from servegym.configuration import Config, find_config, load_config

PositiveInt = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
_NORMAL_95 = 1.96


class TokenCurve(Config):
    """A cost that depends on the tokens of a step: piecewise linear between its support points.

    Below the first point it is constant, since a smaller batch reads the same weights; above the last one it goes on
    with the last slope, never below 0. A step without tokens costs nothing.
    """

    tokens: tuple[PositiveInt, ...] = Field(min_length=2, description="support points, increasing")
    us: tuple[NonNegative, ...] = Field(min_length=2, description="cost at each point, microseconds")

    @model_validator(mode="after")
    def _same_length_and_increasing(self) -> Self:
        if len(self.tokens) != len(self.us):
            raise ValueError(f"as many values in us ({len(self.us)}) as in tokens ({len(self.tokens)})")
        for left, right in pairwise(self.tokens):
            if right <= left:
                raise ValueError(f"tokens in increasing order ({right} follows {left})")
        return self

    def at(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the cost in microseconds at whole token counts, shape as ``tokens``; 0 at 0 tokens.

        >>> TokenCurve(tokens=(10, 20), us=(5, 7)).at(np.array([0, 1, 15, 30])).tolist()
        [0.0, 5.0, 6.0, 9.0]
        """
        cost = np.interp(tokens, self.tokens, self.us)
        (left, right), (low, high) = self.tokens[-2:], self.us[-2:]
        slope = (high - low) / (right - left)
        cost = np.where(tokens > right, high + slope * (tokens - right), cost)
        return np.asarray(np.where(tokens <= 0, 0.0, np.maximum(cost, 0.0)))

    def scaled(self, factor: float) -> TokenCurve:
        """Return the curve with all costs multiplied."""
        return self.model_copy(update={"us": tuple(cost * factor for cost in self.us)})


class StepTime(Config):
    """Duration of one engine step, in microseconds, for a batch of prefill chunks and decoding sequences.

    The terms add up::

        fixed + per_sequence * sequences + dense(T) + moe_imbalance * moe(T) + communication(T)
        + prefill_pair * sum over prefill chunks of c * (p + (c + 1) / 2)
        + decode_context * sum over decoding sequences of their context length

    with ``T`` all tokens of the step (for ``moe`` over all ranks of a lockstep cluster), ``c`` the tokens of a chunk
    and ``p`` the tokens of the sequence before it: ``c * (p + (c + 1) / 2)`` counts the query-key pairs of causal
    attention. ``moe`` is the cost with balanced experts; ``moe_imbalance`` is the load of the heaviest expert-parallel
    rank over the mean.
    """

    fixed_us: NonNegative = Field(description="launch, scheduling and sampling cost of every step")
    per_sequence_us: NonNegative = Field(default=0.0, description="per scheduled sequence")
    dense_us: TokenCurve = Field(description="projections, norms and other dense layers against tokens of the step")
    moe_us: TokenCurve | None = Field(default=None, description="MoE layers with balanced experts")
    moe_imbalance: Annotated[float, Field(ge=1)] = Field(default=1.0, description="heaviest rank over mean rank")
    communication_us: TokenCurve | None = Field(default=None, description="all-to-all and all-reduce")
    prefill_pair_us: NonNegative = Field(description="per query-key pair of prefill attention")
    decode_context_us: NonNegative = Field(description="per context token of a decoding sequence")


class Frontend(Config):
    """What a client waits for beside the engine's steps, in microseconds: API server, tokeniser, its own reading.

    A request reaches the scheduler ``request_us + prompt_token_us * prompt tokens`` after it was sent, and a client has
    a token ``response_us`` after the end of its step. TTFT and E2E grow by both; TPOT does not, as all tokens are
    delayed alike.
    """

    request_us: NonNegative = Field(default=0.0, description="from the client to the scheduler's queue")
    prompt_token_us: NonNegative = Field(default=0.0, description="the same per prompt token")
    response_us: NonNegative = Field(default=0.0, description="from the end of a step to the client")

    def before_s(self, prompt_tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """Return the delay before the queue, seconds, shape as ``prompt_tokens``.

        >>> Frontend(request_us=3000, prompt_token_us=2).before_s(np.array([500])).tolist()
        [0.004]
        """
        return np.asarray(1e-6 * (self.request_us + self.prompt_token_us * prompt_tokens))

    @property
    def after_s(self) -> float:
        """The delay after a step, seconds."""
        return 1e-6 * self.response_us


class StepFactors(Config):
    """Factors on the terms of a step time, to ask what a part of the hardware contributes."""

    fixed: Positive = Field(default=1.0, description="on the cost of every step")
    dense: Positive = Field(default=1.0, description="on dense layers")
    moe: Positive = Field(default=1.0, description="on MoE layers")
    communication: Positive = Field(default=1.0, description="on all-to-all and all-reduce")
    attention: Positive = Field(default=1.0, description="of prefill and of decode")

    def times(self, other: StepFactors) -> StepFactors:
        """Return the products, term by term."""
        return StepFactors(**{name: getattr(self, name) * getattr(other, name) for name in type(self).model_fields})


class EngineLimits(Config):
    """vLLM's scheduler settings; names as in vLLM.

    With ``async_scheduling`` each step is scheduled while the one before runs. What arrives during step k is in step
    k + 2 at the earliest, at an idle engine in the next one; a finished request keeps its slot and its blocks for one
    schedule longer. Steps last as long as without: no term of :class:`StepTime` is the host's alone. ``fixed_us`` and
    ``per_sequence_us`` hold its share as it was when the profile was made, and those of GPUs that are shipped hold only
    what asynchronous scheduling does not hide.
    """

    block_size: PositiveInt = Field(default=16, description="tokens per KV block")
    num_blocks: PositiveInt = Field(
        description="KV blocks as vLLM counts them (num_gpu_blocks), the unusable null block included"
    )
    max_num_seqs: PositiveInt = Field(default=256, description="largest running batch, requests")
    max_num_batched_tokens: PositiveInt = Field(default=8192, description="token budget of a step")
    max_model_len: PositiveInt = Field(default=32768, description="prompt and output of a request, tokens")
    long_prefill_token_threshold: Annotated[int, Field(ge=0)] = Field(
        default=0, description="largest prefill chunk of one request in a step, tokens; 0: no limit but the budget"
    )
    enable_prefix_caching: bool = Field(default=True, description="reuse of full KV blocks with equal prefixes")
    scheduling_policy: Literal["fcfs", "priority"] = Field(default="fcfs", description="order of the waiting queue")
    async_scheduling: bool = Field(
        default=False, description="schedule each step while the one before runs, vLLM's default on GPUs"
    )


class ExpertShape(Config):
    """What the simulator's expert model needs beside :class:`StepTime`: sizes, and what a placement changes.

    A rank's MoE layer costs ``expert_us`` for each expert that its tokens activate, which reads the weights; ``moe_us``
    of :class:`StepTime` holds that cost for equally likely experts, summed over the layers.
    """

    layers: PositiveInt = Field(description="MoE layers")
    experts: PositiveInt = Field(description="logical experts of a layer")
    top_k: PositiveInt = Field(description="experts of a token in each layer")
    ranks: PositiveInt = Field(default=1, description="expert-parallel ranks that moe_us stands for")
    expert_bytes: PositiveInt = Field(description="weights of one expert of one layer")
    token_bytes: PositiveInt = Field(description="what dispatch or combine moves per token and destination rank")
    expert_us: NonNegative = Field(description="one more activated expert of one layer on a rank, microseconds")
    link_gb_s: Positive = Field(description="what a rank sends in an all-to-all, 1e9 bytes per second")
    link_latency_us: NonNegative = Field(description="latency of one all-to-all; a layer has two, dispatch and combine")

    @model_validator(mode="after")
    def _top_k_of_experts(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k of at most the experts ({self.experts}), got {self.top_k}")
        return self


class Profile(Config):
    """One model on one hardware. Units are in the names; ``source`` says what is measured and what is modelled."""

    name: str = Field(description="of the profile")
    description: str = Field(description="what it is, in one line")
    model: str = Field(description="the model, as OWNER/NAME")
    hardware: str = Field(description="the GPU or CPU")
    source: str = Field(description="where the numbers come from: what is measured, what is modelled")
    engine: EngineLimits = Field(description="Limits of the engine, named as in vLLM.")
    step_time: StepTime = Field(description="Terms of the duration of a step, microseconds.")
    experts: ExpertShape | None = Field(
        default=None, description="For the expert model: sizes, and costs per layer that depend on the placement."
    )
    frontend: Frontend | None = Field(
        default=None, description="Delays of a request outside of the engine's steps, microseconds; none: 0."
    )
    drift: NonNegative | None = Field(
        default=None,
        description="Standard deviation of the machine's speed between rounds of the calibration, relative.",
    )

    @property
    def slowness(self) -> tuple[float, float] | None:
        """Factors on all step times that hold 95 % of runs as long as a round of the calibration; None: not known.

        >>> load_profile("cpu-tiny-moe").model_copy(update={"drift": 0.05}).slowness
        (0.9066, 1.103)
        """
        if self.drift is None:
            return None
        faster, slower = np.exp([-_NORMAL_95 * self.drift, _NORMAL_95 * self.drift]).tolist()
        return float(f"{faster:.4g}"), float(f"{slower:.4g}")

    def scaled(self, factors: StepFactors) -> Profile:
        """Return the profile with each term of its costs multiplied."""
        if factors == StepFactors():
            return self
        time, experts = self.step_time, self.experts
        terms = {
            "fixed_us": time.fixed_us * factors.fixed,
            "per_sequence_us": time.per_sequence_us * factors.fixed,
            "dense_us": time.dense_us.scaled(factors.dense),
            "moe_us": time.moe_us and time.moe_us.scaled(factors.moe),
            "communication_us": time.communication_us and time.communication_us.scaled(factors.communication),
            "prefill_pair_us": time.prefill_pair_us * factors.attention,
            "decode_context_us": time.decode_context_us * factors.attention,
        }
        if experts is not None:
            costs = {
                "expert_us": experts.expert_us * factors.moe,
                "link_gb_s": experts.link_gb_s / factors.communication,
                "link_latency_us": experts.link_latency_us * factors.communication,
            }
            experts = experts.model_copy(update=costs)
        return self.model_copy(update={"step_time": time.model_copy(update=terms), "experts": experts})

    def compile(self, max_tokens: int | None = None) -> StepCost:
        """Tabulate the cost for the simulator.

        Args:
            max_tokens: most tokens of a step (in a lockstep cluster: of all ranks); default: the engine's budget.
        """
        tokens = np.arange((max_tokens or self.engine.max_num_batched_tokens) + 1)
        time = self.step_time
        none = np.zeros(len(tokens))
        communication = none if time.communication_us is None else time.communication_us.at(tokens)
        local = time.dense_us.at(tokens) + communication
        moe = none if time.moe_us is None else time.moe_imbalance * time.moe_us.at(tokens)
        return StepCost(
            local_table_s=local * 1e-6,
            moe_table_s=moe * 1e-6,
            communication_table_s=communication * 1e-6,
            fixed_s=time.fixed_us * 1e-6,
            sequence_s=time.per_sequence_us * 1e-6,
            pair_s=time.prefill_pair_us * 1e-6,
            context_s=time.decode_context_us * 1e-6,
        )


@dataclass(frozen=True, slots=True)
class StepCost:
    """A profile's step time in the form that the compiled kernel reads; all in seconds.

    Attributes:
        local_table_s: cost of dense layers and communication by tokens of the step, shape (max_tokens + 1,).
        moe_table_s: cost of MoE layers by tokens of the step over all expert-parallel ranks, same shape.
        communication_table_s: the communication within ``local_table_s``, same shape.
        fixed_s, sequence_s, pair_s, context_s: the coefficients of :class:`StepTime`.
    """

    local_table_s: npt.NDArray[np.float64]
    moe_table_s: npt.NDArray[np.float64]
    communication_table_s: npt.NDArray[np.float64]
    fixed_s: float
    sequence_s: float
    pair_s: float
    context_s: float

    def step_s(self, prefill: list[tuple[int, int]], decode_contexts: list[int]) -> float:
        """Return the duration of one step, the reference that the kernel is tested against.

        Args:
            prefill: (tokens before, tokens of the chunk) of each prefill chunk.
            decode_contexts: context length of each decoding sequence.
        """
        tokens = sum(chunk for _, chunk in prefill) + len(decode_contexts)
        pairs = sum(chunk * (before + (chunk + 1) / 2) for before, chunk in prefill)
        sequences = len(prefill) + len(decode_contexts)
        return (
            self.fixed_s
            + self.sequence_s * sequences
            + float(self.local_table_s[tokens] + self.moe_table_s[tokens])
            + self.pair_s * pairs
            + self.context_s * sum(decode_contexts)
        )


def load_profile(reference: str | Path) -> Profile:
    """Load a profile by the name of a shipped one or by path.

    Raises:
        InputError: unknown name, or a field that is missing or wrong.
    """
    path = find_config(reference, "profiles")
    return _load_cached(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _load_cached(path: Path, modified_ns: int) -> Profile:
    """Parse each version of a file once: training builds clusters by the thousand."""
    return load_config(Profile, path, "profiles")
