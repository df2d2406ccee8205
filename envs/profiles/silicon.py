"""Profiles from kernel tables against published end-to-end measurements: ``servegym profile check``.

Each case of :mod:`.silicon_rows` is served in a closed loop (:mod:`.closed_loop`) on the profile of its model, GPU,
layout and precision, with the client, the budget of 8,192 tokens and the cache that its benchmark had, and with what an
engine adds to kernels alone (:mod:`.serving`). Of that one number is fitted to such rows: the host's time to launch an
MoE layer, which dense models do not use. Compared with the rows that it was fitted to, an error would mean little: the
batch sizes are halved, and each half is predicted with the launches fitted to the other one; beside it stands the error
without launches. Which terms there are was decided with all rows in view, so neither is a blind prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from servegym.envs.profiles.closed_loop import closed_loop
from servegym.envs.profiles.kernel_tables import build_profile
from servegym.envs.profiles.profile import Profile, StepCost
from servegym.envs.profiles.serving import FRONTEND_S
from servegym.envs.profiles.silicon_rows import LLAMA_70B, RUNS, Case, read_cases

BUDGET = 8192
REQUESTS_PER_SLOT = 10
SHORTEST = 0.8

BLOCK = 128
"""Columns of a block in ``fp8_block``: an expert cannot be divided into parts that are no multiple of it."""

LAUNCHES_US = (0.0, 400.0, 600.0, 800.0, 1000.0, 1200.0, 1400.0, 1600.0)
"""Values that the fit tries; the first is none."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A compiled profile and the tokens that its KV cache holds."""

    cost: StepCost
    capacity: int

    @classmethod
    def of(cls, profile: Profile) -> Engine:
        """Compile a profile."""
        return cls(profile.compile(BUDGET), profile.engine.num_blocks * profile.engine.block_size)


