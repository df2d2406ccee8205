"""ServeGen: not a list of requests but rates, burstiness and lengths of real clients, from which requests are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from servegym.envs.workloads.distributions import MOST_TOKENS
from servegym.envs.workloads.table import Float, Int32, Int64
from servegym.envs.workloads.traces.columns import INTEGER, SECONDS, Label, Number
from servegym.envs.workloads.traces.files import TraceFile, open_trace
from servegym.envs.workloads.traces.format import Trace, TraceFormat, drop, in_order
from servegym.errors import InputError, nearest

if TYPE_CHECKING:
    from servegym.envs.workloads.traces.config import TraceConfig

# Of a client's rate and burstiness, and of its lengths.
_WINDOW_S = 600.0
_PROBABILITIES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_KNOTS = np.array([0.0, *_PROBABILITIES, 1.0])
_ITEMS = ("mean", *(f"q{100 * p:02.0f}" for p in _PROBABILITIES))
# Multimodal models have no input_tokens, but their parts; the others have input_tokens alone.
_PROMPT = ("input_tokens", "text_tokens", "image_tokens", "audio_tokens", "video_tokens")
_TOKENS_OR_NONE = Number(empty=-1.0)
_DEFAULT_DURATION_S = 3600.0
# A draw larger than this is a mistake: the largest model sees two billion requests in its two weeks.
_MOST_REQUESTS = 20_000_000


def _read(file: TraceFile, config: TraceConfig) -> Trace:
    positive = Number(low=1e-9)
    windows = file.read(
        {"model": Label(), "client": INTEGER, "t_s": SECONDS, "rate": SECONDS, "shape": positive, "pattern": Label()}
    )
    model = _model(file, windows["model"], config.model)
    end_s = config.start_s + (_DEFAULT_DURATION_S if config.duration_s is None else config.duration_s)
    active = (windows["model"] == model) & (windows["t_s"] < end_s) & (windows["t_s"] + _WINDOW_S > config.start_s)
    windows = drop(active & (windows["rate"] > 0), windows)
    if not len(windows["rate"]):
        raise InputError(
            str(file.path), "start_s", f"no client of {model} is active in {config.start_s:g}..{end_s:g} s"
        )
    first_s = np.floor(config.start_s / _WINDOW_S) * _WINDOW_S
    span_s = np.ceil((end_s - first_s) / _WINDOW_S) * _WINDOW_S
    scale = 1.0
    if config.rate_rps is not None:
        scale = config.rate_rps * span_s / (windows["rate"].sum() * _WINDOW_S)
    arrivals, prompts, outputs = (
        np.random.default_rng(np.random.SeedSequence([config.seed, 1], spawn_key=(key,))) for key in range(3)
    )
    time, window = _arrivals(windows, scale, str(file.path), arrivals)
    inside = (time >= config.start_s) & (time < end_s)
    time, window = time[inside], window[inside]
    if not len(time):
        raise InputError(
            str(file.path), "rate_rps", "no request is drawn; allowed: a higher rate, or a longer duration_s"
        )
    kinds = dict.fromkeys(
        (f"{name}_{item}" for name in (*_PROMPT, "output_tokens") for item in _ITEMS), _TOKENS_OR_NONE
    )
    tables = _lengths_file(file).read({"model": Label(), "client": INTEGER, "t": SECONDS, **kinds})
    tables = drop(tables["model"] == model, tables)
    client, at = windows["client"][window].astype(np.int64), windows["t_s"][window]
    prompt = _sample_lengths(tables, _PROMPT, client, at, prompts)
    output = _sample_lengths(tables, ("output_tokens",), client, at, outputs)
    return Trace(in_order(time - config.start_s, prompt, output, user=client), cut=True)


def _model(file: TraceFile, models: npt.NDArray[Any], asked: str | None) -> str:
    known = sorted(set(models))
    if asked is None and len(known) == 1:
        return str(known[0])
    if asked not in known:
        problem = f"missing; known: {', '.join(known)}" if asked is None else f"got {asked!r}; {nearest(asked, known)}"
        raise InputError(str(file.path), "model", problem)
    return str(asked)


def _lengths_file(file: TraceFile) -> TraceFile:
    path = file.path.with_name(file.path.name.replace("windows", "lengths"))
    if path == file.path or not path.is_file():
        raise InputError(str(file.path), "", f"needs the clients' lengths beside it, in {path.name}")
    return open_trace(path)


def _arrivals(
    windows: dict[str, npt.NDArray[Any]], scale: float, source: str, rng: np.random.Generator
) -> tuple[Float, Int64]:
    """Draw arrivals per client and window.

    The number of arrivals is the window's rate times its length, rounded up or down at random; their gaps are Gamma or
    Weibull of the window's shape, scaled so that one more would fall on the end. (Gaps laid from the start until the
    window is full would give bursty clients far too many arrivals: a process that starts with one is not stationary.)

    Returns:
        Times in seconds, and the index of the window of each, shape (requests,).
    """
    expected = windows["rate"] * scale * _WINDOW_S
    if expected.sum() > _MOST_REQUESTS:
        problem = f"{expected.sum():.3g} requests would be drawn; allowed: at most {_MOST_REQUESTS:,}: lower rate_rps"
        raise InputError(source, "rate_rps", problem)
    counts = np.floor(expected + rng.random(len(expected))).astype(np.int64)
    window = np.repeat(np.arange(len(counts)), counts + 1)
    shape = windows["shape"][window]
    gaps = np.where(windows["pattern"][window] == "Weibull", rng.weibull(shape), rng.standard_gamma(shape))
    # Shapes near 0 may underflow to gaps of 0 only.
    gaps = np.where(np.bincount(window, gaps)[window] > 0, gaps, 1.0)
    gaps /= np.bincount(window, gaps)[window]
    # The gaps of each window add up to 1.
    share = np.clip(np.cumsum(gaps) - window, 0.0, 1.0)
    arrives = np.append(window[1:] == window[:-1], False)
    return (windows["t_s"][window] + _WINDOW_S * share)[arrives], window[arrives]


@dataclass(frozen=True, slots=True)
class _Quantiles:
    """Inverse distribution functions at ``_KNOTS``, shape (tables, knots), and whose they are, shape (tables,)."""

    values: Float
    client: Int64
    time_s: Float

    @classmethod
    def of(cls, columns: dict[str, npt.NDArray[Any]], prefix: str) -> _Quantiles:
        """Tables of one property; the upper end of each is placed so that its mean is the recorded one."""
        known = columns[f"{prefix}_mean"] >= 0
        columns = drop(known, columns)
        inner = np.stack([columns[f"{prefix}_q{100 * p:02.0f}"] for p in _PROBABILITIES], axis=1)
        values = np.column_stack([inner[:, 0], inner, inner[:, -1]])
        body = ((values[:, :-2] + values[:, 1:-1]) / 2) @ np.diff(_KNOTS)[:-1]
        tail_mean = (columns[f"{prefix}_mean"] - body) / (1.0 - _PROBABILITIES[-1])
        values[:, -1] = np.maximum(2 * tail_mean - values[:, -2], values[:, -2])
        order = np.lexsort((columns["t"], columns["client"]))
        return cls(values[order], columns["client"][order].astype(np.int64), columns["t"][order])

    def sample(self, client: Int64, time_s: Float, rng: np.random.Generator) -> Float:
        """Draw values for requests, shape (requests,).

        A client's table is the latest before the request, else its first; a client without one borrows the table of a
        random request that has one.
        """
        uniform, donor = rng.random(len(client)), rng.random(len(client))
        place = np.searchsorted(_key(self.client, self.time_s), _key(client, time_s), side="right") - 1
        place = np.maximum(place, np.searchsorted(self.client, client))
        place = np.minimum(place, len(self.client) - 1)
        without = self.client[place] != client
        lenders = place[~without] if not without.all() else np.arange(len(self.client))
        place[without] = lenders[(donor[without] * len(lenders)).astype(np.int64)]
        knot = np.searchsorted(_KNOTS, uniform, side="right") - 1
        low, high = self.values[place, knot], self.values[place, knot + 1]
        return np.asarray(low + (high - low) * (uniform - _KNOTS[knot]) / (_KNOTS[knot + 1] - _KNOTS[knot]))


def _key(client: Int64, time_s: Float) -> Float:
    """Order by client, then by time."""
    return np.asarray(client * 1e9 + time_s)


def _sample_lengths(
    tables: dict[str, npt.NDArray[Any]],
    properties: tuple[str, ...],
    client: Int64,
    time_s: Float,
    rng: np.random.Generator,
) -> Int32:
    """Sum of the given properties (text, images ...) of each request, in whole tokens of at least 1."""
    total = np.zeros(len(client))
    for prefix in properties:
        if (tables[f"{prefix}_mean"] >= 0).any():
            total += _Quantiles.of(tables, prefix).sample(client, time_s, rng)
    return np.clip(np.rint(total), 1, MOST_TOKENS).astype(np.int32)


SERVEGEN = TraceFormat(
    name="servegen",
    description=(
        "requests drawn from rates, burstiness and lengths of real clients: client windows, and in a file beside"
        " it, with `lengths` for `windows` in its name, lengths; an hour by default; rate_rps scales every client"
    ),
    source="github.com/alibaba/ServeGen, Apache-2.0; cite arXiv 2505.09999",
    columns=(("model", "client", "t_s", "rate", "pattern", "shape"),),
    read=_read,
)
