"""A run's figures in TensorBoard: scalars, and the page *Custom Scalars* that lays them out."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import KVWriter
from torch.utils.tensorboard import SummaryWriter

from servegym.agents.training.episodes import FinishedEpisode
from servegym.agents.training.validation import METRICS
from servegym.baselines.interface import FloatArray

_TITLES = {"ttft_s": "TTFT, s", "ttft_p99_s": "TTFT p99, s", "tpot_s": "TPOT, s", "e2e_s": "E2E, s"}
_AGAINST = {
    "ratio to the reference, below 1 is better": ["Multiline", [r"evaluation/(ttft_s|ttft_p99_s|tpot_s|e2e_s)_ratio$"]],
    "objective, lower is better": ["Multiline", ["evaluation/objective$"]],
} | {
    f"{title}: policy and reference": ["Multiline", [f"(evaluation|reference)/{name}$"]]
    for name, title in _TITLES.items()
}
_SHARES = {"share of each choice": ["Multiline", [r"policy/share_\w+$"]]}

LEARNING = {
    "Policy against reference": _AGAINST,
    "Decisions": {"entropy of the actions, nats": ["Multiline", ["policy/entropy$"]]}
    | _SHARES
    | {"change by an update: KL divergence, clipped share": ["Multiline", ["train/(approx_kl|clip_fraction)$"]]},
    "Value function": {
        "error: mean square, in returns": ["Multiline", ["train/value_loss$"]],
        "explained variance, 1 is best": ["Multiline", ["train/explained_variance$"]],
        "return of episodes": ["Multiline", ["(rollout|evaluation)/return$"]],
    },
}
"""Layout of a run of Stable-Baselines3: category -> chart -> kind and tags, regular expressions."""

SEARCH = {
    "Policy against reference": _AGAINST,
    "Search": {
        "cost of a generation: median, best, upper quartile": [
            "Margin",
            ["search/cost_median", "search/cost_best", "search/cost_p75"],
        ],
        "spread of the candidates: deviation of a weight": ["Multiline", ["search/spread$"]],
    },
    "Decisions": _SHARES,
}
"""Layout of a search by CMA-ES."""


def open_writer(folder: Path, layout: Mapping[str, Any], resumed_at: int | None) -> SummaryWriter:
    """Open a run's TensorBoard log.

    Args:
        folder: of the log.
        layout: of its page *Custom Scalars*.
        resumed_at: steps of the checkpoint of a run that goes on; what came after it is overwritten.
    """
    writer = SummaryWriter(str(folder), purge_step=None if resumed_at is None else resumed_at + 1)
    writer.add_custom_scalars(dict(layout))
    return writer


class TensorBoardScalars(KVWriter):
    """Writes every number of a record of Stable-Baselines3.

    Args:
        writer: where to.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Write one record."""
        for key, value in sorted(key_values.items()):
            if isinstance(value, numbers.Real) and "tensorboard" not in key_excluded.get(key, ()):
                self._writer.add_scalar(key, float(value), step)
        self._writer.flush()

    def close(self) -> None:
        """Leave the writer open: its owner closes it."""


class SearchScalars:
    """Writes what a search by CMA-ES comes to.

    Args:
        writer: where to.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def generation(self, steps: int, candidates: Sequence[FloatArray], costs: Sequence[float]) -> None:
        """Write the costs of a generation, and how far apart its candidates are."""
        best, median, upper = np.quantile(costs, (0.0, 0.5, 0.75))
        figures = {"cost_best": best, "cost_median": median, "cost_p75": upper}
        figures["spread"] = np.std(candidates, axis=0).mean()
        self._write({f"search/{name}": value for name, value in figures.items()}, steps)

    def evaluation(self, steps: int, means: Mapping[str, float], episodes: Sequence[FinishedEpisode]) -> None:
        """Write an evaluation, beside the reference, and the share of each engine."""
        figures = {f"evaluation/{name}": value for name, value in means.items()} | reference_means(episodes)
        shares = [episode.metrics.get("engine_share", ()) for episode in episodes]
        for engine in range(max(map(len, shares))):
            mean = np.mean([share[engine] if engine < len(share) else 0.0 for share in shares])
            figures[f"policy/share_engine_{engine:02d}"] = float(mean)
        self._write(figures, steps)

    def _write(self, figures: Mapping[str, float], steps: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, float(value), steps)
        self._writer.flush()


def reference_means(episodes: Sequence[FinishedEpisode]) -> dict[str, float]:
    """Return ``reference/METRIC``, means over episodes; empty without a reference."""
    return {
        f"reference/{name}": float(np.mean([episode.reference_metrics[name] for episode in episodes]))
        for name in METRICS
        if all(name in episode.reference_metrics for episode in episodes)
    }
