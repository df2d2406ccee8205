"""Networks that choose among candidates: any number of them, with shared weights, on top of a heuristic.

Dispatch (``set_scorer``)::

    h_i   = relu(E x_i + R g + b)                        engine i with the request, shared weights
    p     = [mean_i h_i, max_i h_i]                      over the available engines
    logit_i = w . relu(S h_i + P p + c)  +  v . x_i      residual + linear prior

Admission (``index_scorer``) is the same without ``p``: the score of a waiting request depends on itself and on the
queue's context only, as an index rule's does, so that a whole queue is ordered by one pass.

``x_i`` are the features of a candidate and ``g`` those of the context (:mod:`servegym.engine_bridge.decisions`). No
shape depends on the number of candidates, permuting them permutes the logits, and absent ones change nothing. The
features are logarithms, so that product rules of the literature are linear in them: with ``v`` set to minus LMetric's
two factors and ``w`` to zero, the untrained network chooses exactly as LMetric does (residual learning, DESIGN.md 7).

The critic pools over the candidates with weights of its own: the residual is small at first, and gradients of the value
error through a shared encoder would drown it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy.typing as npt
import torch
from sb3_contrib.common.maskable.distributions import MaskableCategoricalDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from servegym.agents.network_kernels import MASKED_LOGIT, choice_logits, state_summary
from servegym.agents.priors import PRIORS, Prior
from servegym.engine_bridge.decisions import DISPATCH, Decisions


class Encoder(nn.Module):
    """Weights that embed each candidate together with the context."""

    def __init__(self, decisions: Decisions, width: int) -> None:
        super().__init__()
        self.item = nn.Linear(len(decisions.items), width)
        self.context = nn.Linear(len(decisions.context), width, bias=False)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return E, R and b."""
        return self.item.weight, self.context.weight, self.item.bias


