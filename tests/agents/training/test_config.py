"""Training configs: mistakes are named in one line, and reading one costs no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from servegym.agents.training.config import TrainConfig, merged
from servegym.configuration import load_config, shipped_configs
from servegym.errors import InputError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("total_step=5", "total_step: unknown key; did you mean total_steps?"),
        ("total_steps=0", "total_steps: got 0; allowed: greater than or equal to 1"),
        ("total_steps=many", "total_steps: got 'many'; allowed: a valid integer"),
        ("seed=-1", "seed: got -1; allowed: greater than or equal to 0"),
        ("name=a/b", "name: got 'a/b'; allowed: String should match pattern"),
        ("algorithm.name=SAC", "algorithm.name: got 'SAC'; allowed: 'MaskablePPO' or 'PPO'"),
        ("algorithm.learning_rate=.nan", "algorithm.learning_rate: got nan; allowed: a finite number"),
        ("algorithm.batch_size=1000", "algorithm.batch_size: got 1000; allowed: a divisor of n_envs * n_steps = 8192"),
        ("network.prior=fifo", "network.prior: got 'fifo'; allowed: 'lmetric', 'least_requests', 'shortest', 'aged'"),
        (
            "environment=Nothing-v0",
            "environment: got 'Nothing-v0'; allowed: 'EngineDispatch-v0', 'RequestOrdering-v0' or 'ExpertPlacement-v0'",
        ),
        ("environment=RequestOrdering-v0", "a network.prior for RequestOrdering-v0, not lmetric: shortest, aged"),
        ("network.depth=2", "network.depth: unknown key"),
        ("evaluation.env={episode_request: 5}", "evaluation.env: episode_request: unknown key"),
        ("env={episode_request: 5}", "env.episode_request: unknown key; did you mean episode_requests?"),
    ],
)
def test_a_mistake_is_one_line_with_file_field_and_value(override: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntotal_steps: 100\n")
    with pytest.raises(InputError) as caught:
        load_config(TrainConfig, path, "train", [override])
    line = str(caught.value)
    assert "\n" not in line
    assert message in line
    assert line.startswith((str(path), "evaluation.env"))


def test_a_config_without_the_required_fields_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\n")
    with pytest.raises(InputError, match="total_steps: missing"):
        load_config(TrainConfig, path, "train")


def test_shipped_configs_are_valid_and_named_after_their_files() -> None:
    shipped = shipped_configs("train")
    assert "dispatch_ppo" in shipped
    for name in shipped:
        config = load_config(TrainConfig, name, "train")
        assert config.name == name
        assert config.env.reference is not None


def test_the_hash_follows_every_value(make_config) -> None:
    assert make_config().sha256() == make_config().sha256()
    assert make_config().sha256() != make_config(network={"width": 17}).sha256()


def test_merging_goes_into_mappings_and_leaves_the_base_alone() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    assert merged(base, {"a": {"c": {"d": 3}}, "e": [2], "f": 4}) == {"a": {"b": 1, "c": {"d": 3}}, "e": [2], "f": 4}
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}


@pytest.mark.parametrize("module", ["servegym", "servegym.engine_bridge.bundle", "servegym.agents.training.config"])
def test_reading_configs_and_bundles_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'stable_baselines3', 'sb3_contrib'}} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3] / "src"
    )
    assert result.stdout.strip() == ""
