"""``servegym calibrate``: rounds over a design, a file of measurements that a later run goes on with, a profile."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from servegym.configuration import validate
from servegym.engine_bridge.cluster.engine import completes, served_models
from servegym.engine_bridge.cluster.launcher import LiveEngine
from servegym.engine_bridge.vllm_plugin.steps import steps_file
from servegym.envs.calibration.design import Point, design
from servegym.envs.calibration.fit import Fit, Sample, fit_steps
from servegym.envs.calibration.measure import Delay, Measured, Probe
from servegym.envs.calibration.records import StepRecords
from servegym.envs.profiles.document import render, write
from servegym.envs.profiles.fitting import significant
from servegym.envs.profiles.profile import EngineLimits, Frontend, Profile
from servegym.errors import InputError

_CACHE_INFO = "vllm:cache_config_info{"
_LEAST_DELAYS = 3
_USUAL = 0.98


@dataclass(frozen=True, slots=True)
class Options:
    """How to calibrate.

    Attributes:
        out: the profile to write; measurements stand beside it, with the suffix ``.measurements.jsonl``.
        limits: of the engine, over what it says itself.
        rounds: visits of each point.
        max_seconds: no visit begins later than this.
        vocabulary: token ids are below this number.
        seed: of the order of points, their tokens and the bootstrap.
    """

    out: Path
    limits: Mapping[str, Any]
    rounds: int = 5
    max_seconds: float = 280.0
    vocabulary: int = 256
    seed: int = 0

    @property
    def measurements(self) -> Path:
        """The file that an interrupted calibration leaves and the next one goes on with."""
        return self.out.with_suffix(".measurements.jsonl")


@dataclass(frozen=True, slots=True)
class Calibration:
    """A finished calibration.

    Attributes:
        profile: the profile.
        fit: its step time, with uncertainty.
        samples: what was measured.
        overheads: seconds of an empty HTTP request, ``http_s``, and of the tokeniser, ``tokeniser_s_per_token``; None
            where unknown.
        exact: whether the engine's own records were used.
        rounds: begun.
    """

    profile: Profile
    fit: Fit
    samples: list[Sample]
    overheads: dict[str, float | None]
    exact: bool
    rounds: int

    def report(self) -> dict[str, Any]:
        """Return the calibration as plain data."""
        return {
            "profile": self.profile.name,
            "exact_step_records": self.exact,
            "samples": len(self.samples),
            "rounds": self.rounds,
            "overheads": self.overheads,
            "frontend": None if self.profile.frontend is None else self.profile.frontend.model_dump(),
        } | self.fit.report()


def calibrate(engine: LiveEngine, options: Options, progress: Callable[[float], None] | None = None) -> Calibration:
    """Measure an engine and write its profile. The engine must serve nobody else meanwhile.

    Args:
        engine: with our scheduler inside, exact records of its steps are used.
        options: how.
        progress: called with the share that is done.

    Raises:
        InputError: an engine that does not answer, limits that are missing, measurements of another engine.
        EngineError: a request failed.
    """
    model = served_models(engine.url)[0]
    if engine.shim is None:
        limits = _limits(engine.url, {}, options)
        head, done = _earlier(options, engine.url, model, limits, exact=False)
        return _finish(asyncio.run(_measure(engine.url, model, limits, None, head, done, options, progress)), options)
    with StepRecords(steps_file(Path(engine.shim))) as records:
        records.wait(lambda: completes(engine.url, model))
        limits = _limits(engine.url, records.limits, options)
        head, done = _earlier(options, engine.url, model, limits, exact=True)
        return _finish(
            asyncio.run(_measure(engine.url, model, limits, records, head, done, options, progress)), options
        )


@dataclass(slots=True)
class _Measurements:
    head: dict[str, Any]
    limits: EngineLimits
    samples: list[Sample]
    delays: list[Delay]
    rounds: int
    overheads: dict[str, float | None]


async def _measure(
    url: str,
    model: str,
    limits: EngineLimits,
    records: StepRecords | None,
    head: dict[str, Any],
    done: dict[tuple[int, str], Measured],
    options: Options,
    progress: Callable[[float], None] | None,
) -> _Measurements:
    points = design(limits, traffic=records is not None)
    begin = time.monotonic()
    path = options.measurements
    async with Probe(url, model, options.vocabulary, records, options.seed) as probe:
        overheads = await probe.overheads()
        if not done:
            # The first visits of an engine are slower: memory is touched and kernels are chosen.
            for point in points:
                if time.monotonic() - begin < 0.25 * options.max_seconds:
                    await probe.visit(point, -1)
        with path.open("a" if done else "w", encoding="utf-8") as file:
            if not done:
                file.write(json.dumps(head) + "\n")
            for round_ in range(options.rounds):
                # Another order each round: what drifts falls on other points.
                order = np.random.default_rng([options.seed, round_]).permutation(len(points))
                for k, point in enumerate(points[i] for i in order):
                    if (round_, point.name) in done:
                        continue
                    if time.monotonic() - begin > options.max_seconds:
                        break
                    found = await probe.visit(point, round_)
                    done[round_, point.name] = found
                    file.write(_line(round_, point, found))
                    file.flush()
                    if progress is not None:
                        by_count = (round_ + k / len(points)) / options.rounds
                        progress(max(by_count, (time.monotonic() - begin) / options.max_seconds))
    samples = [sample for found in done.values() for sample in found.samples]
    delays = [delay for found in done.values() for delay in found.delays]
    rounds = 1 + max((round_ for round_, _ in done), default=-1)
    return _Measurements(head, limits, samples, delays, rounds, overheads)


def _finish(measured: _Measurements, options: Options) -> Calibration:
    try:
        fit = fit_steps(measured.samples, options.seed)
    except ValueError as error:
        raise InputError(str(options.measurements), "", f"too little was measured: {error}") from None
    exact = bool(measured.head["exact"])
    frontend = _frontend(measured.delays, fit)
    delay = None if frontend is None else 1e-6 * (frontend.request_us + frontend.response_us)
    how = "the engine's own step records" if exact else "times that a client saw"
    name = options.out.stem
    profile = Profile(
        name=name,
        description=f"{measured.head['model']}, calibrated live",
        model=measured.head["model"],
        hardware="the machine of the engine that was measured",
        source=(
            f"Measured: {len(measured.samples)} samples in {measured.rounds} rounds by servegym calibrate, from {how}. "
            + ("" if delay is None else f"A client sees {1e3 * delay:.1f} ms more to the first token. ")
            + "Dense and MoE layers are not told apart."
        ),
        engine=measured.limits,
        step_time=fit.step_time,
        frontend=frontend,
        drift=None if fit.drift is None else significant(fit.drift, 2),
    )
    result = Calibration(profile, fit, measured.samples, measured.overheads, exact, measured.rounds)
    write(render(profile, _header(result)), options.out)
    return result


def _header(result: Calibration) -> list[str]:
    lines = [f"{result.profile.description}. Made by: servegym calibrate", "", "Terms, us, with 95 % intervals:"]
    lines += [f"  {t.name:<16} {t.value:.4g} ({t.low:.4g} to {t.high:.4g})" for t in result.fit.terms]
    lines += ["", "Relative errors of the fit against the medians of the points:"]
    lines += [f"  {name:<8} {quality}" for name, quality in result.fit.quality.items()]
    lines += [
        "",
        f"Steps scatter by {result.fit.noise:.1%} around the fit; {result.fit.stragglers:.1%} take twice as long.",
        drift_of(result.fit),
    ]
    return [*lines, "", "Not identified:", *(f"  {text}" for text in result.fit.unidentified)]


def drift_of(fit: Fit) -> str:
    """Say how far the machine's speed went up and down meanwhile."""
    if fit.drift is None:
        return "One round: how far the machine's speed drifts is not known."
    low, high = min(fit.levels) - 1, max(fit.levels) - 1
    return (
        f"Rounds took {low:+.1%} to {high:+.1%} longer than fitted, standard deviation {fit.drift:.1%}: no run of"
        " their length is predicted better."
    )


