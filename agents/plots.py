"""Pictures of simulations and of searches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from servegym.envs.simulation import SimulationConfig, SimulationResult
from servegym.errors import InputError

if TYPE_CHECKING:
    from servegym.agents.validation import Compared, Ranking, Validation
    from servegym.envs.calibration.calibrate import Calibration

_SUFFIXES = (".png", ".svg", ".pdf")
# Column of a timeline, label of the axis, factor.
_PANELS = (
    ("balancedness", "balancedness\n(mean / heaviest rank)", 1.0),
    ("tpot_s", "TPOT (ms)", 1e3),
    ("ttft_s", "TTFT (ms)", 1e3),
    ("waiting", "waiting requests", 1.0),
)


def check_plot(path: Path, config: SimulationConfig) -> None:
    """Make sure that a run can be drawn before anything is simulated.

    Raises:
        InputError: no timeline, or as :func:`check_image`.
    """
    if config.timeline_s is None:
        raise InputError("--plot", str(path), "the config has no timeline_s; allowed: seconds, as --set timeline_s=5")
    check_image(path)


def check_image(path: Path) -> None:
    """Make sure that a picture can be drawn before anything else is done.

    Raises:
        InputError: another kind of file, no such folder, or matplotlib is absent.
    """
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


def plot_importance(path: Path, importance: Mapping[str, Mapping[str, float]]) -> None:
    """Draw the importance of parameters, a panel per contestant.

    Args:
        path: file to write.
        importance: shares by contestant and parameter; contestants without any are left out.
    """
    from matplotlib.figure import Figure

    shown = {label: shares for label, shares in importance.items() if shares} or {"too few trials": {}}
    rows = [max(1, len(shares)) for shares in shown.values()]
    figure = Figure(figsize=(7, 0.32 * sum(rows) + 0.55 * len(rows)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(shown), 1, sharex=True, height_ratios=rows))
    for axes, (label, shares) in zip(panels, shown.items(), strict=True):
        axes.barh(list(shares), [100 * share for share in shares.values()], height=0.7)
        axes.invert_yaxis()
        axes.set_title(label, loc="left", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    panels[-1].set_xlabel("share of what the best tenth of the trials have in common (%)")
    figure.savefig(path, dpi=120)


def plot_calibration(path: Path, result: Calibration) -> None:
    """Draw measured against fitted steps, and the errors by point, for a calibration.

    Args:
        path: file to write.
        result: the calibration.
    """
    from matplotlib.figure import Figure

    fitted = 1e-3 * result.fit.fitted_us
    measured = 1e-3 * np.array([row.us for row in result.fit.rows])
    kinds = np.array([row.kind for row in result.fit.rows])
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind in ("decode", "prefill", "mixed", "traffic"):
        rows = kinds == kind
        if rows.any():
            left.loglog(fitted[rows], measured[rows], "o", ms=3, alpha=0.6, label=kind)
            right.semilogx(fitted[rows], 100 * (measured[rows] / fitted[rows] - 1), "o", ms=3, alpha=0.6, label=kind)
    ends = [fitted.min(), fitted.max()]
    left.loglog(ends, ends, "k-", lw=0.8)
    right.axhline(0, color="k", lw=0.8)
    left.set(xlabel="fitted step (ms)", ylabel="measured step (ms)")
    right.set(xlabel="fitted step (ms)", ylabel="measured over fitted (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def plot_validation(path: Path, result: Validation) -> None:
    """Draw the queue over time of each scenario and load under the first policy, and the rankings.

    Queue: requests that are sent and have no token yet; of the first repetition, with the range of the live others.

    Args:
        path: file to write.
        result: the validation.
    """
    from matplotlib.figure import Figure

    first = next(iter(result.config.policies))
    cells = [one for one in result.compared if one.policy == first]
    rankings = result.rankings
    columns = max(len(scenario.loads) for scenario in result.config.scenarios.values())
    rows = -(-(len(cells) + len(rankings)) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(cells) + len(rankings) :]:
        panel.set_visible(False)
    for panel, one in zip(panels, cells, strict=False):
        _plot_queue(panel, one)
    for panel, ranking in zip(panels[len(cells) :], rankings, strict=False):
        _plot_ranking(panel, ranking)
    panels[0].legend(fontsize=7)
    panels[0].set(xlabel="time (s)", ylabel="requests without token")
    figure.savefig(path, dpi=120)


def _plot_queue(panel: Any, one: Compared) -> None:
    queues = [row["queue"] for row in one.rows]
    span = min(len(queue["live"]) for queue in queues)
    live = np.array([queue["live"][:span] for queue in queues])
    times = queues[0]["time_s"][:span]
    panel.fill_between(times, live.min(axis=0), live.max(axis=0), alpha=0.25, lw=0, label="live, all repetitions")
    panel.plot(times, live[0], lw=1.1, label="live")
    panel.plot(times, queues[0]["simulated"][:span], lw=1.1, ls="--", label="simulated")
    if "at_speed" in one.sides:
        panel.plot(times, queues[0]["at_speed"][:span], lw=1.1, ls=":", label="at the machine's speed")
    panel.set_ylim(bottom=0)
    panel.set_title(f"{one.scenario}, load {one.load:g}", fontsize=9, loc="left")
    panel.grid(alpha=0.3)


def _plot_ranking(panel: Any, ranking: Ranking) -> None:
    live, simulated = 1e3 * np.array(ranking.live), 1e3 * np.array(ranking.simulated)
    panel.plot(live, simulated, "o", ms=4)
    for x, y, policy in zip(live, simulated, ranking.policies, strict=True):
        panel.annotate(policy, (x, y), fontsize=6, xytext=(3, 2), textcoords="offset points")
    ends = [min(live.min(), simulated.min()), max(live.max(), simulated.max())]
    panel.plot(ends, ends, "k-", lw=0.8)
    panel.set(xlabel="live TTFT (ms)", ylabel="simulated TTFT (ms)")
    panel.set_title(f"{ranking.scenario}, load {ranking.load:g}", fontsize=9, loc="left")
    panel.grid(alpha=0.3)


def _label(result: SimulationResult, results: Sequence[SimulationResult]) -> str:
    """The policies in which the runs differ."""
    specs = [other.config.policies for other in results]
    differing = [layer for layer in ("request", "engine", "expert") if len({str(getattr(s, layer)) for s in specs}) > 1]
    return ", ".join(f"{layer} {getattr(result.config.policies, layer)}" for layer in differing or ["expert"])
