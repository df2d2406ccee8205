"""The CPU profile repeats its measurements and the shipped file."""

from __future__ import annotations

from pathlib import Path

import pytest

from servegym.configuration import find_config
from servegym.envs.profiles import load_profile
from servegym.envs.profiles.cpu_table import DECODE_STEPS, FRONTEND_MS, PREFILL_TTFT, build_profile, main


def test_script_reproduces_the_shipped_profile(tmp_path: Path) -> None:
    out = tmp_path / "made.yaml"
    assert main(["--out", str(out)]) == 0
    assert out.read_text() == find_config("cpu-tiny-moe", "profiles").read_text()
    assert load_profile(out) == build_profile()[0]


def test_fit_stays_within_the_noise_of_the_machine() -> None:
    _, fits = build_profile()
    assert (fits["decode steps"].points, fits["prefill steps"].points) == (len(DECODE_STEPS), len(PREFILL_TTFT))
    for quality in fits.values():
        assert quality.median < 0.1
        assert quality.worst < 0.25


def test_frontend_is_no_engine_time() -> None:
    cost = load_profile("cpu-tiny-moe").compile()
    for tokens, ttft_ms in PREFILL_TTFT:
        assert 1e3 * cost.step_s([(0, tokens)], []) + FRONTEND_MS == pytest.approx(ttft_ms, rel=0.12)


def test_unwritable_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "absent" / "x.yaml")]) == 2
    assert (
        capsys.readouterr().err == f"{tmp_path / 'absent' / 'x.yaml'}: cannot be written: No such file or directory\n"
    )