def _frontend(delays: list[Delay], fit: Fit) -> Frontend | None:
    """What a client waits for outside of the steps: measured apart, or the term of the fit, all of it before them.

    The cost per prompt token is that of requests alone, whose delay is known exactly; the rest is that in traffic.
    """
    alone = [delay for delay in delays if not delay.traffic]
    if len(alone) < _LEAST_DELAYS:
        term = fit.term("frontend")
        return None if term is None else Frontend(request_us=significant(term.value))
    slope, _ = _theil_sen(*np.array([(delay.prompt_tokens, delay.most_s) for delay in alone], dtype=np.float64).T)
    slope = max(slope, 0.0)
    served = [delay for delay in delays if delay.traffic] or alone
    tokens, least, most, after = np.array([(d.prompt_tokens, d.least_s, d.most_s, d.after_s) for d in served]).T
    return Frontend(
        request_us=significant(1e6 * balance(least - slope * tokens, most - slope * tokens)),
        prompt_token_us=significant(1e6 * slope),
        response_us=significant(1e6 * float(after[after <= np.quantile(after, _USUAL)].mean())),
    )


def balance(least: np.ndarray, most: np.ndarray) -> float:
    """Return the number of at least 0 that lies below as many intervals as above: the median if they are points.

    Args:
        least: lower ends of the intervals, shape (intervals,).
        most: upper ends, same shape.

    >>> balance(np.array([1.0, 2.0, 0.0]), np.array([1.0, 2.0, 9.0]))
    1.5
    """
    # Between two ends the counts do not change; the median of all numbers that are balanced best.
    ends = np.unique(np.concatenate([least, most]))
    tried = np.concatenate([ends, (ends[1:] + ends[:-1]) / 2])
    below, above = (tried[:, None] < least).sum(axis=1), (tried[:, None] > most).sum(axis=1)
    apart = np.abs(below - above)
    return max(float(np.median(tried[apart == apart.min()])), 0.0)


