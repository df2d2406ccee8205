"""What the kernel is told of a run's policies: which it calls itself, and what the others need of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from servegym.baselines.heuristic import compiled_form
from servegym.baselines.interface import EnginePolicy, FloatArray, RequestPolicy
from servegym.envs.simulator.compile import engine_score, request_key
from servegym.envs.simulator.kernel.state import (
    ORDER_DYNAMIC,
    ORDER_EXTERNAL,
    ORDER_FCFS,
    ORDER_PICK,
    ORDER_PRIORITY,
    ORDER_STATIC,
)


def _no_params() -> FloatArray:
    return np.zeros(0)


@dataclass(frozen=True, slots=True)
class PolicyForms:
    """The policies of requests and engines, as the kernel takes them.

    Attributes:
        order: how waiting queues are kept, an ORDER_* constant.
        request_key: address of the compiled key of waiting requests, 0 for none.
        request_params: its parameters, shape (n,).
        external_dispatch: Python chooses the engines.
        engine_score: address of the compiled scores of engines, 0 for none.
        engine_params: its parameters, shape (n,).
        oracle: the request policy reads true output lengths.
        dispatch_oracle: the engine policy reads unfinished work.
        served_weights: what a prompt token and an output token count in the service of a user; None: not counted.
        budget_share: share of the token budget of a step; None: all of it.
    """

    order: int = ORDER_FCFS
    request_key: int = 0
    request_params: FloatArray = field(default_factory=_no_params)
    external_dispatch: bool = False
    engine_score: int = 0
    engine_params: FloatArray = field(default_factory=_no_params)
    oracle: bool = False
    dispatch_oracle: bool = False
    served_weights: tuple[float, float] | None = None
    budget_share: float | None = None

    @classmethod
    def of(
        cls, request_policy: RequestPolicy | None, engine_policy: EnginePolicy | None, *, tunable: bool = False
    ) -> Self:
        """Compile the policies that have a compiled form.

        Args:
            request_policy: None if the caller admits.
            engine_policy: None if the caller dispatches.
            tunable: score waiting requests anew at each step, though the order is static.
        """
        order, key, request_params = _queue_order(request_policy)
        if tunable and order == ORDER_STATIC:
            order = ORDER_DYNAMIC
        form = compiled_form(engine_policy) if engine_policy is not None else None
        score, engine_params = form if form is not None else (None, _no_params())
        return cls(
            order=order,
            request_key=request_key(key),
            request_params=np.array(request_params, dtype=np.float64),
            external_dispatch=form is None,
            engine_score=engine_score(score),
            engine_params=np.array(engine_params, dtype=np.float64),
            oracle=getattr(request_policy, "needs_oracle", False),
            dispatch_oracle=getattr(engine_policy, "needs_oracle", False),
            served_weights=getattr(request_policy, "served_weights", None),
            budget_share=getattr(request_policy, "budget_share", None),
        )


def _queue_order(policy: RequestPolicy | None) -> tuple[int, Callable[..., float] | None, FloatArray]:
    """Which kind of queue the kernel needs for a request policy, its compiled key and the key's parameters."""
    if policy is None:
        return ORDER_PICK, None, _no_params()
    native = getattr(policy, "native", None)
    if native is not None:
        return (ORDER_PRIORITY if native == "priority" else ORDER_FCFS), None, _no_params()
    form = compiled_form(policy)
    if form is None:
        return ORDER_EXTERNAL, None, _no_params()
    return (ORDER_STATIC if getattr(policy, "static", False) else ORDER_DYNAMIC), *form
