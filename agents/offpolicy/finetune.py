"""Fine-tuning of a dispatch bundle on logged decisions, and the proof that it became better.

The doubly robust estimate of the policy's cost is its loss, with clipped weights and a penalty on the divergence from
the bundle that it started from: where the log says little, the policy stays what it was.

Decisions are learned from by what they cost the request itself (a contextual bandit); what they cost others enters only
as far as the state shows it. The policy is judged on the last part of the log, which it has not learned from, and as it
will act: greedily.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, field_validator

from servegym.agents.networks import Actor
from servegym.agents.offpolicy.estimate import CostModel, cost_ratio, doubly_robust, effective_decisions
from servegym.agents.offpolicy.transitions import METRICS, Transitions, read_transitions
from servegym.agents.statistics import Interval
from servegym.agents.training.export import actor_weights, torch_logits
from servegym.agents.versions import package_versions
from servegym.baselines.interface import FloatArray
from servegym.configuration import Config
from servegym.engine_bridge.bundle import load_bundle
from servegym.engine_bridge.bundle_writer import write_bundle
from servegym.engine_bridge.decisions import DISPATCH
from servegym.engine_bridge.manifest import Provenance
from servegym.errors import InputError

POLICY, UNPROVEN = "policy", "unproven"
_FEWEST = 200
_EQUAL = 1e-6

Positive = Annotated[float, Field(gt=0)]


class FinetuneConfig(Config):
    """How a bundle learns from a log."""

    objective: dict[str, Positive] = Field(
        default_factory=lambda: {METRICS[0]: 1.0},
        min_length=1,
        description="weights of the logarithms of a request's metrics",
    )
    test_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.3, description="share of the log, its end, that judges the result"
    )
    divergence: Annotated[float, Field(ge=0)] = Field(
        default=0.05, description="weight of the divergence from the bundle before, nats"
    )
    most_weight: Positive = Field(default=10.0, description="clip of the ratio of probabilities")
    epochs: Annotated[int, Field(ge=1)] = Field(
        default=60, description="passes over the part of the log that is learned from"
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(default=512, description="logged decisions per gradient step")
    learning_rate: Positive = Field(default=1e-3, description="step size of Adam")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="of the order of the batches")

    @field_validator("objective")
    @classmethod
    def _are_logged(cls, objective: dict[str, float]) -> dict[str, float]:
        for name in objective:
            if name not in METRICS:
                raise ValueError(f"metrics of a decision log, not {name}: {', '.join(METRICS)}")
        return objective


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """What came of it.

    Attributes:
        folder: of the bundle.
        proven: whether the new policy is better beyond doubt (95 %) on the part of the log that it has not seen.
        against_old: ratio of its cost to that of the bundle before.
        against_log: the same to what the log says.
        changed: share of the decisions that differ from those of the bundle before.
        decisions: that were learned from, that it was judged on.
        effective: of the latter, how many the estimate effectively rests on.
        dropped: lines of the logs that were of no use, by reason.
    """

    folder: Path
    proven: bool
    against_old: Interval
    against_log: Interval
    changed: float
    decisions: tuple[int, int]
    effective: float
    dropped: dict[str, int]


def finetune(
    bundle: str | Path,
    logs: list[Path],
    out: Path,
    config: FinetuneConfig | None = None,
    *,
    progress: Callable[[float], None] = lambda share: None,
) -> FinetuneResult:
    """Learn from logs and write the new bundle: to ``out/policy`` if it is proven to be better, else to ``out/unproven``.

    Args:
        bundle: a bundle or run folder of a dispatch policy.
        logs: decision logs of deployments with ``log_observations`` and ``epsilon``.
        out: folder, made if absent.
        config: how.
        progress: called with the share that is done.

    Raises:
        InputError: a damaged bundle, one of another level, or logs with too few decisions.
    """  # noqa: E501 - one sentence
    config = config or FinetuneConfig()
    old = load_bundle(bundle)
    if old.manifest.layer != DISPATCH.layer:
        raise InputError(str(bundle), "layer", f"got {old.manifest.layer}; allowed: engine")
    transitions = read_transitions(logs, config.objective)
    cut = round(len(transitions) * (1.0 - config.test_share))
    if min(cut, len(transitions) - cut) < _FEWEST:
        raise InputError(
            str(logs[0]), "", f"{len(transitions)} decisions to learn from and to judge by; allowed: {_FEWEST} each"
        )
    seen, unseen = transitions.part(slice(0, cut)), transitions.part(slice(cut, len(transitions)))
    model = CostModel(seen)
    actor = Actor(DISPATCH, old.manifest.widths.hidden)
    actor.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in old.weights.items()})
    before = greedy(actor, unseen)
    _learn(actor, seen, model(seen), config, progress)
    after, expected = greedy(actor, unseen), model(unseen)
    terms = doubly_robust(unseen, expected, after)
    against_old = cost_ratio(terms, doubly_robust(unseen, expected, before))
    proven = against_old.high < 1.0
    folder = out / (POLICY if proven else UNPROVEN)
    training = Provenance(
        run=f"{old.manifest.training.run}-finetuned",
        config_sha256=hashlib.sha256(
            json.dumps(config.model_dump(mode="json") | {"from": old.manifest.weights_sha256}, sort_keys=True).encode()
        ).hexdigest(),
        seed=config.seed,
        steps=cut,
        environment="decision logs",
        evaluation={
            "cost_ratio": against_old.value,
            "cost_ratio_low": against_old.low,
            "cost_ratio_high": against_old.high,
        },
    )
    write_bundle(folder, DISPATCH, actor_weights(actor), torch_logits(actor), training, package_versions())
    return FinetuneResult(
        folder,
        proven,
        against_old,
        against_log=cost_ratio(terms, unseen.cost),
        changed=float(0.5 * np.abs(after - before).sum(axis=1).mean()),
        decisions=(cut, len(unseen)),
        effective=effective_decisions(unseen, after),
        dropped=dict(transitions.dropped),
    )


def greedy(actor: Actor, transitions: Transitions) -> FloatArray:
    """Return how often a network chooses each engine, shape (decisions, engines); equal ones take turns."""
    with torch.no_grad():
        logits = actor(*_tensors(transitions)).numpy().astype(np.float64)
    best = logits >= logits.max(axis=1, keepdims=True) - _EQUAL
    return np.asarray(best / best.sum(axis=1, keepdims=True))


def _learn(
    actor: Actor,
    transitions: Transitions,
    expected: FloatArray,
    config: FinetuneConfig,
    progress: Callable[[float], None],
) -> None:
    torch.manual_seed(config.seed)
    inputs = _tensors(transitions)
    action = torch.from_numpy(transitions.action)
    rows = np.arange(len(transitions))
    surprise = torch.from_numpy((transitions.cost - expected[rows, transitions.action]).astype(np.float32))
    propensity = torch.from_numpy(transitions.propensity.astype(np.float32))
    costs = torch.from_numpy(expected.astype(np.float32))
    with torch.no_grad():
        old = torch.log_softmax(actor(*inputs), dim=-1)
    optimizer = torch.optim.Adam(actor.parameters(), lr=config.learning_rate)
    shuffle = torch.Generator().manual_seed(config.seed)
    for epoch in range(config.epochs):
        for batch in torch.split(torch.randperm(len(transitions), generator=shuffle), config.batch_size):
            log_chance = torch.log_softmax(actor(*(one[batch] for one in inputs)), dim=-1)
            chance = log_chance.exp()
            weight = chance.gather(1, action[batch, None])[:, 0] / propensity[batch]
            value = (chance * costs[batch]).sum(-1) + weight.clamp(max=config.most_weight) * surprise[batch]
            divergence = (chance * (log_chance - old[batch])).sum(-1)
            loss = (value + config.divergence * divergence).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        progress((epoch + 1) / config.epochs)


def _tensors(transitions: Transitions) -> tuple[Any, Any, Any]:
    return (
        torch.from_numpy(transitions.items),
        torch.from_numpy(transitions.context),
        torch.from_numpy(transitions.mask.astype(np.float32)),
    )