def _theil_sen(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return slope and level of a line through scattered points, the median of all pairs' slopes."""
    i, j = np.triu_indices(len(x), 1)
    apart = x[i] != x[j]
    slope = float(np.median((y[j] - y[i])[apart] / (x[j] - x[i])[apart])) if apart.any() else 0.0
    return slope, float(np.median(y - slope * x))


def _limits(url: str, told: Mapping[str, Any], options: Options) -> EngineLimits:
    content = _scraped(url) | dict(told) | dict(options.limits)
    if "num_blocks" not in content:
        raise InputError(url, "num_blocks", "the engine does not tell; allowed: --set num_blocks=N")
    return validate(EngineLimits, content, "--set")


def _scraped(url: str) -> dict[str, Any]:
    """What an engine says of itself to everybody."""
    found: dict[str, Any] = {}
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
            text = response.read().decode()
        with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
            models = json.load(response)
    except (OSError, ValueError, urllib.error.URLError):
        return found
    line = next((line for line in text.splitlines() if line.startswith(_CACHE_INFO)), "")
    labels = dict(part.split("=", 1) for part in line.removeprefix(_CACHE_INFO).split("}")[0].split(",") if "=" in part)
    for name, label in (("block_size", "block_size"), ("num_blocks", "num_gpu_blocks")):
        value = labels.get(label, "").strip('"')
        if value.isdigit():
            found[name] = int(value)
    length = models["data"][0].get("max_model_len") if models.get("data") else None
    return found | ({"max_model_len": length} if length else {})


def _earlier(
    options: Options, url: str, model: str, limits: EngineLimits, *, exact: bool
) -> tuple[dict[str, Any], dict[tuple[int, str], Measured]]:
    """Read what an interrupted calibration of the same engine has left."""
    head = {"url": url, "model": model, "exact": exact, "limits": limits.model_dump(mode="json")}
    path = options.measurements
    if not path.is_file():
        return head, {}
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(first) != head:
            raise InputError(str(path), "", "measurements of another engine or other limits; remove it to start anew")
        done = {}
        for line in lines:
            row = json.loads(line)
            samples = [Sample(**sample) for sample in row["samples"]]
            done[row["round"], row["point"]] = Measured(samples, [Delay(**delay) for delay in row["delays"]])
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(str(path), "", f"damaged, remove it to start anew: {error}") from None
    return head, done


def _line(round_: int, point: Point, found: Measured) -> str:
    samples = [asdict(sample) for sample in found.samples]
    delays = [asdict(delay) for delay in found.delays]
    return json.dumps({"round": round_, "point": point.name, "samples": samples, "delays": delays}) + "\n"
