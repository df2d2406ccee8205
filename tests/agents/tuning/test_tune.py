"""Tuning: what it finds, that it goes on where it stopped, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from servegym.agents.evaluation import EvaluationConfig, evaluate
from servegym.agents.tuning.config import TuneConfig
from servegym.agents.tuning.tune import Tuned, tune
from servegym.configuration import load_config, validate
from servegym.errors import InputError

EVALUATION: dict[str, Any] = {
    "cluster": {"engines": 2, "profile": "qwen3-30b-a3b-h200", "engine": {"max_num_batched_tokens": 2048}},
    "workloads": [{"name": "azure-conv", "requests": 60}],
    "loads": [0.9],
    "seeds": 2,
    "baseline": "base",
    "policies": {"base": {"engine": "round_robin"}},
}
GIMBAL: dict[str, Any] = {
    "policies": {"engine": "gimbal2"},
    "space": {"engine.prefill": {"low": 0.01, "high": 10, "log": True}, "engine.kv": {"choices": [0.0, 1.0]}},
}


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "evaluation.yaml"
    path.write_text(yaml.safe_dump(EVALUATION), encoding="utf-8")
    return {
        "name": "test",
        "evaluation": str(path),
        "changes": {"seeds": [100, 101]},
        "trials": 5,
        "contestants": {"gimbal": GIMBAL},
    }


def _config(content: dict[str, Any], **changes: Any) -> TuneConfig:
    return validate(TuneConfig, content | changes, "test")


def _interrupted_after(trials: int) -> Any:
    def progress(done: int, line: str) -> None:
        if done == trials:
            raise KeyboardInterrupt

    return progress


def test_the_first_trial_is_the_contestant_as_it_is_and_the_best_is_kept(
    content: dict[str, Any], tmp_path: Path
) -> None:
    lines: list[str] = []
    (found,) = tune(_config(content), tmp_path / "out", processes=1, progress=lambda done, line: lines.append(line))
    assert found.trials == len(lines) == 5
    assert found.best <= found.first
    assert found.policies.engine.params | found.values  # the best trial's
    best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text(encoding="utf-8"))
    assert best == {"gimbal": found.policies.model_dump(mode="json")}
    # The cost of a trial is what an evaluation says of the policy on the same cells.
    policies = {"base": {"engine": "round_robin"}, "plain": {"engine": "gimbal2"}, "best": best["gimbal"]}
    judged = validate(EvaluationConfig, EVALUATION | {"seeds": [100, 101], "policies": policies}, "test")
    result = evaluate(judged, processes=1)
    (label,) = (condition.label for condition in judged.conditions)
    values = {name: result.values("ttft_s", name, label, 0.9) for name in policies}
    for name, cost in (("plain", found.first), ("best", found.best)):
        ratios = [mine / base for mine, base in zip(values[name], values["base"], strict=True)]
        assert (ratios[0] * ratios[1]) ** 0.5 == pytest.approx(2.718281828459045**cost)


def test_an_interrupted_search_ends_as_an_uninterrupted_one(content: dict[str, Any], tmp_path: Path) -> None:
    config = _config(content)
    whole = tune(config, tmp_path / "whole", processes=1)
    with pytest.raises(KeyboardInterrupt):
        tune(config, tmp_path / "parts", processes=1, progress=_interrupted_after(2))
    assert tune(config, tmp_path / "parts", processes=1) == whole
    # More trials go on from there, and a finished search returns at once.
    longer: list[Tuned] = tune(_config(content, trials=6), tmp_path / "parts", processes=1)
    assert longer[0].trials == 6
    assert tune(_config(content, trials=6), tmp_path / "parts", processes=1) == longer


def test_a_training_run_is_a_contestant(content: dict[str, Any], tmp_path: Path) -> None:
    training = {
        "name": "tiny",
        "total_steps": 200,
        "evolution": {"episodes": 1, "population": 4},
        "network": {"width": 1, "prior": "lmetric"},
        "env": {"cluster": {"engines": 2}, "episode_requests": 20, "reference": "lmetric"},
        "evaluation": {"episodes": 1},
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(training), encoding="utf-8")
    learned = {"train": str(path), "space": {"evolution.sigma": {"low": 0.1, "high": 1.0}}}
    (found,) = tune(_config(content, trials=2, contestants={"learned": learned}), tmp_path / "out", processes=1)
    assert (tmp_path / "out" / "runs" / "learned" / "0001" / "policy" / "policy.json").is_file()
    assert Path(found.policies.engine.name).is_dir()


def test_another_search_does_not_go_into_the_same_folder(content: dict[str, Any], tmp_path: Path) -> None:
    tune(_config(content, trials=1), tmp_path / "out", processes=1)
    with pytest.raises(InputError, match="holds another search"):
        tune(_config(content, trials=1, seed=1), tmp_path / "out", processes=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"changes": {}}, r"changes.seeds other than those of .*, not \[0, 1\]"),
        ({"contestants": {"x": GIMBAL | {"space": {"engine.prefil": {"low": 1, "high": 2}}}}}, "engine.*prefil"),
        ({"contestants": {"x": GIMBAL | {"space": {"prefill": {"low": 1, "high": 2}}}}}, "LAYER.PARAMETER in space"),
        ({"contestants": {"x": GIMBAL | {"space": {"engine.kv": {"low": 2, "high": 1}}}}}, "low < high"),
        ({"contestants": {"x": {"train": "nothing", "space": GIMBAL["space"]}}}, "nothing"),
        ({"contestants": {"x": {"train": "dispatch_cma", "space": {"evolution.sgma": {"choices": [1, 2]}}}}}, "sgma"),
        ({"trials": 0}, "trials: got 0"),
    ],
)
def test_bad_configs_are_named(content: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _config(content, **changes)


def test_the_shipped_configs_are_valid() -> None:
    config = load_config(TuneConfig, "dispatch", "tune")
    assert len(config.judged().conditions) == 10
    placement = load_config(TuneConfig, "placement", "tune")
    assert len(placement.judged().conditions) == 6
