"""What the experts of a profile cost, in the form that the kernel reads.

The profile's MoE curve holds balanced experts under uniform routing. It is split into reading the weights of activated
experts, ``expert_us`` each, and the rest, which depends on the tokens that a rank receives; so that uniform routing
costs what was measured, and other routing costs what its loads and its activated experts make of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from servegym.envs.profiles.profile import ExpertShape, Profile

Float = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ExpertCosts:
    """Costs of the MoE layers.

    Attributes:
        expert_s: reading one activated expert, per layer.
        compute_s: all else of one layer, by the tokens of a step that load a rank equally under uniform routing, shape
            (tokens + 1,).
        compute_scale: from experts chosen on a rank to that number of tokens.
        exchange_s: dispatch and combine of all layers, by tokens per rank under uniform routing, shape (tokens + 1,).
        uniform_traffic: remote ranks that a token goes to under uniform routing.
    """

    expert_s: float
    compute_s: Float
    compute_scale: float
    exchange_s: Float
    uniform_traffic: float


def uniform_activated(shape: ExpertShape, ranks: int, tokens: npt.ArrayLike) -> Float:
    """Return the expected activated experts of a rank under uniform routing: ``E/R (1 - (1 - k/E)^T)``."""
    missed = (1.0 - shape.top_k / shape.experts) ** np.asarray(tokens, dtype=np.float64)
    return np.asarray(shape.experts / ranks * (1.0 - missed))


def uniform_traffic(shape: ExpertShape, ranks: int) -> float:
    """Return how many ranks other than its own a token goes to when every set of ``top_k`` experts is equally likely.

    ``(R - 1) * (1 - C(E - E/R, k) / C(E, k))``.

    Of 4 experts on 2 ranks, 5 of the 6 pairs reach the other rank.
    """
    elsewhere = shape.experts - shape.experts / ranks
    missed = math.prod(max(elsewhere - i, 0.0) / (shape.experts - i) for i in range(shape.top_k))
    return (ranks - 1) * (1.0 - missed)


def expert_costs(profile: Profile, ranks: int, engines: int, max_tokens: int) -> ExpertCosts:
    """Tabulate a profile's MoE layers for a group of ``ranks``.

    Args:
        profile: with a section ``experts``.
        ranks: EP ranks.
        engines: engines of the group, each with as many of its ranks.
        max_tokens: most tokens of a step over all ranks.
    """
    shape = profile.experts
    assert shape is not None
    time = profile.step_time
    # The heaviest rank may get far more than its share; beyond the table its last slope holds.
    tokens = np.arange(2 * max_tokens + 2)
    moe = np.zeros(len(tokens)) if time.moe_us is None else time.moe_us.at(tokens)
    rest = moe - shape.expert_us * shape.layers * uniform_activated(shape, shape.ranks, tokens)
    compute = np.maximum.accumulate(np.maximum(rest, 0.0)) / shape.layers
    traffic = uniform_traffic(shape, ranks)
    if time.communication_us is not None:
        # The profile's curve is over the tokens of an engine, which its ranks share.
        exchange = time.communication_us.at(tokens * (ranks // engines))
    else:
        moved_us = tokens * traffic * shape.token_bytes / (shape.link_gb_s * 1e3)
        exchange = np.where(tokens > 0, 2.0 * shape.layers * (shape.link_latency_us + moved_us), 0.0)
    return ExpertCosts(
        expert_s=shape.expert_us * 1e-6,
        compute_s=compute * 1e-6,
        compute_scale=shape.ranks / shape.top_k,
        exchange_s=exchange * 1e-6 if ranks > 1 else np.zeros(len(tokens)),
        uniform_traffic=traffic,
    )
