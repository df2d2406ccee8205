"""Fitting step times drawn from a known profile."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.envs.calibration.design import design
from servegym.envs.calibration.fit import Fit, Sample, fit_steps
from servegym.envs.profiles.profile import Profile, load_profile


def drawn(profile: Profile, noise: float, seed: int, frontend_us: float = 0.0, stragglers: float = 0.0) -> list[Sample]:
    """What an engine with this profile would show at the points of the design, five rounds."""
    rng = np.random.default_rng(seed)
    cost = profile.compile()
    samples = []
    for round_ in range(5):
        for point in design(profile.engine):
            prefill = [(point.prior, point.chunk)] if point.chunk else []
            us = 1e6 * cost.step_s(prefill, [point.context] * point.decodes) * np.exp(noise * rng.standard_normal())
            alone = bool(point.chunk and not point.decodes and frontend_us)
            us = us * (3 if rng.random() < stragglers else 1) + frontend_us * alone
            pairs = point.chunk * (point.prior + (point.chunk + 1) / 2)
            samples.append(
                Sample(
                    point.name,
                    round_,
                    point.decodes + len(prefill),
                    point.chunk,
                    pairs,
                    point.decodes,
                    point.decodes * point.context,
                    us,
                    alone,
                    point.prior,
                )
            )
    return samples


def within(fit: Fit, name: str, value: float) -> bool:
    term = fit.term(name)
    assert term is not None
    slack = 0.02 * value
    return term.low - slack <= value <= term.high + slack


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile("cpu-tiny-moe")


def test_without_noise_the_terms_come_back(profile: Profile) -> None:
    fit, time = fit_steps(drawn(profile, 0.0, 0)), profile.step_time
    assert fit.step_time.fixed_us == pytest.approx(time.fixed_us, rel=1e-3)
    assert fit.step_time.per_sequence_us == pytest.approx(time.per_sequence_us, rel=1e-2)
    assert fit.step_time.prefill_pair_us == pytest.approx(time.prefill_pair_us, rel=1e-3)
    assert fit.step_time.decode_context_us == pytest.approx(time.decode_context_us, rel=1e-3)
    assert max(quality.worst for quality in fit.quality.values()) < 1e-3


@pytest.mark.parametrize("frontend_us", [0.0, 5000.0])
def test_intervals_hold_the_terms(profile: Profile, frontend_us: float) -> None:
    """Six draws of four or five terms each, at 95 %."""
    time = profile.step_time
    true = {
        "fixed": time.fixed_us,
        "prefill_pair": time.prefill_pair_us,
        "decode_context": time.decode_context_us,
        "per_sequence": time.per_sequence_us,
    }
    if frontend_us:
        true["frontend"] = frontend_us
    held = []
    for seed in range(6):
        fit = fit_steps(drawn(profile, 0.05, seed, frontend_us), seed)
        held += [within(fit, name, value) for name, value in true.items()]
    assert np.mean(held) >= 0.85


def test_stragglers_are_counted_and_do_not_move_the_fit(profile: Profile) -> None:
    fit = fit_steps(drawn(profile, 0.03, 1, stragglers=0.05))
    assert 0.02 < fit.stragglers < 0.1
    assert fit.step_time.fixed_us == pytest.approx(profile.step_time.fixed_us, rel=0.05)
    assert 0.02 < fit.noise < 0.05


def test_in_traffic_only_the_sum_of_a_window_counts(profile: Profile) -> None:
    """What falls on one step rather than on its neighbour moves nothing."""
    alone = drawn(profile, 0.0, 0)
    cost, rng = profile.compile(), np.random.default_rng(3)
    traffic = []
    for window in range(60):
        batches = rng.integers(1, 100, 16)
        shift = rng.uniform(0, 500, 16)
        for batch, more in zip(batches, shift - np.roll(shift, 1), strict=True):
            us = 1e6 * cost.step_s([], [200] * batch) + more
            traffic.append(Sample("traffic", 0, batch, 0, 0, batch, 200 * batch, us, window=window))
    fit = fit_steps([*alone, *traffic])
    assert len(fit.rows) == len(fit.fitted_us) == len(alone) + 60
    assert fit.quality["traffic"].worst < 1e-6
    assert fit.step_time.fixed_us == pytest.approx(profile.step_time.fixed_us, rel=1e-3)


def test_the_mean_step_is_fitted(profile: Profile) -> None:
    """A simulation adds steps up, so that a fit to what is usual, or to reciprocals, would promise too much."""
    rng = np.random.default_rng(4)
    samples = [
        Sample("a", i, 4, 0, 0, 4, 4 * context, (5000 + context) * float(np.exp(0.2 * rng.standard_normal())))
        for i in range(2000)
        for context in (100, 1000)
    ]
    fit = fit_steps(samples)
    total = sum(sample.us for sample in samples)
    assert fit.fitted_us.sum() == pytest.approx(total, rel=0.01)


def test_rounds_tell_how_far_the_machine_drifts(profile: Profile) -> None:
    speed = (0.95, 1.05, 1.0, 0.98, 1.02)
    slowed = [replace(sample, us=sample.us * speed[sample.round]) for sample in drawn(profile, 0.0, 0)]
    fit = fit_steps(slowed)
    assert np.array(fit.levels) / np.mean(fit.levels) == pytest.approx(speed, rel=0.01)
    assert fit.drift == pytest.approx(np.std(speed, ddof=1), rel=0.1)
    assert fit_steps([sample for sample in slowed if sample.round == 0]).drift is None


def test_it_says_what_was_not_measured(profile: Profile) -> None:
    decodes = [sample for sample in drawn(profile, 0.02, 2) if not sample.prefill_tokens]
    fit = fit_steps(decodes)
    assert fit.term("prefill_pair") is None
    said = " ".join(fit.unidentified)
    assert "prefill after a prior context" in said
    assert "mixed steps" in said


def test_too_few_steps() -> None:
    with pytest.raises(ValueError, match="2 measured steps for"):
        fit_steps([Sample("a", 0, 1, 0, 0, 1, 32, 6000.0), Sample("b", 0, 2, 0, 0, 2, 64, 7000.0)])


def test_a_disturbed_cell_of_many_steps_does_not_drown_the_others(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each cell has its own speed of the machine; those of decoding have twelve steps, those of a prefill one."""
    monkeypatch.setattr("servegym.envs.calibration.fit._RESAMPLES", 2)
    points, chunks = {point.name: point for point in design(profile.engine)}, (16, 64, 128, 256, 1024)
    true = np.array([profile.compile().step_s([(0, chunk)], []) for chunk in chunks])

    def error(shared: float) -> float:
        monkeypatch.setattr("servegym.envs.calibration.fit._SHARED", shared)
        found = []
        for seed in range(8):
            rng = np.random.default_rng(seed)
            samples = [
                replace(sample, us=sample.us * speed * np.exp(0.05 * rng.standard_normal()))
                for sample in drawn(profile, 0.0, seed)
                for speed in [float(np.exp(0.2 * rng.standard_normal()))]
                for _ in range(1 if points[sample.point].chunk else 12)
            ]
            fitted = profile.model_copy(update={"step_time": fit_steps(samples, seed).step_time}).compile()
            found.append(np.log([fitted.step_s([(0, chunk)], []) for chunk in chunks] / true))
        return float(np.sqrt(np.mean(np.square(found))))

    assert error(0.5) < 0.95 * error(0.0)
