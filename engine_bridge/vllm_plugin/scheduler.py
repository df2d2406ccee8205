"""vLLM's scheduler with a waiting queue that a servegym policy orders, anew before each step, and its token budget.

Start an engine with ``--scheduler-cls servegym.engine_bridge.vllm_plugin.scheduler.PolicyAsyncScheduler`` and the
environment variables of :mod:`.protocol`. Everything else is vLLM's: running requests, KV blocks, preemption, and the
token budget unless the policy takes a share of it. Where a version of vLLM does not have what this needs, its own order
stays in force, and the state file and one line of the log say why.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from servegym.baselines.heuristic import token_budget
from servegym.engine_bridge.vllm_plugin.policy import LivePolicy
from servegym.engine_bridge.vllm_plugin.protocol import POLICY_VARIABLE, RATE_VARIABLE, STATE_VARIABLE
from servegym.engine_bridge.vllm_plugin.queue import PolicyQueue
from servegym.engine_bridge.vllm_plugin.steps import StepRecorder, steps_file

_DEFAULT_RATE = 10_000.0


class _PolicyScheduler:
    """Mixed in before one of vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        path, state = os.environ.get(POLICY_VARIABLE, ""), os.environ.get(STATE_VARIABLE)
        self._servegym_rate = float(os.environ.get(RATE_VARIABLE, _DEFAULT_RATE))
        self._servegym_queue: PolicyQueue | None = None
        self._servegym_policy = LivePolicy(Path(path), Path(state) if state else None)
        self._servegym_budget = int(getattr(self, "max_num_scheduled_tokens", 0))
        self._servegym_steps = StepRecorder(steps_file(Path(state)) if state else None)
        reason = self._servegym_obstacle()
        if reason:
            self._servegym_policy.stand_down(reason)
            return
        self._servegym_queue = self.waiting = PolicyQueue()

    def _servegym_obstacle(self) -> str:
        """Say what of vLLM is not as we know it; empty if all is."""
        waiting = getattr(self, "waiting", None)
        if waiting is None or len(waiting):
            return "this vLLM keeps its waiting requests elsewhere"
        interface = next((base for base in type(waiting).__mro__ if getattr(base, "__abstractmethods__", None)), None)
        if interface is None:
            return "the waiting queue of this vLLM has no declared interface"
        for name in sorted(getattr(interface, "__abstractmethods__", ())):
            if not hasattr(PolicyQueue, name):
                return f"the waiting queue of this vLLM has also {name}"
        for name in ("running", "kv_cache_manager", "max_num_running_reqs", "max_num_scheduled_tokens"):
            if not hasattr(self, name):
                return f"the scheduler of this vLLM has no {name}"
        return ""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Order the queue, then let vLLM schedule the step."""
        steps = self._servegym_steps
        if not steps.refresh(self._servegym_limits):
            return self._servegym_schedule(*args, **kwargs)
        start_s = time.perf_counter()
        output = self._servegym_schedule(*args, **kwargs)
        steps.scheduled(start_s, output, getattr(self, "requests", {}))
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Let vLLM take up what a step computed, and record the step where somebody asks for it."""
        result = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        if self._servegym_steps.recording:
            busy = bool(self.waiting or self.running)  # type: ignore[attr-defined]
            self._servegym_steps.updated(scheduler_output, time.perf_counter(), busy)
        return result

    def _servegym_schedule(self, *args: Any, **kwargs: Any) -> Any:
        queue, policy = self._servegym_queue, self._servegym_policy
        if queue is None:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        policy.refresh()
        self._servegym_count(queue)
        if len(queue) > 1:
            queue.reorder(policy.scores, self._servegym_context())
        # vLLM reads it at the beginning of each step.
        self.max_num_scheduled_tokens = token_budget(
            policy.budget_share,
            self._servegym_budget,
            self.max_num_running_reqs,  # type: ignore[attr-defined]
        )
        result = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._servegym_count(queue)
        return result

    def _servegym_count(self, queue: PolicyQueue) -> None:
        try:
            queue.count_served(self._servegym_policy.served_weights, self.running)  # type: ignore[attr-defined]
        except Exception as error:
            self._servegym_policy.failed(f"{type(error).__name__}: {error}")

    def _servegym_limits(self) -> dict[str, float]:
        """Return what :class:`~servegym.envs.profiles.profile.EngineLimits` holds, as far as this vLLM tells.

        And ``prefill_tokens_per_s``, which policies here go by.
        """
        context = self._servegym_context()
        limits = {
            "block_size": context["block_size"],
            "num_blocks": context["total_blocks"] + 1,
            "max_num_seqs": context["max_num_seqs"],
            "prefill_tokens_per_s": self._servegym_rate,
        }
        told = {
            "max_num_batched_tokens": self._servegym_budget,
            "max_model_len": int(getattr(self, "max_model_len", 0)),
            "async_scheduling": self._servegym_ahead(),
        }
        return limits | {name: value for name, value in told.items() if value}

    def _servegym_ahead(self) -> bool:
        return bool(getattr(getattr(self, "scheduler_config", None), "async_scheduling", False))

    def _servegym_context(self) -> dict[str, Any]:
        manager: Any = self.kv_cache_manager  # type: ignore[attr-defined]
        pool = getattr(manager, "block_pool", None)
        total = max(int(getattr(pool, "num_gpu_blocks", 0)) - 1, 1)
        usage = float(getattr(manager, "usage", 0.0))
        return {
            "now_s": time.time(),
            "running": len(self.running),  # type: ignore[attr-defined]
            "max_num_seqs": int(self.max_num_running_reqs),  # type: ignore[attr-defined]
            "free_blocks": round(total * (1.0 - usage)),
            "total_blocks": total,
            "block_size": int(getattr(self, "block_size", 16)),
            "prefill_tokens_per_s": self._servegym_rate,
        }


class PolicyScheduler(_PolicyScheduler, Scheduler):
    """For engines that schedule synchronously.

    Raises:
        ValueError: the engine schedules one step ahead; with this class it would skip every other step, without a word.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._servegym_ahead():
            raise ValueError(
                f"--scheduler-cls: got {type(self).__name__} with --async-scheduling; allowed: PolicyAsyncScheduler, "
                "or --no-async-scheduling"
            )


class PolicyAsyncScheduler(_PolicyScheduler, AsyncScheduler):
    """For engines that schedule one step ahead, vLLM's default on GPUs; right for the others, too."""