class Actor(nn.Module):
    """Logits of the candidates; the part of the network that a policy bundle carries."""

    def __init__(self, decisions: Decisions, width: int) -> None:
        super().__init__()
        self.decisions = decisions
        self.encoder = Encoder(decisions, width)
        self.hidden = nn.Linear(width, width)
        self.pooled = nn.Linear(2 * width, width, bias=False) if decisions.pooled else None
        self.head = nn.Linear(width, 1, bias=False)
        self.prior = nn.Linear(len(decisions.items), 1, bias=False)

    def forward(self, items: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Return the logits, shape (batch, candidates); :data:`MASKED_LOGIT` where the mask is 0.

        Args:
            items: features of the candidates, shape (batch, candidates, features).
            context: features of what they share, shape (batch, features).
            mask: 1.0 where a candidate may be chosen, else 0.0, shape (batch, candidates).
        """
        return choice_logits(
            items,
            context,
            mask,
            self.encoder.weights(),
            (self.hidden.weight, self.hidden.bias),
            None if self.pooled is None else self.pooled.weight,
            self.head.weight[0],
            self.prior.weight[0],
        )

    def observed(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the network takes of an environment's observation: candidates, context, mask."""
        items, context = self.decisions.observation
        return observation[items][..., : len(self.decisions.items)], observation[context], observation["mask"]

    @torch.no_grad()
    def start_from(self, prior: Prior, scale: float) -> None:
        """Make the network a softmax of a heuristic: ``logit = -scale * key``, and no residual.

        Args:
            prior: name in :data:`servegym.agents.priors.PRIORS`.
            scale: inverse temperature; a larger one explores less.
        """
        self.head.weight.zero_()
        self.prior.weight.zero_()
        for name, factor in PRIORS[self.decisions.layer][prior].items():
            self.prior.weight[0, self.decisions.item_names.index(name)] = -scale * factor


class ActorCriticNetwork(nn.Module):
    """Actor and critic in the shape that Stable-Baselines3 calls an MLP extractor.

    The "latent" of the actor are its logits; the critic's is one linear layer away from the value.
    """

    def __init__(self, decisions: Decisions, width: int) -> None:
        super().__init__()
        self.actor = Actor(decisions, width)
        self.critic_encoder = Encoder(decisions, width)
        self.critic = nn.Linear(2 * width + len(decisions.context), width)
        self.latent_dim_pi = 1
        self.latent_dim_vf = width

    def forward(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits, shape (batch, candidates), and the critic's latent, shape (batch, width)."""
        return self.forward_actor(observation), self.forward_critic(observation)

    def forward_actor(self, observation: dict[str, Tensor]) -> Tensor:
        """Return the logits, shape (batch, candidates)."""
        logits: Tensor = self.actor(*self.actor.observed(observation))
        return logits

    def forward_critic(self, observation: dict[str, Tensor]) -> Tensor:
        """Return the critic's latent, shape (batch, width)."""
        encoder, critic = self.critic_encoder.weights(), self.critic
        return state_summary(*self.actor.observed(observation), encoder, (critic.weight, critic.bias))


class _Observation(BaseFeaturesExtractor):
    """Hands the observation on as it is: a dict of tensors."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, features_dim=1)

    def forward(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        return observation


class UncheckedCategorical:
    """What Stable-Baselines3 asks of ``torch.distributions.Categorical``, without its checks of every argument.

    Args:
        logits: not normalised, shape (batch, actions).
    """

    def __init__(self, logits: Tensor) -> None:
        self._given = logits
        self.apply_masking(None)

    def apply_masking(self, masks: npt.NDArray[Any] | Tensor | None) -> None:
        """Allow the actions alone that the masks hold, shape (batch, actions); None: all."""
        logits = self._given
        if masks is not None:
            logits = torch.where(torch.as_tensor(masks, dtype=torch.bool).reshape(logits.shape), logits, MASKED_LOGIT)
        self._masked = logits
        for name in ("logits", "probs"):
            self.__dict__.pop(name, None)

    @cached_property
    def logits(self) -> Tensor:
        """Logarithms of the probabilities, shape (batch, actions)."""
        return torch.log_softmax(self._masked.t(), dim=0).t()  # action by action torch takes a tenth of the time

    @cached_property
    def probs(self) -> Tensor:
        """Probabilities, shape (batch, actions)."""
        return self.logits.exp()

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the logarithms of the probabilities of actions, shape (batch,)."""
        return self.logits.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Return the entropies, shape (batch,), nats."""
        return -(self.probs * self.logits).sum(-1)

    def sample(self) -> Tensor:
        """Return an action each, shape (batch,): as ``torch.multinomial`` draws them, from the same random numbers."""
        return (self.probs / torch.empty(self.probs.shape).exponential_()).argmax(-1)


class _Categorical(CategoricalDistribution):
    def proba_distribution_net(self, latent_dim: int) -> nn.Module:
        return nn.Identity()  # the actor's output are the logits already

    def proba_distribution(self, action_logits: Tensor) -> _Categorical:
        self.distribution = UncheckedCategorical(action_logits)  # type: ignore[assignment]
        return self


class _MaskableCategorical(MaskableCategoricalDistribution):
    def proba_distribution_net(self, latent_dim: int) -> nn.Module:
        return nn.Identity()

    def proba_distribution(self, action_logits: Tensor) -> _MaskableCategorical:
        self.distribution = UncheckedCategorical(action_logits)  # type: ignore[assignment]
        return self


class _Policy:
    """What the two policy classes share: the network in place of the MLP, and its start at the prior."""

    _distribution: type[Any]
    action_space: Any
    action_dist: Any
    mlp_extractor: Any
    device: Any

    def __init__(
        self,
        *args: Any,
        width: int,
        prior: Prior,
        prior_scale: float,
        decisions: Decisions = DISPATCH,
        entropy_bonus: bool = True,
        **kwargs: Any,
    ) -> None:
        self._network = (decisions, width, prior, prior_scale)  # `super().__init__` builds the network
        self._entropy_bonus = entropy_bonus
        super().__init__(  # type: ignore[call-arg]
            *args,
            features_extractor_class=_Observation,
            optimizer_kwargs={"eps": 1e-5, "fused": True},  # one call for all weights; eps is Stable-Baselines3's
            **kwargs,
        )

    @property
    def actor(self) -> Actor:
        """The part that is deployed."""
        actor: Actor = self.mlp_extractor.actor
        return actor

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = ActorCriticNetwork(*self._network[:2]).to(self.device)

    def _build(self, lr_schedule: Any) -> None:
        self.action_dist = self._distribution(int(self.action_space.n))
        super()._build(lr_schedule)  # type: ignore[misc]  # orthogonal initialisation, value head, optimizer
        self.actor.start_from(*self._network[2:])

    def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
        """Return the observation as it is, in float32."""
        return {key: part.float() for key, part in obs.items()}

    def evaluate_actions(self, obs: Any, actions: Tensor, action_masks: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """As Stable-Baselines3's, under the masks of the observations.

        Without a bonus, the entropy is for the logs alone and has no gradient.
        """
        values, log_prob, entropy = super().evaluate_actions(obs, actions)  # type: ignore[misc]
        return values, log_prob, entropy if self._entropy_bonus else entropy.detach()


class SetPolicy(_Policy, ActorCriticPolicy):
    """For PPO; candidates that may not be chosen are left out by the mask inside the observation."""

    _distribution = _Categorical


class MaskableSetPolicy(_Policy, MaskableActorCriticPolicy):
    """For MaskablePPO."""

    _distribution = _MaskableCategorical
