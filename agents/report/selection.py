"""Which cell a report looks into, and which policies it draws beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from servegym.agents.evaluation.config import Cell, EvaluationConfig
from servegym.agents.evaluation.leaderboard import kind, leaderboard, log_values
from servegym.agents.evaluation.report import Evaluation
from servegym.errors import InputError, nearest

MOST_POLICIES = 6
"""More lines in one picture nobody tells apart; the tables have all policies."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a person wants to look into; None leaves the choice to :func:`select`.

    Attributes:
        workload: label of a condition.
        level: a load, or a rate.
        seed: of the cell.
        policies: labels of those to draw.
    """

    workload: str | None = None
    level: float | None = None
    seed: int | None = None
    policies: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """What a report looks into.

    Attributes:
        cell: the cell.
        policies: those drawn, in order of the leaderboard.
        why: how both were chosen, a sentence.
    """

    cell: Cell
    policies: tuple[str, ...]
    why: str


def select(result: Evaluation, wish: Wish | None = None) -> Selection:
    """Choose the cell whose TTFT differences are nearest to those of all cells, and the policies that matter most.

    These are the baseline, contestants, and the leading heuristics. Oracles are drawn on demand only.

    Raises:
        InputError: a wish that the evaluation does not hold.
    """
    wish = wish or Wish()
    config = result.config
    _check(config, wish)
    cell = _nearest_cell(result, wish)
    board = [row["policy"] for row in leaderboard(result)]
    chosen = set(wish.policies) if wish.policies else _leading(config, board)
    asked = wish.workload is not None or wish.level is not None or wish.seed is not None
    why = "as asked for" if asked else "the one whose TTFT differences are nearest to those of all cells together"
    return Selection(cell, tuple(label for label in board if label in chosen), why)


def _check(config: EvaluationConfig, wish: Wish) -> None:
    labels = [condition.label for condition in config.conditions]
    if wish.workload is not None and wish.workload not in labels:
        raise InputError("--workload", wish.workload, f"not in the evaluation; {nearest(wish.workload, labels)}")
    for option, value, known in (("--load", wish.level, config.levels), ("--seed", wish.seed, config.seed_list)):
        if value is not None and value not in known:
            raise InputError(option, f"{value:g}", f"allowed: {', '.join(f'{one:g}' for one in known)}")
    for label in wish.policies or ():
        if label not in config.policies:
            raise InputError("--policies", label, f"not in the evaluation; {nearest(label, config.policies)}")
    if wish.policies and len(wish.policies) > MOST_POLICIES:
        raise InputError("--policies", ",".join(wish.policies), f"allowed: at most {MOST_POLICIES}")


def _leading(config: EvaluationConfig, board: Sequence[str]) -> set[str]:
    kinds = {label: kind(policies) for label, policies in config.policies.items()}
    ranked = [label for wanted in ("contestant", "heuristic") for label in board if kinds[label] == wanted]
    others = [label for label in ranked if label != config.baseline]
    return {config.baseline, *others[: MOST_POLICIES - 1]}


def _nearest_cell(result: Evaluation, wish: Wish) -> Cell:
    config = result.config
    logs = np.array([log_values(result, "ttft_s", label) for label in config.policies])  # (policies, conditions, seeds)
    ratios = logs - logs[list(config.policies).index(config.baseline)]
    distance = np.nan_to_num(np.square(ratios - np.nanmean(ratios, axis=(1, 2), keepdims=True)), nan=1e6).sum(axis=0)
    allowed = [
        (float(distance[row, column]), (index, level, seed))
        for row, (index, level) in enumerate(
            (index, level) for index in range(len(config.conditions)) for level in config.levels
        )
        for column, seed in enumerate(config.seed_list)
        if wish.workload in (None, config.conditions[index].label)
        and wish.level in (None, level)
        and wish.seed in (None, seed)
    ]
    return min(allowed)[1]
