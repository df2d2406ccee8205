"""A servegym expert policy in the place of vLLM's EPLB policy.

vLLM asks ``rebalance_experts`` on every expert-parallel rank by itself, and all must answer alike: servegym's policies
are functions of the loads that they have seen, which are the same on all ranks. A policy that fails, or places an
expert nowhere, is counted, and vLLM's own answers in its place; since a failure is as reproducible as an answer, that
too is the same on all ranks. Policies with a time limit of their own (``exflow``, ``grace``) are refused: ranks may
differ in speed.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from servegym.baselines.interface import ExpertLoad, ExpertPolicy, Placement
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create_live
from servegym.errors import InputError

POLICY_VARIABLE = "SERVEGYM_EPLB_POLICY"
"""Environment variable with the expert policy: NAME or NAME,key=value."""

_logger = logging.getLogger("vllm.servegym")


def install(text: str, policies: dict[str, type[Any]]) -> None:
    """Put a policy into vLLM's table of EPLB policies, under the only name that vLLM takes.

    Args:
        text: the policy, as for ``--policy expert=...``.
        policies: vLLM's ``EPLB_POLICIES``.

    Raises:
        InputError: no such policy, or one that cannot run there.
    """
    policy = _checked(PolicySpec.parse(text))
    policies["default"] = type("ServegymEplb", (ServegymEplb, policies["default"]), {"policy": policy})
    _logger.info("servegym: experts placed by %s", text)


def _checked(spec: PolicySpec) -> ExpertPolicy:
    policy = create_live("expert", spec)
    if hasattr(getattr(policy, "params", None), "limit_s"):
        raise InputError(POLICY_VARIABLE, "policy", f"got {spec.name}, whose time limit makes ranks differ")
    return policy


class ServegymEplb:
    """Mixed in before vLLM's default policy.

    Attributes:
        policy: places the experts.
        failures: answers that were vLLM's own, after a failure.
    """

    policy: ExpertPolicy
    failures = 0

    @classmethod
    def rebalance_experts(
        cls,
        weight: Any,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: Any = None,
    ) -> Any:
        """Return the logical expert of each slot, int64 tensor of shape (layers, num_replicas).

        Args:
            weight: tokens by layer and logical expert, tensor.
            num_replicas: slots of a layer over all ranks.
            num_groups: expert groups of the model.
            num_nodes: machines.
            num_ranks: expert-parallel ranks.
            old_global_expert_indices: the placement in force, tensor of the shape of the answer.
        """
        arguments = (weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices)
        try:
            return cls._place(*arguments)
        except Exception as error:
            cls.failures += 1
            _logger.warning("servegym: vLLM's own placement: %s: %s", type(error).__name__, error)
            return super().rebalance_experts(*arguments)  # type: ignore[misc]

    @classmethod
    def _place(cls, weight: Any, slots: int, groups: int, nodes: int, ranks: int, old: Any) -> Any:
        import torch

        tokens = weight.detach().to("cpu").numpy().astype(np.float64)
        layers, experts = tokens.shape
        if old is None:
            held = np.tile(np.arange(slots, dtype=np.int64) % experts, (layers, 1))
        else:
            held = old.detach().to("cpu").numpy().astype(np.int64)
        placed = cls.policy.place(ExpertLoad(tokens), Placement(held, ranks))
        wanted = held if placed is None else np.asarray(placed.physical_to_logical, dtype=np.int64)
        complete = wanted.shape == (layers, slots) and all(
            np.array_equal(np.unique(layer), np.arange(experts)) for layer in wanted
        )
        if not complete:
            raise ValueError(f"a placement of shape {wanted.shape} that loses experts")
        return torch.from_numpy(np.ascontiguousarray(wanted))
