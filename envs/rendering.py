"""Pictures and text of a simulated cluster as it is now, for ``render()`` of the environments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.errors import InputError

RENDER_MODES = ("ansi", "rgb_array")
_WIDTH, _HEIGHT, _DPI = 960, 540, 96
_RUNNING, _PREFILL, _WAITING, _KV = "#3b6fb6", "#8fb8e8", "#e08a3c", "#5a9e6f"


@dataclass(frozen=True, slots=True)
class Frame:
    """What is shown of a cluster; arrays of shape (engines,) unless said otherwise.

    Attributes:
        time_s: simulated time.
        finished: requests that have finished.
        requests: all requests.
        decoding: running requests that generate.
        prefilling: running requests that still prefill.
        waiting: waiting requests.
        slots: largest running batch.
        kv_usage: share of KV blocks in use.
        ttft_s: moving average of TTFT.
        alive: 1 where the engine takes requests.
        heat: load of each EP rank over the mean, by layer, shape (layers, ranks); None without an expert model.
    """

    time_s: float
    finished: int
    requests: int
    decoding: npt.NDArray[np.int64]
    prefilling: npt.NDArray[np.int64]
    waiting: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    kv_usage: npt.NDArray[np.float64]
    ttft_s: npt.NDArray[np.float64]
    alive: npt.NDArray[np.int64]
    heat: npt.NDArray[np.float64] | None = None

    @classmethod
    def of(cls, run: SimulatedCluster) -> Frame:
        """Take a picture of a run."""
        engines = run.memory.engines
        heat = run.experts.groups[0].rank_heat() if run.experts is not None else None
        return cls(
            time_s=run.decided_s,
            finished=run.finished,
            requests=len(run.table),
            decoding=engines["decoding"] + engines["leaving"],
            prefilling=engines["running"] - engines["decoding"],
            waiting=engines["waiting"].copy(),
            slots=engines["max_num_seqs"].copy(),
            kv_usage=1.0 - engines["free_blocks"] / (engines["num_blocks"] - 1),
            ttft_s=engines["ttft_ewma_s"].copy(),
            alive=engines["accepting"].copy(),
            heat=heat,
        )


def check_mode(name: str, mode: str | None) -> None:
    """Make sure that a render mode exists and that what it needs is installed.

    Raises:
        InputError: names the environment, the mode and what is allowed.
    """
    if mode is not None and mode not in RENDER_MODES:
        raise InputError(name, "render_mode", f"got {mode!r}; allowed: {', '.join(RENDER_MODES)}")
    if mode == "rgb_array":
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError:
            raise InputError(
                name, "render_mode", "rgb_array needs matplotlib; allowed: pip install 'servegym[plot]'"
            ) from None


def as_text(frame: Frame) -> str:
    """Return a line of text per engine."""
    lines = [f"t = {frame.time_s:.3f} s, {frame.finished:,} of {frame.requests:,} requests finished"]
    for e in range(len(frame.waiting)):
        bar = "#" * round(20 * frame.kv_usage[e])
        running = frame.decoding[e] + frame.prefilling[e]
        state = "" if frame.alive[e] else "  (takes no requests)"
        queues = f"running {running:4d}  waiting {frame.waiting[e]:4d}"
        lines.append(f"engine {e}: {queues}  KV [{bar:<20}] {frame.kv_usage[e]:4.0%}{state}")
    if frame.heat is not None:
        loads = "  ".join(f"{load:.2f}" for load in frame.heat.mean(axis=0))
        worst = frame.heat.max(axis=1).mean()
        lines.append(f"experts: load of ranks over the mean {loads}; heaviest rank of a layer {worst:.2f}")
    return "\n".join(lines)


def as_picture(frame: Frame) -> npt.NDArray[np.uint8]:
    """Return a picture, shape (540, 960, 3): batches and queues, KV use, and the heat of the experts' ranks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH / _DPI, _HEIGHT / _DPI), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    widths = [3.0, 1.4] + ([1.8] if frame.heat is not None else [])
    axes = np.atleast_1d(figure.subplots(1, len(widths), width_ratios=widths))
    engines = np.arange(len(frame.waiting))
    labels = [f"engine {e}" + ("" if frame.alive[e] else "\n(out)") for e in engines]
    queue = axes[0]
    left = np.zeros(len(engines))
    parts = (
        ("decoding", frame.decoding, _RUNNING),
        ("prefilling", frame.prefilling, _PREFILL),
        ("waiting", frame.waiting, _WAITING),
    )
    for label, counts, colour in parts:
        queue.barh(engines, counts, left=left, color=colour, label=label)
        left = left + counts
    for e in engines:
        queue.text(left[e], e, f"  TTFT {frame.ttft_s[e] * 1e3:.0f} ms", va="center", fontsize=8, color="#444444")
    queue.set_yticks(engines, labels)
    queue.set_ylim(len(engines) - 0.4, -0.6)
    queue.set_xlim(0, max(float(left.max()) * 1.35, float(frame.slots.min()) * 0.25, 8.0))
    queue.set_xlabel("requests")
    queue.legend(loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=3, frameon=False, fontsize=9)
    kv = axes[1]
    kv.barh(engines, frame.kv_usage * 100.0, color=_KV)
    kv.set_yticks([])
    kv.set_ylim(len(engines) - 0.4, -0.6)
    kv.set_xlim(0, 100)
    kv.set_xlabel("KV cache in use (%)")
    if frame.heat is not None:
        heat = axes[2]
        image = heat.imshow(frame.heat, aspect="auto", cmap="RdBu_r", vmin=0.5, vmax=1.5, interpolation="nearest")
        heat.set_xticks(np.arange(frame.heat.shape[1]))
        heat.set_xlabel("EP rank")
        heat.set_ylabel("MoE layer")
        figure.colorbar(image, ax=heat, label="load / mean")
    figure.suptitle(
        f"t = {frame.time_s:.2f} s    {frame.finished:,} of {frame.requests:,} requests finished", fontsize=11
    )
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()  # type: ignore[no-untyped-call]


def render(run: SimulatedCluster | None, mode: str | None) -> str | npt.NDArray[np.uint8] | None:
    """Return the picture or the text of a run, None without a run or a mode."""
    if run is None or mode is None:
        return None
    frame = Frame.of(run)
    return as_picture(frame) if mode == "rgb_array" else as_text(frame)
