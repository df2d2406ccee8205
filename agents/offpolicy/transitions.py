"""Logged decisions of a deployment as arrays: what was seen, what was chosen with which probability, what it cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from servegym.baselines.features import Float32Array
from servegym.baselines.interface import E_AVAILABLE, ENGINE_COLUMNS, R_DEADLINE_S, REQUEST_COLUMNS, FloatArray
from servegym.engine_bridge.decisions import DISPATCH
from servegym.errors import InputError

METRICS = ("ttft_s", "e2e_s", "tpot_s")


@dataclass(frozen=True, slots=True)
class Transitions:
    """Decisions in order of arrival; engines beyond a decision's own are padding.

    Attributes:
        items: features of the engines, shape (decisions, engines, features).
        context: features of the requests, shape (decisions, features).
        mask: which engines might be chosen, shape (decisions, engines).
        action: the engine that was chosen, shape (decisions,).
        propensity: its probability, shape (decisions,).
        cost: weighted logarithm of what the request took, shape (decisions,).
        dropped: lines of the logs that are no such decision, by reason.
    """

    items: Float32Array
    context: Float32Array
    mask: npt.NDArray[np.bool_]
    action: npt.NDArray[np.int64]
    propensity: FloatArray
    cost: FloatArray
    dropped: Counter[str]

    def __len__(self) -> int:
        return len(self.action)

    def part(self, chosen: slice | npt.NDArray[np.bool_]) -> Transitions:
        """Return some of the decisions."""
        names = ("items", "context", "mask", "action", "propensity", "cost")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})


def read_transitions(paths: Sequence[Path], objective: Mapping[str, float]) -> Transitions:
    """Read decision logs that were written with ``log_observations``.

    A request's cost is ``sum of weight * ln(metric)``, so that a difference of costs is the logarithm of a ratio.

    Args:
        paths: logs of one cluster.
        objective: weights of ``ttft_s``, ``e2e_s`` and ``tpot_s``.

    Raises:
        InputError: a file that cannot be read, or no usable decision in any.
    """
    found, dropped = [], Counter[str]()
    for path in paths:
        for number, line in _lines(path):
            try:
                record = dict(json.loads(line).items())
                reason, cost = _cost(record, objective)
                if reason:
                    dropped[reason] += 1
                    continue
                found.append((record, _row(record["observation"]), cost))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(f"{path}:{number}", "", "not a line of a decision log") from None
    if not found:
        said = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "empty"
        wanted = "logs of deployments with log_observations: true and epsilon above 0"
        raise InputError(str(paths[0]), "", f"no decision to learn from ({said}); allowed: {wanted}")
    found.sort(key=lambda entry: entry[0]["arrival_s"])
    engines = max(len(matrix) for _, (_, matrix), _ in found)
    items = np.zeros((len(found), engines, len(DISPATCH.items)), dtype=np.float32)
    context = np.zeros((len(found), len(DISPATCH.context)), dtype=np.float32)
    mask = np.zeros((len(found), engines), dtype=np.bool_)
    usable = np.zeros(len(found), dtype=np.bool_)
    for index, (_, (row, matrix), _) in enumerate(found):
        DISPATCH.fill(row, matrix, items[index, : len(matrix)], context[index])
        mask[index, : len(matrix)] = DISPATCH.eligible(matrix)
        usable[index] = np.isfinite(items[index]).all() and np.isfinite(context[index]).all()
    if not usable.all():
        dropped["with features that are not finite"] += int((~usable).sum())
    return Transitions(
        items,
        context,
        mask,
        action=np.array([record["chosen"] for record, _, _ in found], dtype=np.int64),
        propensity=np.array([record["propensity"] for record, _, _ in found], dtype=np.float64),
        cost=np.array([cost for _, _, cost in found]),
        dropped=dropped,
    ).part(usable)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), "", f"cannot be read: {error}") from None
    # The last line of a deployment that was killed may be cut short.
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return enumerate(lines, start=1)


def _cost(record: Mapping[str, Any], objective: Mapping[str, float]) -> tuple[str, float]:
    """Return why a decision is of no use, empty if it is, and its cost."""
    if "observation" not in record:
        return "without observation", 0.0
    if record["ended"] != "complete":
        return str(record["ended"]), 0.0
    if record["engine"] != record["chosen"]:
        return "served by another engine", 0.0
    if record["propensity"] >= 1.0 and len(record["observation"]["engines"]) > 1:
        return "chosen for sure", 0.0
    output, ttft, e2e = record["output_tokens"], record["ttft_s"], record["e2e_s"]
    metrics = {"ttft_s": ttft, "e2e_s": e2e}
    if output is not None and output > 1 and ttft is not None and e2e is not None:
        metrics["tpot_s"] = (e2e - ttft) / (output - 1)
    cost = 0.0
    for name, weight in objective.items():
        value = metrics.get(name)
        if value is None or value <= 0:
            return f"without {name}", 0.0
        cost += weight * float(np.log(value))
    return "", cost


def _row(observation: Mapping[str, Any]) -> tuple[FloatArray, FloatArray]:
    """Return the ``R_*`` row and the ``E_*`` matrix; what was not finite is null in the log."""
    row = np.array(observation["request"], dtype=np.float64)
    matrix = np.array(observation["engines"], dtype=np.float64)
    if row.shape != (REQUEST_COLUMNS,) or matrix.ndim != 2 or matrix.shape[1] != ENGINE_COLUMNS:
        raise ValueError("a view of another version")
    if np.isnan(row[R_DEADLINE_S]):
        row[R_DEADLINE_S] = np.inf
    if np.isnan(matrix[:, E_AVAILABLE]).any():
        raise ValueError("no engine")
    return row, matrix
