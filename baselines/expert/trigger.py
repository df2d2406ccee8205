"""When to move: rules that wrap another policy and let its placement through only if it pays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from servegym.baselines.expert.loads import moved_experts, rank_loads
from servegym.baselines.heuristic import Heuristic
from servegym.baselines.interface import ExpertLoad, FloatArray, Placement
from servegym.baselines.registry import create, register
from servegym.configuration import Config


class Wrapped(Config):
    """The policy that proposes."""

    inner: str = Field(default="eplb", description="expert policy that proposes, as NAME or NAME,key=value")


class Trigger(Heuristic):
    """Base of the rules: the inner policy proposes, :meth:`pays` decides."""

    params: Any

    def __init__(self, params: Any = None) -> None:
        super().__init__(params)
        self.inner = create("expert", self.params.inner)
        for need in ("needs_sources", "needs_coactivation", "needs_oracle"):
            setattr(self, need, getattr(self.inner, need, False))

    def reset(self, seed: int) -> None:
        """Forget what the rule and the inner policy remember."""
        if hasattr(self.inner, "reset"):
            self.inner.reset(seed)

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the inner policy's placement if it pays."""
        if not load.tokens.any():
            return None
        wanted = self.inner.place(load, current)
        return wanted if wanted is not None and self.pays(load, current, wanted) else None

    def pays(self, load: ExpertLoad, current: Placement, wanted: Placement) -> bool:
        """Whether to move."""
        raise NotImplementedError


@register("expert", "periodic", source="vLLM 0.32, step_interval and window_size of its EPLB")
class Periodic(Trigger):
    """Ask the inner policy at every ``every``-th opportunity only, with the load of the last ``windows`` windows.

    vLLM's interval and window are settings of the engine; asked often, this rule makes them parameters of a policy.
    ``every=12,windows=4`` at opportunities every 250 steps is vLLM's default, 3000 steps with a window of 1000. As
    there, the first time comes after a quarter of the interval.
    """

    class Params(Wrapped):
        """Parameters."""

        every: Annotated[int, Field(ge=1)] = Field(
            default=12, description="opportunities from one question to the next"
        )
        windows: Annotated[int, Field(ge=1)] = Field(default=4, description="windows of load that are summed")

    params: Params

    def __init__(self, params: Params | None = None) -> None:
        super().__init__(params)
        self._start()

    def reset(self, seed: int) -> None:
        """Forget the loads, and begin a new interval."""
        super().reset(seed)
        self._start()

    def _start(self) -> None:
        self._left = (self.params.every + 3) // 4
        self._seen: list[ExpertLoad] = []

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the inner policy's placement for the summed loads where an interval has passed."""
        self._seen = [*self._seen, load][-self.params.windows :]
        self._left -= 1
        if self._left > 0:
            return None
        self._left = self.params.every
        return super().place(_summed(self._seen), current)

    def pays(self, load: ExpertLoad, current: Placement, wanted: Placement) -> bool:
        """Whether to move: always."""
        return True


def _summed(loads: Sequence[ExpertLoad]) -> ExpertLoad:
    """One window of several; what a single one lacks is absent."""

    def total(name: str) -> FloatArray | None:
        parts = [getattr(load, name) for load in loads]
        return None if any(part is None for part in parts) else np.sum(parts, axis=0)

    newest = loads[-1]
    return ExpertLoad(
        tokens=np.sum([load.tokens for load in loads], axis=0),
        by_source=total("by_source"),
        coactivation=total("coactivation"),
        steps=sum(load.steps for load in loads),
        future=newest.future,
        expert_bytes=newest.expert_bytes,
        top_k=newest.top_k,
    )


@register("expert", "prism", source="Prism, arXiv 2508.12851: cost(new) + migration < cost(old)")
class Prism(Trigger):
    """Move only if the tokens that the heaviest ranks are spared outweigh the experts that move.

    ``windows * sum over layers (heaviest rank now - heaviest rank then) > migration_tokens * experts received by the
    busiest rank``, summed over layers.
    """

    class Params(Wrapped):
        """Parameters; both numbers are ours."""

        windows: Annotated[float, Field(gt=0)] = Field(default=3.0, description="windows that a placement is to last")
        migration_tokens: Annotated[float, Field(ge=0)] = Field(
            default=500.0, description="tokens of the heaviest rank that moving one expert is worth"
        )

    params: Params

    def pays(self, load: ExpertLoad, current: Placement, wanted: Placement) -> bool:
        """Whether to move."""
        spared = rank_loads(load.tokens, current).max(axis=1) - rank_loads(load.tokens, wanted).max(axis=1)
        moved = moved_experts(current, wanted).max(axis=1)
        return bool(self.params.windows * spared.sum() > self.params.migration_tokens * moved.sum())


@register("expert", "mindspeed", source="Ascend MindSpeed, dynamic expert placement")
class MindSpeed(Trigger):
    """Smooth the load, and move only if that evens the ranks by enough.

    The load is a moving average, ``ema`` of the old and the rest of the new window; the coefficient of variation of the
    ranks' loads, mean over layers, must fall by ``min_drop``.
    """

    class Params(Wrapped):
        """Parameters; the defaults are published."""

        ema: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="weight of the past")
        min_drop: Annotated[float, Field(ge=0)] = Field(
            default=0.08, description="fall of the coefficient of variation"
        )

    params: Params

    def __init__(self, params: Params | None = None) -> None:
        super().__init__(params)
        self._average: FloatArray | None = None

    def reset(self, seed: int) -> None:
        """Forget the moving average."""
        super().reset(seed)
        self._average = None

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the inner policy's placement for the smoothed load if it pays."""
        if not load.tokens.any():
            return None
        old = self._average if self._average is not None else load.tokens
        self._average = self.params.ema * old + (1.0 - self.params.ema) * load.tokens
        smoothed = ExpertLoad(
            tokens=self._average,
            by_source=load.by_source,
            coactivation=load.coactivation,
            steps=load.steps,
            future=load.future,
            expert_bytes=load.expert_bytes,
            top_k=load.top_k,
        )
        return super().place(smoothed, current)

    def pays(self, load: ExpertLoad, current: Placement, wanted: Placement) -> bool:
        """Whether to move."""
        return _variation(load, current) - _variation(load, wanted) >= self.params.min_drop


def _variation(load: ExpertLoad, placement: Placement) -> float:
    loads = rank_loads(load.tokens, placement)
    return float(np.mean(loads.std(axis=1) / np.maximum(loads.mean(axis=1), 1e-300)))
