"""The dispatch network: scores any number of engines with shared weights, on top of a heuristic.

::

    h_i   = relu(E x_i + R g + b)                        engine i with the request, shared weights
    p     = [mean_i h_i, max_i h_i]                      over the available engines
    logit_i = w . relu(S h_i + P p + c)  +  v . x_i      residual + linear prior

``x_i`` are the engine features and ``g`` the request features of :mod:`servegym.baselines.features`. No shape depends
on the number of engines, permuting engines permutes the logits, and rows of absent engines change nothing. The features
are logarithms, so that product rules of the literature are linear in them: with ``v`` set to minus LMetric's two
factors and ``w`` to zero, the untrained network chooses exactly as LMetric does (residual learning, DESIGN.md 7).

The critic reads the same pooling with weights of its own: the residual is small at first, and gradients of the value
error through a shared encoder would drown it.
"""

from __future__ import annotations

from typing import Any

import torch
from sb3_contrib.common.maskable.distributions import MaskableCategoricalDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from servegym.agents.priors import PRIORS, Prior
from servegym.baselines.features import ENGINE_FEATURE_NAMES, REQUEST_FEATURE_NAMES

MASKED_LOGIT = -1e8  # as in sb3-contrib: probability zero, yet finite


class EngineEncoder(nn.Module):
    """Embeds each engine together with the request, and pools over the available engines."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.engine = nn.Linear(len(ENGINE_FEATURE_NAMES), width)
        self.request = nn.Linear(len(REQUEST_FEATURE_NAMES), width, bias=False)

    def forward(self, engines: Tensor, request: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings, shape (batch, engines, width), and the pooled vector, shape (batch, 2 width)."""
        hidden = torch.relu(self.engine(engines) + self.request(request).unsqueeze(-2)) * mask.unsqueeze(-1)
        mean = hidden.sum(-2) / mask.sum(-1, keepdim=True).clamp(min=1.0)
        # Embeddings are never negative, so that the zero rows of absent engines leave the maximum as it is.
        return hidden, torch.cat([mean, hidden.amax(-2)], dim=-1)


class DispatchActor(nn.Module):
    """Logits of the engines; the part of the network that a policy bundle carries."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = EngineEncoder(width)
        self.item = nn.Linear(width, width)
        self.pooled = nn.Linear(2 * width, width, bias=False)
        self.head = nn.Linear(width, 1, bias=False)
        self.prior = nn.Linear(len(ENGINE_FEATURE_NAMES), 1, bias=False)

    def forward(self, engines: Tensor, request: Tensor, mask: Tensor) -> Tensor:
        """Return the logits, shape (batch, engines); :data:`MASKED_LOGIT` where the mask is 0.

        Args:
            engines: engine features, shape (batch, engines, len(ENGINE_FEATURES)).
            request: request features, shape (batch, len(REQUEST_FEATURES)).
            mask: 1.0 where a request may be sent, else 0.0, shape (batch, engines).
        """
        hidden, pooled = self.encoder(engines, request, mask)
        scored = torch.relu(self.item(hidden) + self.pooled(pooled).unsqueeze(-2))
        logits = (self.head(scored) + self.prior(engines)).squeeze(-1)
        return torch.where(mask > 0, logits, MASKED_LOGIT)

    @torch.no_grad()
    def start_from(self, prior: Prior, scale: float) -> None:
        """Make the network a softmax of a heuristic: ``logit = -scale * key``, and no residual.

        Args:
            prior: name in :data:`servegym.agents.priors.PRIORS`.
            scale: inverse temperature; a larger one explores less.
        """
        self.head.weight.zero_()
        self.prior.weight.zero_()
        for name, factor in PRIORS[prior].items():
            self.prior.weight[0, ENGINE_FEATURE_NAMES.index(name)] = -scale * factor


class ActorCriticNetwork(nn.Module):
    """Actor and critic in the shape that Stable-Baselines3 calls an MLP extractor.

    The "latent" of the actor are its logits; the critic's is one linear layer away from the value.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.actor = DispatchActor(width)
        self.critic_encoder = EngineEncoder(width)
        self.critic = nn.Linear(2 * width + len(REQUEST_FEATURE_NAMES), width)
        self.latent_dim_pi = 1
        self.latent_dim_vf = width

    def forward(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits, shape (batch, engines), and the critic's latent, shape (batch, width)."""
        return self.forward_actor(observation), self.forward_critic(observation)

    def forward_actor(self, observation: dict[str, Tensor]) -> Tensor:
        """Return the logits, shape (batch, engines)."""
        logits: Tensor = self.actor(observation["engines"], observation["request"], observation["mask"])
        return logits

    def forward_critic(self, observation: dict[str, Tensor]) -> Tensor:
        """Return the critic's latent, shape (batch, width)."""
        _, pooled = self.critic_encoder(observation["engines"], observation["request"], observation["mask"])
        return torch.relu(self.critic(torch.cat([pooled, observation["request"]], dim=-1)))


class _Observation(BaseFeaturesExtractor):
    """Hands the observation on as it is: a dict of tensors."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, features_dim=1)

    def forward(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        return observation


class _Categorical(CategoricalDistribution):
    def proba_distribution_net(self, latent_dim: int) -> nn.Module:
        return nn.Identity()  # the actor's output are the logits already


class _MaskableCategorical(MaskableCategoricalDistribution):
    def proba_distribution_net(self, latent_dim: int) -> nn.Module:
        return nn.Identity()


class _SetPolicy:
    """What the two policy classes share: the network in place of the MLP, and its start at the prior."""

    _distribution: type[Any]
    action_space: Any
    action_dist: Any
    mlp_extractor: Any
    device: Any

    def __init__(self, *args: Any, width: int, prior: Prior, prior_scale: float, **kwargs: Any) -> None:
        self._network = (width, prior, prior_scale)  # `super().__init__` builds the network
        super().__init__(*args, features_extractor_class=_Observation, **kwargs)  # type: ignore[call-arg]

    @property
    def actor(self) -> DispatchActor:
        """The part that is deployed."""
        actor: DispatchActor = self.mlp_extractor.actor
        return actor

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = ActorCriticNetwork(self._network[0]).to(self.device)

    def _build(self, lr_schedule: Any) -> None:
        self.action_dist = self._distribution(int(self.action_space.n))
        super()._build(lr_schedule)  # type: ignore[misc]  # orthogonal initialisation, value head, optimizer
        self.actor.start_from(*self._network[1:])


class DispatchPolicy(_SetPolicy, ActorCriticPolicy):
    """For PPO; engines that take no requests are left out by the mask inside the observation."""

    _distribution = _Categorical


class MaskableDispatchPolicy(_SetPolicy, MaskableActorCriticPolicy):
    """For MaskablePPO."""

    _distribution = _MaskableCategorical
