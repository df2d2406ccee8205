"""A calibration of a real vLLM engine by its own step records, and a validation; 40 s beside the engine's start."""

from __future__ import annotations

from pathlib import Path

import pytest

from servegym.engine_bridge.cluster.launcher import LiveCluster
from servegym.envs.calibration.calibrate import Options, calibrate
from servegym.envs.profiles.profile import load_profile
from servegym.envs.validation.config import ValidationConfig
from servegym.envs.validation.run import Validator

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_a_profile_from_exact_step_records(one_engine: LiveCluster, tmp_path: Path) -> None:
    """Bounds are wide: the machine of a test is shared, and what is tested is the path from engine to profile."""
    out = tmp_path / "mine.yaml"
    result = calibrate(one_engine.engines[0], Options(out, {}, rounds=1, max_seconds=40.0))
    assert result.exact
    limits = load_profile(out).engine
    assert (limits.max_num_seqs, limits.max_model_len) == (4, 4096)
    assert {"decode", "prefill", "mixed", "traffic"} <= set(result.fit.quality)
    assert result.fit.quality["decode"].median < 0.5
    fixed = result.fit.step_time.fixed_us + result.fit.step_time.dense_us.us[0]
    assert 500 < fixed < 50_000
    frontend = result.profile.frontend
    assert frontend is not None
    assert 0 < frontend.request_us < 50_000
    assert 0 < frontend.response_us < 50_000
    # Recording ends with the calibration, and the engine has failed at nothing.
    shim = one_engine.engines[0].shim
    assert shim is not None
    assert not Path(shim).with_suffix(".steps").exists()
    state = one_engine.engines[0].shim_state()
    assert state is not None
    assert state["failures"] == 0

    # The profile promises what the engine does: a wrong term, lost prefixes or another order would be off by far more.
    config = ValidationConfig.model_validate(
        {
            "live": {"cluster": str(one_engine.folder)},
            "policies": {"spf": {"request": "spf_aging,gamma=0"}},
            "scenarios": {"sessions": {"workload": {"name": "small-sessions", "requests": 40}, "loads": [0.7]}},
        }
    )
    row = Validator(config, str(out)).run(config.cells[0])
    assert row["step_time"][0]["steps"] > 100
    assert row["at_speed"]["tpot_s"]["mean"] == pytest.approx(row["live"]["tpot_s"]["mean"], rel=0.4)
    # Both found the same in their prefix caches.
    prefill = row["prefill_tokens"]
    assert prefill["simulated"] == pytest.approx(prefill["live"], rel=0.1)
    assert prefill["simulated"] < 0.7 * sum(Validator(config, str(out)).table(config.cells[0]).prompt_tokens)
