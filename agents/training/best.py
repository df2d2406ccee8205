"""What an evaluation leaves behind: a line, the newest bundle, and the best one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from servegym.agents.networks import Actor
from servegym.agents.runs import RunFolder
from servegym.agents.training.config import TrainConfig
from servegym.agents.training.episodes import FinishedEpisode
from servegym.agents.training.export import actor_weights, torch_logits
from servegym.agents.training.validation import objective, summarise
from servegym.agents.versions import package_versions
from servegym.engine_bridge.bundle_writer import write_bundle
from servegym.engine_bridge.manifest import Provenance


class BestPolicy:
    """Judges evaluations and keeps the bundles of a run.

    Args:
        config: the resolved config.
        run: the folder.
        best_objective: of earlier evaluations, when a run is resumed.

    Attributes:
        best_objective: lowest objective so far.
        last_evaluation: means of the newest evaluation.
    """

    def __init__(self, config: TrainConfig, run: RunFolder, best_objective: float) -> None:
        self.best_objective = best_objective
        self.last_evaluation: dict[str, float] = {}
        self._config, self._run = config, run

    def evaluated(
        self,
        actor: Actor,
        steps: int,
        episodes: Sequence[FinishedEpisode],
        others: Mapping[str, Actor] = MappingProxyType({}),
        budget_share: float | None = None,
    ) -> dict[str, float]:
        """Note an evaluation and return its means.

        Args:
            actor: the policy.
            steps: decisions so far.
            episodes: what it came to.
            others: policies of other layers that decided beside it; their bundles are ``policy_LAYER``.
            budget_share: what the policy of the request level lets a step use of an engine's token budget.

        Raises:
            FloatingPointError: they are not finite.
        """
        means = summarise(episodes)
        means["objective"] = objective(means, self._config.evaluation)
        if not math.isfinite(means["objective"]):
            raise FloatingPointError(f"evaluation at step {steps} is not finite: {means}")
        self.last_evaluation = means
        best = means["objective"] < self.best_objective
        self._run.add_evaluation({"steps": steps, "best": best, **means})
        if best:
            self.best_objective = means["objective"]
        for folder in (self._run.policy_last, self._run.policy) if best else (self._run.policy_last,):
            for one, place in [(actor, folder)] + [
                (other, folder.with_name(f"{folder.name}_{layer}")) for layer, other in others.items()
            ]:
                share = budget_share if one.decisions.layer == "request" else None
                self._write(place, one, steps, means, share)
        return means

    def _write(
        self, folder: Path, actor: Actor, steps: int, means: dict[str, float], budget_share: float | None
    ) -> None:
        training = Provenance(
            run=self._config.name,
            config_sha256=self._config.sha256(),
            seed=self._config.seed,
            steps=steps,
            environment=f"servegym/{self._config.environment}",
            evaluation=means,
        )
        logits, packages = torch_logits(actor), package_versions()
        write_bundle(folder, actor.decisions, actor_weights(actor), logits, training, packages, budget_share)
