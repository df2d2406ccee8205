"""Whole runs: the same result twice, after an interruption too, and better than where they started."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from servegym.agents.training import checkpoint
from servegym.agents.training.config import TrainConfig
from servegym.agents.training.scalars import LEARNING
from servegym.agents.training.trainer import train
from servegym.configuration import validate
from servegym.engine_bridge.bundle import load_bundle
from servegym.envs.dispatch_lanes import DispatchLanes
from servegym.errors import InputError


def final_state(folder: Path) -> dict:
    return checkpoint.read(sorted((folder / "checkpoints").glob("*.pt"))[-1])


def assert_same(first, second) -> None:
    """Equal to the last bit, through all levels."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for mine, other in zip(first, second, strict=True):
            assert_same(mine, other)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


class Interrupted:
    """Makes environments that together raise KeyboardInterrupt at the given step, as Ctrl-C does."""

    def __init__(self, make_toy, at_step: int) -> None:
        self.make_toy, self.at_step, self.steps = make_toy, at_step, itertools.count(1)

    def __call__(self, config):
        env = self.make_toy(config)
        plain = env.step

        def step(action):
            if next(self.steps) == self.at_step:
                raise KeyboardInterrupt
            return plain(action)

        env.step = step
        return env


def test_an_update_that_breaks_the_network_ends_the_run(make_config, make_toy, tmp_path: Path) -> None:
    config = make_config(algorithm={"learning_rate": 1e30})
    with pytest.raises(FloatingPointError, match="entropy after 256 steps is nan; a lower learning_rate"):
        train(config, out=tmp_path / "run", progress=False, make_env=make_toy)


@pytest.mark.parametrize("algorithm", ["MaskablePPO", "PPO"])
def test_the_same_config_trains_to_the_same_bits(algorithm, make_config, make_toy, tmp_path: Path) -> None:
    config = make_config(algorithm={"name": algorithm})
    for name in ("first", "second"):
        train(config, out=tmp_path / name, progress=False, make_env=make_toy)
    assert_same(final_state(tmp_path / "first"), final_state(tmp_path / "second"))
    evaluations = [(tmp_path / name / "evaluations.jsonl").read_text() for name in ("first", "second")]
    assert evaluations[0] == evaluations[1]
    other = train(
        make_config(algorithm={"name": algorithm}, seed=1), out=tmp_path / "other", progress=False, make_env=make_toy
    )
    assert not torch.equal(
        final_state(other.folder)["policy"]["value_net.weight"],
        final_state(tmp_path / "first")["policy"]["value_net.weight"],
    )


