"""Configuration of the expert model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from servegym.configuration import Config
from servegym.envs.simulator.experts.routing.config import RoutingConfig
from servegym.envs.simulator.experts.routing.tasks import TaskMix

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Replacement(Config):
    """When the expert policy is asked, what it sees, and what a new placement costs.

    A layer whose experts move takes ``layer_overhead_s`` plus the bytes that its busiest rank receives over the rank's
    share of the link.
    """

    interval_steps: Count = Field(default=3000, description="steps between two questions, as vLLM's step_interval")
    first_steps: Count | None = Field(
        default=None, description="steps before the first; default: a quarter of the interval, as in vLLM"
    )
    window_steps: Count = Field(default=1000, description="steps of load that the policy sees, as vLLM's window_size")
    mode: Literal["async", "stall"] = Field(
        default="async",
        description="async: layer by layer beside the steps, as vLLM's default; stall: all layers while nothing runs",
    )
    layer_overhead_s: NonNegative = Field(
        default=0.015, description="per layer beside the bytes; 48 layers in 0.72 s on 4 H100 (arXiv 2606.15177)"
    )
    link_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="async: share of the link that a transfer takes from dispatch and combine"
    )
    coactivation_tokens: Count = Field(
        default=2048, description="tokens of a window whose experts in adjacent layers are recorded"
    )


class ExpertsConfig(Config):
    """The experts of a cluster: which tokens choose which, on how many ranks they live, and how they may move.

    In lockstep all engines form one expert-parallel group; independent engines are a group each. The numbers of layers
    and experts are the profile's.
    """

    mode: Literal["mean_field", "sampled"] = Field(
        default="mean_field",
        description="mean_field: expected loads of the tasks in a batch; sampled: every token's experts, far slower",
    )
    ranks: Count | None = Field(
        default=None,
        description="expert-parallel ranks of a group; default: as many as its engines",
    )
    redundant_experts: Annotated[int, Field(ge=0)] = Field(default=0, description="slots beyond one per expert")
    routing: RoutingConfig = Field(default=RoutingConfig(), description="which experts tokens choose")
    task_mix: TaskMix = Field(default=TaskMix(), description="what requests are about, over time")
    traffic: Literal["return", "stay"] = Field(
        default="return",
        description=(
            "return: tokens come back to their source rank after each layer, as in vLLM; stay: they go on from the rank"
            " of their first expert, as in ExFlow"
        ),
    )
    replacement: Replacement = Field(default=Replacement(), description="when experts may move, and what that costs")
    chunk_sample: Count = Field(
        default=256, description="sampled: tokens of a longer prefill chunk that stand for the rest"
    )
