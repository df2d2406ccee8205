"""vLLM's general plugin of ours: loaded in every process of an engine, and silent unless an environment variable asks.

``SERVEGYM_EPLB_POLICY`` names an expert policy that takes the place of vLLM's for EPLB (:mod:`.eplb`).

``SERVEGYM_CPU_EXPERT_PARALLEL=1`` makes expert parallelism run on the CPU, for tests of mechanics: vLLM's CPU kernel
ignores the map of local experts, and its CPU communicator lacks two collectives. Remote experts are masked, not
skipped, so that computation per rank does not shrink: latencies mean nothing there.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from servegym.engine_bridge.vllm_plugin.eplb import POLICY_VARIABLE, ServegymEplb, install

CPU_EXPERTS_VARIABLE = "SERVEGYM_CPU_EXPERT_PARALLEL"
_logger = logging.getLogger("vllm.servegym")


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; safe to call twice."""
    if os.environ.get(POLICY_VARIABLE):
        _install_eplb(os.environ[POLICY_VARIABLE])
    if os.environ.get(CPU_EXPERTS_VARIABLE) == "1":
        _patch_cpu_experts()
        _patch_cpu_collectives()


def _install_eplb(policy: str) -> None:
    """Replace EPLB's policy; where that is not possible, vLLM's own stays, and the log says why."""
    try:
        from vllm.distributed.eplb.policy import EPLB_POLICIES

        if not issubclass(EPLB_POLICIES["default"], ServegymEplb):
            install(policy, EPLB_POLICIES)
    except Exception as error:
        _logger.warning("servegym: vLLM's own placement policy stays: %s", error)


def _patch_cpu_experts() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    original = CPUUnquantizedExperts.apply
    if getattr(original, "servegym", False):
        return

    def apply(self: Any, **arguments: Any) -> Any:
        local = arguments.get("expert_map")
        if local is not None:
            ids = local.to(arguments["topk_ids"].device)[arguments["topk_ids"].long()]
            remote = ids < 0
            arguments["topk_weights"] = arguments["topk_weights"].masked_fill(remote, 0.0)
            arguments["topk_ids"] = ids.masked_fill(remote, 0).to(arguments["topk_ids"].dtype)
            arguments["expert_map"] = None
        return original(self, **arguments)

    apply.servegym = True  # type: ignore[attr-defined]
    CPUUnquantizedExperts.apply = apply


def _patch_cpu_collectives() -> None:
    import torch
    from torch import distributed
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    if "all_gatherv" in CpuCommunicator.__dict__:
        return

    def all_gatherv(self: Any, value: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
        if not isinstance(value, torch.Tensor):
            return [all_gatherv(self, part, dim, sizes) for part in value]
        rows = sizes or [value.shape[0]] * self.world_size
        padding = value.new_zeros((max(rows) - value.shape[0], *value.shape[1:]))
        padded = torch.cat([value, padding]).contiguous()
        parts = [torch.empty_like(padded) for _ in rows]
        distributed.all_gather(parts, padded, group=self.device_group)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    def reduce_scatterv(self: Any, value: Any, dim: int = -1, sizes: list[int] | None = None) -> Any:
        total = value.contiguous().clone()
        distributed.all_reduce(total, group=self.device_group)
        rows = sizes or [total.shape[0] // self.world_size] * self.world_size
        begin = sum(rows[: self.rank_in_group])
        return total[begin : begin + rows[self.rank_in_group]].contiguous()

    def into_output(self: Any, value: Any, output: Any, dim: int = -1, sizes: list[int] | None = None) -> Any:
        return output.copy_(reduce_scatterv(self, value, dim, sizes))

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv
    CpuCommunicator.reduce_scatterv_into_output = into_output
