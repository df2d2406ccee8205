"""A policy without any heuristic inside learns to dispatch, within a minute on one core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support import TOY

from servegym.agents.evaluation import EvaluationConfig, evaluate
from servegym.agents.training.config import TrainConfig
from servegym.agents.training.trainer import train
from servegym.configuration import validate


def ttft_against_the_baseline(
    config: dict[str, Any], comparison: dict[str, Any], layer: str, folder: Path
) -> dict[str, dict[str, float]]:
    """Train, and evaluate the result among the policies of a comparison."""
    policy = train(validate(TrainConfig, config, "test"), out=folder / "run", progress=False).policy
    comparison["policies"]["learned"] = {layer: str(policy)}
    result = evaluate(validate(EvaluationConfig, comparison, "test"), processes=1, progress=False)
    return {row["policy"]: row["metrics"]["ttft_s"]["difference"] for row in result.statistics()}


@pytest.mark.slow
def test_from_nothing_it_beats_random_and_comes_close_to_the_best_heuristic(tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump(TOY), encoding="utf-8")
    cluster: dict[str, Any] = {"engines": 4, "profile": str(profile)}
    config = {
        "name": "scratch",
        "total_steps": 150_000,
        "algorithm": {"n_envs": 32, "n_steps": 128, "batch_size": 1024},
        "network": {"prior": "none"},
        "env": {
            "cluster": cluster,
            "workload": {"name": "azure-conv", "load": 0.8},
            "episode_requests": 400,
            "reference": "lmetric",
        },
        "evaluation": {"every_steps": 50_000, "episodes": 4},
    }
    comparison = {
        "cluster": cluster,
        "workloads": [{"name": "azure-conv", "requests": 2000}],
        "baseline": "random",
        "policies": {"random": {"engine": "random"}, "lmetric": {"engine": "lmetric"}},
    }
    gap = ttft_against_the_baseline(config, comparison, "engine", tmp_path)
    assert gap["learned"]["high"] < 0
    assert gap["learned"]["value"] < 0.5 * gap["lmetric"]["value"]


@pytest.mark.slow
def test_from_nothing_an_admission_policy_beats_fcfs(tmp_path: Path) -> None:
    """On an engine that is overloaded for a while, where short prompts first is what there is to find."""
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump(TOY), encoding="utf-8")
    cluster: dict[str, Any] = {"engines": 1, "profile": str(profile), "engine": {"max_num_batched_tokens": 2048}}
    config = {
        "name": "scratch",
        "total_steps": 60_000,
        "environment": "RequestOrdering-v0",
        "algorithm": {"n_envs": 16, "n_steps": 128, "batch_size": 512},
        "network": {"prior": "none"},
        "env": {
            "cluster": cluster,
            "workload": {"name": "azure-conv", "load": 1.15},
            "episode_requests": 300,
            "reference": "fcfs",
        },
        "evaluation": {"every_steps": 30_000, "episodes": 4},
    }
    comparison = {
        "cluster": cluster,
        "workloads": [{"name": "azure-conv", "requests": 1000}],
        "loads": [1.15],
        "baseline": "fcfs",
        "policies": {"fcfs": {}, "spf_aging": {"request": "spf_aging"}},
    }
    gap = ttft_against_the_baseline(config, comparison, "request", tmp_path)
    print(gap)
    assert gap["learned"]["high"] < 0
    assert gap["learned"]["value"] < 0.5 * gap["spf_aging"]["value"]
