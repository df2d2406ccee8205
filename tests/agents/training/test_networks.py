"""The set network: any number of engines, in any order, starting from a heuristic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO

from servegym.agents.networks import Actor, MaskableSetPolicy, SetPolicy
from servegym.agents.priors import PRIORS
from servegym.agents.training.episodes import EpisodeVecEnv
from servegym.baselines import registry
from servegym.baselines.features import ENGINE_FEATURES, REQUEST_FEATURES, fill_dispatch_features
from servegym.baselines.interface import E_AVAILABLE, EngineViews, RequestView, pick
from servegym.engine_bridge.decisions import DECISIONS, Level
from servegym.engine_bridge.golden import draw_dispatch


def make_policy(
    kind: type = MaskableSetPolicy, slots: int = 4, prior: str = "lmetric", seed: int = 0, entropy_bonus: bool = True
):
    torch.manual_seed(seed)
    observations = spaces.Dict(
        {
            "engines": spaces.Box(-np.inf, np.inf, (slots, len(ENGINE_FEATURES)), np.float32),
            "request": spaces.Box(-np.inf, np.inf, (len(REQUEST_FEATURES),), np.float32),
            "mask": spaces.Box(0, 1, (slots,), np.int8),
        }
    )
    settings = {"width": 16, "prior": prior, "prior_scale": 2.0, "entropy_bonus": entropy_bonus}
    return kind(observations, spaces.Discrete(slots), lambda _: 1e-3, **settings)


def shaken(policy):
    """The policy with a residual, as after some training."""
    with torch.no_grad():
        policy.actor.head.weight.normal_()
        policy.actor.prior.weight.add_(0.1 * torch.randn_like(policy.actor.prior.weight))
    return policy


def draw_observation(batch: int, slots: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(batch, slots, generator=generator) < 0.8).float()
    mask[:, 0] = 1.0
    engines = torch.randn(batch, slots, len(ENGINE_FEATURES), generator=generator) * mask.unsqueeze(-1)
    return {"engines": engines, "request": torch.randn(batch, len(REQUEST_FEATURES), generator=generator), "mask": mask}


def logits_and_values(policy, observation: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        logits, latent = policy.mlp_extractor(observation)
        return logits, policy.value_net(latent)


def test_permuting_engines_permutes_logits_and_keeps_the_value() -> None:
    policy, observation = shaken(make_policy()), draw_observation(64, 4)
    order = torch.tensor([2, 0, 3, 1])
    permuted = observation | {"engines": observation["engines"][:, order], "mask": observation["mask"][:, order]}
    logits, values = logits_and_values(policy, observation)
    permuted_logits, permuted_values = logits_and_values(policy, permuted)
    torch.testing.assert_close(permuted_logits, logits[:, order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(permuted_values, values, rtol=1e-5, atol=1e-5)


def test_the_logit_of_an_engine_depends_on_the_others() -> None:
    policy, observation = shaken(make_policy()), draw_observation(1, 4)
    observation["mask"][:] = 1.0
    changed = {key: value.clone() for key, value in observation.items()}
    changed["engines"][0, 1] += 1.0
    assert abs(logits_and_values(policy, observation)[0] - logits_and_values(policy, changed)[0])[0, 0] > 1e-4


def test_padding_changes_nothing_and_weights_move_from_4_to_16_slots() -> None:
    small, large = shaken(make_policy(slots=4)), make_policy(slots=16, seed=5)
    large.load_state_dict(small.state_dict())
    observation = draw_observation(64, 4)
    padded = {
        "engines": torch.cat([observation["engines"], torch.zeros(64, 12, len(ENGINE_FEATURES))], 1),
        "request": observation["request"],
        "mask": torch.cat([observation["mask"], torch.zeros(64, 12)], 1),
    }
    logits, values = logits_and_values(small, observation)
    padded_logits, padded_values = logits_and_values(large, padded)
    torch.testing.assert_close(padded_logits[:, :4], logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(padded_values, values, rtol=1e-6, atol=1e-6)
    assert (padded_logits[:, 4:] < -1e7).all()
    full = draw_observation(8, 16)
    full["mask"][:] = 1.0
    assert len(set(large.get_distribution(full).distribution.probs.argmax(1).tolist())) > 1


@pytest.mark.parametrize("kind", [SetPolicy, MaskableSetPolicy])
def test_masked_engines_are_never_sampled(kind: type) -> None:
    policy, observation = shaken(make_policy(kind)), draw_observation(2000, 4)
    with torch.no_grad():
        actions, values, log_probs = policy(observation)
    assert observation["mask"][torch.arange(2000), actions].all()
    assert torch.isfinite(log_probs).all()
    assert values.shape == (2000, 1)


def test_no_engine_at_all_is_survived() -> None:
    policy, observation = shaken(make_policy(SetPolicy)), draw_observation(2, 4)
    observation["mask"][:] = 0.0
    assert torch.isfinite(logits_and_values(policy, observation)[1]).all()


@pytest.mark.parametrize("prior", ["lmetric", "least_requests"])
def test_the_untrained_policy_chooses_as_its_heuristic(prior: str) -> None:
    policy, heuristic = make_policy(slots=8, prior=prior), registry.create("engine", prior)
    rng = np.random.default_rng(3)
    for _ in range(300):
        row, matrix = draw_dispatch(rng)
        engines = np.empty((8, len(ENGINE_FEATURES)), dtype=np.float32)
        request = np.empty(len(REQUEST_FEATURES), dtype=np.float32)
        fill_dispatch_features(row, matrix, engines, request)
        mask = np.zeros(8, dtype=np.float32)
        mask[: len(matrix)] = matrix[:, E_AVAILABLE]
        batch = {"engines": engines[None], "request": request[None], "mask": mask[None]}
        logits, _ = logits_and_values(policy, {key: torch.from_numpy(value) for key, value in batch.items()})
        view = RequestView(index=0, now_s=0.0, arrival_s=0.0, prompt_tokens=int(row[2]))
        scores = heuristic.score(view, EngineViews(matrix))
        chosen, wanted = int(logits.argmax()), pick(scores, matrix[:, E_AVAILABLE])
        assert scores[chosen] == pytest.approx(scores[wanted], rel=1e-6)


@pytest.mark.parametrize("layer", DECISIONS)
def test_every_prior_is_of_features_of_its_layer(layer: Level) -> None:
    for prior, factors in PRIORS[layer].items():
        actor = Actor(DECISIONS[layer], width=1)
        actor.start_from(prior, 2.0)
        weights = dict(zip(DECISIONS[layer].item_names, actor.prior.weight[0].tolist(), strict=True))
        wanted = {name: -2.0 * factor for name, factor in factors.items()}
        assert {name: weight for name, weight in weights.items() if weight} == pytest.approx(wanted)


def test_without_a_prior_the_untrained_policy_is_uniform() -> None:
    observation = draw_observation(4, 4)
    logits, _ = logits_and_values(make_policy(prior="none"), observation)
    assert set(logits[observation["mask"] > 0].tolist()) == {0.0}


@pytest.mark.parametrize(("algorithm", "kind"), [(PPO, SetPolicy), (MaskablePPO, MaskableSetPolicy)])
def test_hidden_layers_start_orthogonal_and_all_parameters_are_optimised(algorithm, kind, make_toy) -> None:
    model = algorithm(
        kind,
        EpisodeVecEnv(make_toy, 1, 0),
        n_steps=8,
        batch_size=8,
        policy_kwargs={"width": 16, "prior": "lmetric", "prior_scale": 2.0},
        device="cpu",
    )
    weight = model.policy.actor.hidden.weight.detach()
    torch.testing.assert_close(weight @ weight.T, 2.0 * torch.eye(16), rtol=1e-5, atol=1e-5)
    optimised = {id(parameter) for group in model.policy.optimizer.param_groups for parameter in group["params"]}
    assert optimised == {id(parameter) for parameter in model.policy.parameters()}
    before = {name: parameter.clone() for name, parameter in model.policy.named_parameters()}
    model.learn(64)
    unmoved = [name for name, parameter in model.policy.named_parameters() if torch.equal(parameter, before[name])]
    assert not unmoved


@pytest.mark.parametrize("bonus", [False, True])
def test_the_entropy_has_a_gradient_where_there_is_a_bonus(bonus: bool) -> None:
    policy, observation = make_policy(entropy_bonus=bonus), draw_observation(8, 4)
    values, log_prob, entropy = policy.evaluate_actions(observation, torch.zeros(8))
    assert values.requires_grad
    assert log_prob.requires_grad
    assert entropy.requires_grad == bonus
