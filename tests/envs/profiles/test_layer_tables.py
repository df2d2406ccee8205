"""The RTX PRO 6000 profile: reproduction of the shipped file, physical plausibility, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from servegym.configuration import find_config
from servegym.envs.profiles import decode_step_s, load_profile
from servegym.envs.profiles.hardware import MODELS
from servegym.envs.profiles.layer_tables import RTX_PRO_6000, build_profile, main, moe_cost

NAME = "qwen3-30b-a3b-rtxpro6000-dp2-ep2"
QWEN = MODELS["qwen3-30b-a3b"]


def test_script_reproduces_the_shipped_profile(data_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.yaml"
    assert main(["--tables", str(data_folder / "latency"), "--out", str(out)]) == 0
    made, shipped = load_profile(out), load_profile(NAME)
    assert made.engine == shipped.engine
    assert made.experts == shipped.experts
    ours, theirs = made.step_time, shipped.step_time
    assert ours.moe_us is not None
    assert theirs.moe_us is not None
    assert ours.moe_us.us == pytest.approx(theirs.moe_us.us, rel=2e-3)
    assert ours.dense_us.us == pytest.approx(theirs.dense_us.us, rel=2e-3)
    assert ours.decode_context_us == pytest.approx(theirs.decode_context_us, rel=2e-3)
    assert out.read_text().count("\n") == find_config(NAME, "profiles").read_text().count("\n")


def test_whole_steps_repeat_the_sum_of_the_layers(data_folder: Path) -> None:
    _, fits = build_profile(data_folder / "latency")
    assert fits["decode steps"].median < 0.02
    assert fits["decode steps"].worst < 0.15
    assert fits["prefill steps"].median < 0.03
    assert fits["mixed steps"].median < 0.15


def test_a_full_decode_batch_reads_the_rank_s_weights_and_cache() -> None:
    step = decode_step_s(load_profile(NAME), 256, 1000)
    read = QWEN.weight_bytes(ranks=2) + 256 * 1000 * QWEN.kv_bytes_per_token
    floor = read / RTX_PRO_6000.bandwidth_bytes_per_s
    assert floor < step < 2 * floor


def test_decode_context_costs_the_reading_of_the_cache() -> None:
    ideal_us = 1e6 * QWEN.kv_bytes_per_token / RTX_PRO_6000.bandwidth_bytes_per_s
    assert ideal_us < load_profile(NAME).step_time.decode_context_us < 1.5 * ideal_us


def test_two_ranks_halve_what_grows_with_experts_and_tokens() -> None:
    tokens, fit = np.array([1.0, 64.0, 4096.0]), (5.0, 6.0, 0.3)
    one, two = moe_cost(tokens, 1, fit), moe_cost(tokens, 2, fit)
    assert (two - 5).tolist() == pytest.approx(((one - 5) / 2).tolist())
    assert one[0] == pytest.approx(5 + 6 * QWEN.top_k)


def test_missing_tables_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tables", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.endswith("_dense.parquet: no such file\n")
    assert captured.out == ""
