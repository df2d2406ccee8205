"""Training a policy from a config, with Stable-Baselines3."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.logger import Logger

from servegym.agents.runs import RunFolder, write_json
from servegym.agents.training import checkpoint
from servegym.agents.training.algorithms import make_model
from servegym.agents.training.callback import TrainingCallback
from servegym.agents.training.config import TrainConfig
from servegym.agents.training.episodes import EpisodeVecEnv
from servegym.agents.training.progress import TrainingProgress
from servegym.agents.training.scalars import LEARNING, TensorBoardScalars, open_writer
from servegym.configuration import load_mapping, validate
from servegym.engine_bridge.decisions import Decisions
from servegym.errors import InputError

# What may differ between a run and its continuation; anything else would make it another run.
_MAY_CHANGE = {"total_steps", "checkpoint_every_steps", "evaluation", "torch_threads", "backend"}


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run.

    Attributes:
        folder: the run folder.
        policy: bundle of the best policy.
        steps: decisions trained on.
        best_objective: lowest objective of all evaluations.
        evaluation: means of the last evaluation.
    """

    folder: Path
    policy: Path
    steps: int
    best_objective: float
    evaluation: dict[str, float]

    def plain(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return asdict(self) | {"folder": str(self.folder), "policy": str(self.policy)}


def train(
    config: TrainConfig | None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
    make_env: Callable[[Any], gym.Env[Any, Any]] | None = None,
) -> TrainResult:
    """Train a policy, or go on with an interrupted run.

    A run that is interrupted and resumed ends bit for bit as one that was not. Ctrl-C writes the state after the last
    update, says how to go on, and lets the KeyboardInterrupt through.

    Args:
        config: what to train; with ``resume``, None for the run's own config, else one that differs from it in nothing
            but length, evaluation, checkpoints and threads.
        out: the run folder; default ``runs/NAME/TIMESTAMP``.
        resume: an existing run folder.
        progress: show progress on stderr.
        make_env: makes the environment from its config, in place of the one that the config names; one of your own
            needs its spaces, and ``elapsed_s``, ``metrics`` and maybe ``reference_metrics`` in its info.

    Raises:
        InputError: a wrong config or a run that cannot be resumed.
    """
    if resume is not None:
        if out is not None:
            raise InputError("--out", str(out), "not together with a run to resume, which goes on in its own folder")
        run = RunFolder.open(resume)
        config = continuation(config, run)
        if run.done.is_file() and (result := read_result(run)).steps >= config.total_steps:
            return result
    elif config is None:
        raise InputError("train", "config", "missing; needed unless a run is resumed")
    if config.evolution is not None:
        return _search(config, run if resume is not None else None, out, progress)
    make_env = make_env or config.task.make
    # Both environments are made before the folder, so that a mistake in their configs leaves nothing behind.
    settings = config.algorithm
    envs = EpisodeVecEnv(partial(make_env, config.env), settings.n_envs, config.seed, settings.paired_envs)
    validation_env = make_env(config.validation_env())
    _check_spaces(validation_env, config.task.decisions)
    if resume is None:
        run = RunFolder.create(config.name, out, config.model_dump(mode="json"))
    threads = torch.get_num_threads()
    torch.set_num_threads(config.torch_threads)
    try:
        return _run(config, run, envs, validation_env, resume is not None, progress)
    finally:
        torch.set_num_threads(threads)
        envs.close()
        validation_env.close()


def _search(config: TrainConfig, resumed: RunFolder | None, out: str | Path | None, show: bool) -> TrainResult:
    from servegym.agents.training.search import Search

    # Made before the folder, so that a mistake in the config leaves nothing behind.
    search = Search(config)
    run = resumed or RunFolder.create(config.name, out, config.model_dump(mode="json"))
    search.run(run, resumed is not None, show)
    return read_result(run)


def _run(
    config: TrainConfig,
    run: RunFolder,
    envs: EpisodeVecEnv,
    validation_env: gym.Env[Any, Any],
    resumed: bool,
    show: bool,
) -> TrainResult:
    model = make_model(config, envs)
    best, start = math.inf, -1
    if resumed:
        path = run.newest_checkpoint()
        state = checkpoint.read(path)
        checkpoint.restore(model, envs, state, path)
        best, start = state["best_objective"], state["steps"]
        run.forget_after(start)
        run.write_config(config.model_dump(mode="json"))
    with (
        open_writer(run.tensorboard, LEARNING, start if resumed else None) as writer,
        TrainingProgress(config.total_steps, max(start, 0), show) as shown,
    ):
        model.set_logger(Logger(str(run.path), [TensorBoardScalars(writer)]))
        callback = TrainingCallback(config, run, envs, validation_env, shown, best, start)
        try:
            model.learn(
                config.total_steps - model.num_timesteps,
                callback=callback,
                reset_num_timesteps=not resumed,
            )
        except KeyboardInterrupt:
            if callback.save():
                print(f"interrupted; resume with: servegym train --resume {run.path}", file=sys.stderr, flush=True)
            raise
    outcome = {
        "steps": model.num_timesteps,
        "best_objective": callback.best.best_objective,
        "evaluation": callback.best.last_evaluation,
    }
    write_json(run.done, outcome)
    return read_result(run)


def read_result(run: RunFolder) -> TrainResult:
    """Return the result of a finished run."""
    return TrainResult(run.path, run.policy, **json.loads(run.done.read_text(encoding="utf-8")))


def _check_spaces(env: gym.Env[Any, Any], decisions: Decisions) -> None:
    """Raise ValueError unless the spaces are those of such decisions."""
    slots = getattr(env.action_space, "n", None)
    items, context = decisions.observation
    expected = {items: (slots, len(decisions.items)), context: (len(decisions.context),), "mask": (slots,)}
    parts = getattr(env.observation_space, "spaces", {})
    shapes = {key: part.shape for key, part in parts.items()}
    # Of a candidate, an environment may show more than the network takes.
    if len(shapes.get(items, ())) == 2:
        shapes[items] = (shapes[items][0], min(shapes[items][1], len(decisions.items)))
    if shapes != expected:
        raise ValueError(
            f"the observation has the parts {parts}; needed: shapes {expected}, slots as in Discrete(slots)"
        )


def continuation(config: TrainConfig | None, run: RunFolder) -> TrainConfig:
    """Return the config that a run goes on with: its own, or one given that may go on with it.

    Raises:
        InputError: the one given is of another run.
    """
    own = validate(TrainConfig, load_mapping(run.config), str(run.config))
    if config is None:
        return own
    before, after = own.identity(), config.identity()
    for name in before:
        if name not in _MAY_CHANGE and before[name] != after[name]:
            raise InputError(
                str(run.config), name, f"differs from the config given; only {', '.join(sorted(_MAY_CHANGE))} may"
            )
    return config
