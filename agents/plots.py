"""Pictures of simulations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from servegym.envs.simulation import SimulationConfig, SimulationResult
from servegym.errors import InputError

_SUFFIXES = (".png", ".svg", ".pdf")
# Column of a timeline, label of the axis, factor.
_PANELS = (
    ("balancedness", "balancedness\n(mean / heaviest rank)", 1.0),
    ("tpot_s", "TPOT (ms)", 1e3),
    ("ttft_s", "TTFT (ms)", 1e3),
    ("waiting", "waiting requests", 1.0),
)


def check_plot(path: Path, config: SimulationConfig) -> None:
    """Make sure that a picture can be drawn before anything is simulated.

    Raises:
        InputError: no timeline, another kind of file, no such folder, or matplotlib is absent.
    """
    if config.timeline_s is None:
        raise InputError("--plot", str(path), "the config has no timeline_s; allowed: seconds, as --set timeline_s=5")
    if path.suffix not in _SUFFIXES:
        raise InputError("--plot", str(path), f"allowed: a file that ends in {', '.join(_SUFFIXES)}")
    if not path.resolve().parent.is_dir():
        raise InputError("--plot", str(path), "the folder does not exist")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise InputError("--plot", str(path), "matplotlib is not installed; allowed: pip install matplotlib") from None


def plot_timelines(path: Path, results: Sequence[SimulationResult]) -> None:
    """Draw runs of the same requests over each other.

    Args:
        path: file to write.
        results: runs with a timeline.
    """
    from matplotlib.figure import Figure

    timelines: list[dict[str, Any]] = [result.timeline or {} for result in results]
    panels = [panel for panel in _PANELS if all(panel[0] in timeline for timeline in timelines)]
    figure = Figure(figsize=(9, 2.1 * len(panels)), layout="constrained")
    for axes, (column, label, factor) in zip(
        np.atleast_1d(figure.subplots(len(panels), 1, sharex=True)), panels, strict=True
    ):
        for result, timeline in zip(results, timelines, strict=True):
            values = np.array(timeline[column], dtype=float) * factor
            axes.plot(timeline["time_s"], values, label=_label(result, results), linewidth=1.4)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    first = figure.axes[0]
    first.legend(loc="lower left", ncols=len(results), frameon=False, bbox_to_anchor=(0.0, 1.0))
    figure.axes[-1].set_xlabel("time (s)")
    figure.savefig(path, dpi=120)


def _label(result: SimulationResult, results: Sequence[SimulationResult]) -> str:
    """The policies in which the runs differ."""
    specs = [other.config.policies for other in results]
    differing = [layer for layer in ("request", "engine", "expert") if len({str(getattr(s, layer)) for s in specs}) > 1]
    return ", ".join(f"{layer} {getattr(result.config.policies, layer)}" for layer in differing or ["expert"])
