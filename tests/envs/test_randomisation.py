"""What differs from episode to episode, and what a factor on a term of the step time does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from servegym.envs.engine_dispatch import EngineDispatchEnv
from servegym.envs.profiles.profile import StepFactors, load_profile
from servegym.envs.requests import RequestSource, WorkloadChoice
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.workloads.generation import LengthScale, generate
from servegym.envs.workloads.workload import load_workload
from servegym.errors import InputError


def test_factors_multiply_their_terms(toy_profile: str) -> None:
    profile = load_profile(toy_profile)
    chunk, contexts = [(0, 200)], [300, 400]
    base = profile.compile().step_s(chunk, contexts)
    terms = {
        "fixed": 2000 + 3 * 5,
        "dense": profile.step_time.dense_us.at(np.array([202]))[0],
        "moe": 1.2 * profile.step_time.moe_us.at(np.array([202]))[0],
        "attention": 0.002 * 200 * 100.5 + 0.05 * 700,
    }
    for name, microseconds in terms.items():
        scaled = profile.scaled(StepFactors(**{name: 1.5})).compile().step_s(chunk, contexts)
        assert scaled - base == pytest.approx(0.5e-6 * microseconds)
    assert profile.scaled(StepFactors()) is profile


def test_expert_costs_follow() -> None:
    profile = load_profile("qwen3-30b-a3b-h200-ep4").scaled(StepFactors(moe=2.0, communication=4.0))
    original = load_profile("qwen3-30b-a3b-h200-ep4")
    assert profile.experts.expert_us == 2 * original.experts.expert_us
    assert profile.experts.link_gb_s == original.experts.link_gb_s / 4
    assert profile.experts.link_latency_us == 4 * original.experts.link_latency_us


@pytest.mark.parametrize("name", ["azure-conv", "chat-sessions"])
def test_lengths_scale_and_nothing_else_changes(name: str) -> None:
    workload = load_workload(name)
    plain = generate(workload, rate_rps=10, requests=2000, seed=3)
    scaled = generate(workload, rate_rps=10, requests=2000, seed=3, scale=LengthScale(1.3, 0.7))
    assert scaled.output_tokens.mean() / plain.output_tokens.mean() == pytest.approx(0.7, rel=0.03)
    if name == "azure-conv":
        np.testing.assert_array_equal(plain.arrival_s, scaled.arrival_s)
        assert scaled.prompt_tokens.mean() / plain.prompt_tokens.mean() == pytest.approx(1.3, rel=0.01)
        np.testing.assert_array_equal(scaled.prompt_tokens, np.maximum(np.rint(plain.prompt_tokens * 1.3), 1))


def test_a_load_is_a_share_of_the_capacity_of_the_drawn_cluster_and_lengths(toy_profile: str) -> None:
    cluster = ClusterConfig(engines=2, profile=toy_profile)
    source = RequestSource(WorkloadChoice(name="azure-code", load=0.5), cluster)
    slower = cluster.model_copy(update={"step_factors": StepFactors(fixed=2, dense=2, moe=2, attention=2)})
    assert source.capacity_rps(slower) == pytest.approx(source.capacity_rps() / 2, rel=1e-6)
    assert source.capacity_rps(cluster, LengthScale(2.0, 2.0)) < 0.7 * source.capacity_rps()


def test_episodes_differ_in_hardware_and_lengths(toy_profile: str, toy_workload: str) -> None:
    env = EngineDispatchEnv(
        {
            "cluster": {"profile": toy_profile, "engines": 2},
            "workload": {"name": toy_workload, "load": 0.8},
            "episode_requests": 200,
            "randomise": {"step_terms": [0.7, 1.3], "prompt_scale": [0.7, 1.3], "output_scale": [0.5, 2.0]},
        }
    )
    fixed, prompts, outputs = [], [], []
    for seed in range(12):
        env.reset(seed=seed)
        fixed.append(float(env._run.memory.engines["fixed_s"][0]))
        prompts.append(float(env._run.table.prompt_tokens.mean()))
        outputs.append(float(env._run.table.output_tokens.mean()))
    assert min(fixed) >= 0.7 * 0.002
    assert max(fixed) <= 1.3 * 0.002
    assert np.std(fixed) > 0.05 * 0.002
    assert max(outputs) / min(outputs) > 1.8
    assert max(prompts) / min(prompts) > 1.3
    env.reset(seed=4)
    assert float(env._run.memory.engines["fixed_s"][0]) == fixed[4]


def test_lengths_of_a_trace_stay(tmp_path: Any, toy_profile: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,20,5\n")
    source = RequestSource(
        WorkloadChoice.model_validate({"trace": {"path": str(path)}}), ClusterConfig(profile=toy_profile)
    )
    with pytest.raises(InputError, match=r"scale: got 2, 1; allowed beside a trace: 1"):
        source.table(0, scale=LengthScale(2.0, 1.0))