Engines = Callable[[Case, float], Engine]
"""From a case and the host's time to launch an MoE layer, microseconds."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A case and what was predicted of it.

    Attributes:
        case: the case.
        ttft_ms, tpot_ms: predicted.
        busy: seconds of steps that the engine would need a second for what was measured, see :func:`busy`.
        full: the KV cache does not hold all requests in flight.
    """

    case: Case
    ttft_ms: float
    tpot_ms: float
    busy: float = 1.0
    full: bool = False

    @property
    def ttft_error(self) -> float:
        """Relative error of the TTFT, signed."""
        return self.ttft_ms / self.case.ttft_ms - 1

    @property
    def tpot_error(self) -> float:
        """Relative error of the TPOT, signed."""
        return self.tpot_ms / self.case.tpot_ms - 1


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome.

    Attributes:
        unfitted: every case without launches.
        crossed: every case with the launches fitted to the other half of the batch sizes.
        launch_us: what was fitted, by the batch sizes that it predicts.
        left_out: rows that are not covered, by reason.
    """

    unfitted: list[Compared]
    crossed: list[Compared]
    launch_us: dict[tuple[int, ...], float]
    left_out: dict[str, int]


def predict(cases: Iterable[Case], engines: Engines, launch_us: float = 0.0) -> list[Compared]:
    """Serve each case in a closed loop."""
    found = []
    for case in cases:
        rng = np.random.default_rng(0)
        count = REQUESTS_PER_SLOT * case.concurrency
        prompts = rng.integers(int(SHORTEST * case.isl), case.isl + 1, count)
        outputs = rng.integers(int(SHORTEST * case.osl), case.osl + 1, count)
        engine = engines(case, launch_us)
        times = closed_loop(
            engine.cost,
            prompts,
            outputs,
            case.concurrency,
            BUDGET,
            ahead=True,
            frontend_s=FRONTEND_S,
            capacity=engine.capacity,
        )
        prompt, output = float(prompts.mean()), float(outputs.mean())
        found.append(
            Compared(
                case,
                1e3 * float(times.ttft_s.mean()),
                1e3 * float(times.tpot_s.mean()),
                busy(case, engine.cost, prompt, output),
                case.concurrency * (prompt + output) > engine.capacity,
            )
        )
    return found


def busy(case: Case, cost: StepCost, prompt: float, output: float) -> float:
    """Return the seconds of steps that a second of the measured run needs; an engine in a closed loop has one.

    The requests in flight over the time that each takes are the requests per second, each with a prefill. Beside them
    there is a step of decoding in each TPOT.

    Args:
        case: what was measured.
        cost: of the engine.
        prompt: mean tokens of a prompt.
        output: mean tokens of an output.
    """
    requests_per_s = 1e3 * case.concurrency / (case.ttft_ms + case.tpot_ms * (output - 1))
    prefill_s = prompt * float(cost.local_table_s[BUDGET] + cost.moe_table_s[BUDGET]) / BUDGET
    prefill_s += cost.pair_s * prompt * (prompt + 1) / 2
    decode_s = cost.step_s([], [int(prompt + output / 2)] * case.concurrency)
    return requests_per_s * prefill_s + 1e3 * decode_s / case.tpot_ms


def table_engines(folder: Path) -> Engines:
    """Return engines whose profiles are built from the tables in a folder, each layout once.

    Raises:
        InputError: tables that are missing.
    """
    built: dict[tuple[str, int, float], Engine] = {}

    def engines(case: Case, launch_us: float) -> Engine:
        run = RUNS[case.model]
        key = (case.model, case.tensor, launch_us if run.model.experts else 0.0)
        if key not in built:
            # The rows call it tensor parallelism; vLLM has to run it with expert parallelism.
            whole = run.model.experts > 0 and (run.model.moe_intermediate // case.tensor) % BLOCK > 0
            ranks, moe_tensor = (case.tensor, 1) if whole else (1, case.tensor if run.model.experts else 1)
            profile, _ = build_profile(
                run.shape,
                folder,
                ranks,
                run.gpu,
                case.tensor,
                precision=run.precision,
                moe_tensor=moe_tensor,
                serving=replace(run.serving, launch_us=launch_us),
            )
            built[key] = Engine.of(profile)
        return built[key]

    return engines


def fit_launch(cases: Sequence[Case], engines: Engines) -> float:
    """Return the launch time with the least sum of the median absolute errors of TTFT and TPOT, microseconds."""

    def loss(launch_us: float) -> float:
        compared = predict(cases, engines, launch_us)
        return sum(
            float(np.median([abs(getattr(item, name)) for item in compared])) for name in ("ttft_error", "tpot_error")
        )

    return min(LAUNCHES_US, key=loss)


def check(folder: Path, progress: Callable[[float], None] = lambda share: None) -> Check:
    """Compare the profiles from the tables in a folder with the measurements there.

    Args:
        folder: of the tables.
        progress: called with the share that is done.

    Raises:
        InputError: tables that are missing.
    """
    cases, left_out = read_cases(folder)
    mixtures = [case for case in cases if RUNS[case.model].model.experts]
    # Each mixture is served at every launch time, then at the one that the other half says; all are, without any.
    work = sum(case.concurrency for case in cases)
    work += (len(LAUNCHES_US) + 1) * sum(case.concurrency for case in mixtures)
    engines = _told(table_engines(folder), work, progress)
    crossed, fitted = cross(mixtures, engines)
    unfitted = predict(cases, engines)
    crossed += [item for item in unfitted if not RUNS[item.case.model].model.experts]
    return Check(unfitted, sorted(crossed, key=lambda item: cases.index(item.case)), fitted, left_out)


def _told(engines: Engines, work: int, progress: Callable[[float], None]) -> Engines:
    """Tell of progress whenever an engine is asked for, by the requests in flight of the cases so far."""
    done = 0

    def asked(case: Case, launch_us: float) -> Engine:
        nonlocal done
        progress(done / work)
        done += case.concurrency
        return engines(case, launch_us)

    return asked


def cross(cases: Sequence[Case], engines: Engines) -> tuple[list[Compared], dict[tuple[int, ...], float]]:
    """Predict each half of the batch sizes with the launches fitted to the other half.

    Returns:
        The predictions, and what was fitted, by the batch sizes that it predicts.
    """
    sizes = sorted({case.concurrency for case in cases})
    crossed, fitted = [], {}
    for half, other in ((sizes[::2], sizes[1::2]), (sizes[1::2], sizes[::2])):
        launch_us = fit_launch([case for case in cases if case.concurrency in other], engines)
        fitted[tuple(half)] = launch_us
        crossed += predict([case for case in cases if case.concurrency in half], engines, launch_us)
    return crossed, fitted


def reason(item: Compared) -> str:
    """Return why a case is predicted badly, as far as the rows or their benchmark tell; not a measurement."""
    case = item.case
    if not RUNS[case.model].described:
        return f"client unknown; as a closed loop the engine would have to work {item.busy:.1f} s a second"
    if item.full:
        return "the KV cache does not hold all requests: waiting and preemptions hang on its exact size"
    if case.spread > 0.2:
        return f"the published values of this run differ by {case.spread:.0%}"
    if case.version == "0.16.0":
        return f"vLLM 0.16: the kernels of the tables, which are newer, fill only {item.busy:.0%} of its time"
    if case.model == LLAMA_70B.model and case.tensor == 8 and item.ttft_error > 0:
        return "all-reduce of eight GPUs: modelled as a ring, without NVLink SHARP, probably too slow"
    return "not known"