@pytest.mark.parametrize("at_step", [700, 1400])
def test_an_interrupted_run_resumes_to_the_same_bits(at_step, make_config, make_toy, tmp_path: Path, capsys) -> None:
    config = make_config()
    whole = train(config, out=tmp_path / "whole", progress=False, make_env=make_toy)
    with pytest.raises(KeyboardInterrupt):
        train(config, out=tmp_path / "cut", progress=False, make_env=Interrupted(make_toy, at_step))
    assert capsys.readouterr().err.splitlines() == [
        f"interrupted; resume with: servegym train --resume {tmp_path / 'cut'}"
    ]
    assert not (tmp_path / "cut" / "done.json").exists()
    torch.rand(1)  # another process has other global generators
    resumed = train(None, resume=tmp_path / "cut", progress=False, make_env=make_toy)
    assert_same(final_state(resumed.folder), final_state(whole.folder))
    for name in ("evaluations.jsonl", "done.json", "policy/policy.json", "policy_last/policy.safetensors"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert (resumed.steps, resumed.best_objective) == (whole.steps, whole.best_objective)


def test_a_finished_run_returns_at_once_and_can_be_made_longer(make_config, make_toy, tmp_path: Path) -> None:
    first = train(make_config(total_steps=512), out=tmp_path / "run", progress=False, make_env=make_toy)
    assert train(None, resume=tmp_path / "run", progress=False, make_env=None) == first
    longer = train(make_config(total_steps=1024), resume=tmp_path / "run", progress=False, make_env=make_toy)
    assert (first.steps, longer.steps) == (512, 1024)
    assert "total_steps: 1024" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_run_learns_what_its_heuristic_does_not_know(make_config, make_toy, tmp_path: Path) -> None:
    config = make_config(
        total_steps=40_000,
        algorithm={"n_envs": 32, "n_steps": 32, "batch_size": 512, "n_epochs": 4, "learning_rate": 3e-3},
        evaluation={"every_steps": 10_000, "episodes": 20},
    )
    result = train(config, out=tmp_path / "run", progress=False, make_env=make_toy)
    rows = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert rows[0]["steps"] == 0
    assert rows[0]["ttft_s_ratio"] == pytest.approx(1.0, abs=1e-6)  # the untrained policy is the reference
    assert result.best_objective < 0.9
    assert load_bundle(result.folder).manifest.training.evaluation["objective"] == result.best_objective


def test_the_run_folder_has_all_that_it_should(make_config, make_toy, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second within the same second
        result = train(make_config(total_steps=256), progress=False, make_env=make_toy)
    assert len([path for path in (tmp_path / "runs" / "toy").iterdir() if not path.is_symlink()]) == 2
    latest = tmp_path / "runs" / "toy" / "latest"
    assert latest.resolve() == result.folder.resolve()
    versions = json.loads((latest / "versions.json").read_text())
    assert {"torch", "stable-baselines3", "numpy"} <= versions["packages"].keys()
    files = {"config.yaml", "versions.json", "evaluations.jsonl", "done.json"}
    assert {path.name for path in latest.iterdir()} == files | {"tensorboard", "checkpoints", "policy", "policy_last"}


def test_tensorboard_has_the_scalars(make_config, make_toy, tmp_path: Path) -> None:
    train(make_config(), out=tmp_path / "run", progress=False, make_env=make_toy)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {
        "rollout/return",
        "rollout/ttft_s",
        "rollout/ttft_s_ratio",
        "evaluation/ttft_s_ratio",
        "evaluation/objective",
        "policy/entropy",
        "policy/share_engine_00",
        "train/value_loss",
        "train/explained_variance",
        "time/fps",
    } <= set(events.Tags()["scalars"])
    shares = [events.Scalars(f"policy/share_engine_{engine:02d}")[-1].value for engine in range(4)]
    assert sum(shares) == pytest.approx(1.0)
    assert shares[3] == 0.0  # an empty slot
    reference = events.Scalars("reference/ttft_s")
    assert [event.step for event in reference] == [event.step for event in events.Scalars("evaluation/ttft_s")]
    # Each chart of the page "Custom Scalars" finds its scalars, those apart that the toy's metrics lack.
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert {category.title for category in layout.category} == set(LEARNING)
    tags = events.Tags()["scalars"]
    empty = [
        chart.title
        for category in layout.category
        for chart in category.chart
        if not any(re.match(pattern, tag) for pattern in chart.multiline.tag for tag in tags)
    ]
    assert empty == [f"{metric}, s: policy and reference" for metric in ("TTFT p99", "TPOT", "E2E")]


def test_progress_is_one_line_a_minute_without_a_terminal(
    make_config, make_toy, tmp_path: Path, capsys, monkeypatch
) -> None:
    train(make_config(), out=tmp_path / "quiet", make_env=make_toy)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("servegym.agents.progress.HEARTBEAT_S", 0.0)
    monkeypatch.delenv("CI", raising=False)
    train(make_config(), out=tmp_path / "spoken", make_env=make_toy)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8  # rollouts
    assert lines[-1].startswith("train: 2,048 of 2,048 steps")
    assert "vs reference" in lines[-1]


def test_what_cannot_be_resumed_is_said_in_one_line(make_config, make_toy, tmp_path: Path) -> None:
    def refused(match: str, *arguments, **keywords) -> None:
        with pytest.raises(InputError, match=match) as caught:
            train(*arguments, progress=False, make_env=make_toy, **keywords)
        assert "\n" not in str(caught.value)

    refused("not a run folder", None, resume=tmp_path)
    refused("config: missing", None)
    run = tmp_path / "run"
    train(make_config(total_steps=256), out=run, progress=False, make_env=make_toy)
    refused("is not empty", make_config(), out=run)
    refused("not together with a run to resume", None, out=run, resume=run)
    refused("network: differs", make_config(network={"width": 8}), resume=run)
    sorted((run / "checkpoints").glob("*.pt"))[-1].write_bytes(b"not torch")
    refused("not a readable checkpoint", make_config(), resume=run)
    for path in (run / "checkpoints").glob("*.pt"):
        path.unlink()
    refused("checkpoints: empty", make_config(), resume=run)


@pytest.mark.parametrize("name", ["MaskablePPO", "PPO"])
def test_environments_stepped_together_train_to_the_same_bits_as_one_by_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {
        "name": "lanes",
        "total_steps": 256,
        "checkpoint_every_steps": 256,
        "algorithm": {"name": name, "n_envs": 4, "n_steps": 32, "batch_size": 64, "n_epochs": 1},
        "network": {"width": 4},
        "evaluation": {"every_steps": 256, "episodes": 1},
        "env": {"cluster": {"engines": 2}, "episode_requests": 20, "reference": "lmetric"},
    }
    config = validate(TrainConfig, content, "test")
    train(config, out=tmp_path / "together", progress=False)
    monkeypatch.setattr(DispatchLanes, "suit", staticmethod(lambda envs: False))
    train(config, out=tmp_path / "alone", progress=False)
    assert_same(final_state(tmp_path / "together"), final_state(tmp_path / "alone"))
    # A checkpoint of the one is a checkpoint of the other.
    longer = config.model_copy(update={"total_steps": 512})
    train(longer, resume=tmp_path / "together", progress=False)
    monkeypatch.undo()
    train(longer, resume=tmp_path / "alone", progress=False)
    assert_same(final_state(tmp_path / "together"), final_state(tmp_path / "alone"))
