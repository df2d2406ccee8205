"""What the built-in heuristics share: parameters, and the form that the simulator compiles.

A heuristic is a pure function of its views. Beside the vectorised ``score`` it may have a *compiled form*: a static
method ``compiled`` in the subset of Python that numba's nopython mode takes, reading the very rows that the views
show. It never imports numba; the simulator compiles it.

* engine: ``compiled(request, engines, params, out) -> None`` fills ``out``, shape (engines,), from the ``R_*`` row, the
  ``(engines, ENGINE_COLUMNS)`` matrix and the parameters;
* request: ``compiled(item, context, params) -> float`` scores one row of ``QueueView.data`` beside the ``C_*`` row.

Both forms give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

import numpy as np

from servegym.baselines.interface import EngineViews, FloatArray
from servegym.configuration import Config

# Added per place in the order in which equal engines take turns. Small against any real difference of loads, and exact
# beside whole numbers up to 2^22.
TURN = 2.0**-30


class Heuristic:
    """Base of the built-in policies of all layers.

    Attributes:
        Params: the pydantic model of the policy's parameters; without fields where there are none.
        params: the values in force.
        needs_oracle: whether the policy reads what only a simulator can grant: true output lengths, unfinished work.
    """

    needs_oracle: ClassVar[bool] = False
    Params: ClassVar[type[Config]] = Config
    params: Config

    def __init__(self, params: Any = None) -> None:
        self.params = self.Params() if params is None else params

    def compiled_params(self) -> FloatArray:
        """Return the parameters as ``compiled`` reads them: in order of declaration, None as infinity."""
        values = [getattr(self.params, name) for name in type(self.params).model_fields]
        return np.array([np.inf if value is None else value for value in values], dtype=np.float64)


class RequestHeuristic(Heuristic):
    """Base of the queue orders.

    Attributes:
        static: whether the score of a waiting request stays the same as time passes, so that a heap can hold the queue.
        native: vLLM's own queue that the policy stands for, which also says where a preempted request returns.
    """

    static: ClassVar[bool] = False
    native: ClassVar[Literal["fcfs", "priority"] | None] = None

    @property
    def served_weights(self) -> tuple[float, float] | None:
        """Weights (prompt token, output token) of the column ``user_served``; None without need of it."""
        return None

    @property
    def budget_share(self) -> float | None:
        """Share of the engine's token budget that a step may use; None: all of it."""
        return None


def token_budget(share: float | None, limit: int, max_num_seqs: int) -> int:
    """Return how many tokens a step may schedule.

    Never fewer than ``max_num_seqs``, where the limit allows that: every running request gets its next token.

    Args:
        share: of a request policy, None for all.
        limit: the engine's own budget, vLLM's ``max_num_batched_tokens``.
        max_num_seqs: largest running batch.

    >>> token_budget(0.5, 8192, 256), token_budget(0.01, 8192, 256), token_budget(None, 8192, 256)
    (4096, 256, 8192)
    """
    return limit if share is None else min(limit, max(round(share * limit), max_num_seqs))


def compiled_form(policy: Any) -> tuple[Callable[..., Any], FloatArray] | None:
    """Return the function to compile and its parameters, or None for a policy that has only Python code."""
    function = getattr(policy, "compiled", None)
    if function is None:
        return None
    params = getattr(policy, "compiled_params", None)
    return function, np.zeros(0) if params is None else cast(FloatArray, params())


def only_available(engines: EngineViews, scores: FloatArray) -> FloatArray:
    """Return the scores with infinity at engines that take no requests, shape (engines,)."""
    masked: FloatArray = np.where(engines.available > 0, scores, np.inf)
    return masked


def turns(count: int, first: int) -> FloatArray:
    """Return each engine's place in a rotation that begins at ``first``, shape (count,).

    >>> turns(4, 3)
    array([1., 2., 3., 0.])
    """
    places: FloatArray = (np.arange(count, dtype=np.float64) - first) % max(count, 1)
    return places
