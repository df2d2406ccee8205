"""Expert costs and scaled tables: physics, published shapes, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from servegym.configuration import validate
from servegym.envs.profiles import ExpertShape, decode_step_s, load_profile
from servegym.envs.profiles.expert_cost import ACTIVATION_TABLE, compare_forms, fit_experts, fit_link, main
from servegym.envs.profiles.hardware import A100, H100, H200, MODELS
from servegym.envs.profiles.scaled_tables import ScaledTables
from servegym.envs.profiles.tables import KernelTables
from servegym.errors import InputError

QWEN = MODELS["qwen3-30b-a3b"]
H200_NAME, A100_NAME, H100_NAME = "qwen3-30b-a3b-h200", "qwen3-30b-a3b-a100-ep2", "qwen3-30b-a3b-h100-tp2-ep4"


@pytest.mark.parametrize(
    ("name", "gpu"), [(H200_NAME, H200), (H200_NAME + "-ep4", H200), (A100_NAME, A100), (H100_NAME, H100)]
)
def test_an_expert_costs_the_reading_of_its_weights(name: str, gpu: object) -> None:
    experts = load_profile(name).experts
    assert experts is not None
    assert (experts.layers, experts.experts, experts.top_k, experts.token_bytes) == (48, 128, 8, 4096)
    assert experts.expert_bytes * 48 * 128 == 2 * QWEN.expert_parameters
    ideal_us = 1e6 * experts.expert_bytes / gpu.bandwidth_bytes_per_s  # type: ignore[attr-defined]
    assert ideal_us < experts.expert_us < 1.5 * ideal_us


def test_a100_is_slower_by_its_data_sheet() -> None:
    slow, fast = load_profile(A100_NAME), load_profile(H200_NAME)
    full = np.array([2048])  # dense layers of a full step are bound by compute: 3.17 times the rate
    assert 2.5 < slow.step_time.dense_us.at(full)[0] / fast.step_time.dense_us.at(full)[0] < 3.5
    ratio = slow.step_time.decode_context_us / fast.step_time.decode_context_us
    assert ratio == pytest.approx(4.8 / 2.039, rel=0.15)
    assert slow.engine.num_blocks < fast.engine.num_blocks


def test_tensor_parallel_halves_attention_and_the_cache_of_a_gpu() -> None:
    halved, whole = load_profile(H100_NAME), load_profile(H200_NAME)
    ratio = halved.step_time.decode_context_us / whole.step_time.decode_context_us
    assert ratio == pytest.approx(0.5 * 4.8 / 3.35, rel=0.15)
    assert halved.step_time.communication_us is not None
    assert decode_step_s(halved, 64, 1000) < decode_step_s(whole, 64, 1000)


def test_communication_is_apart_and_still_in_the_local_table() -> None:
    profile = load_profile(H100_NAME)
    cost, tokens = profile.compile(100), np.arange(101)
    assert cost.communication_table_s[100] > 0
    dense = 1e-6 * profile.step_time.dense_us.at(tokens)
    np.testing.assert_allclose(cost.local_table_s, dense + cost.communication_table_s)
    assert not load_profile(H200_NAME).compile(100).communication_table_s.any()


def test_more_experts_of_a_token_than_experts_are_one_line() -> None:
    content = load_profile(H200_NAME).experts.model_dump() | {"top_k": 129}  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"top_k of at most the experts \(128\), got 129") as caught:
        validate(ExpertShape, content, "test")
    assert "\n" not in str(caught.value)


def test_scaling_to_the_same_gpu_changes_nothing_and_the_link_scales(data_folder: Path) -> None:
    folder = data_folder / "latency"
    measured = KernelTables(folder, str(H200.tables))
    same = ScaledTables(folder, str(H200.tables), measured=H200, target=H200)
    for call in ("moe", "attention"):
        arguments = (QWEN, 2, "balanced") if call == "moe" else (QWEN,)
        mine, theirs = getattr(same, call)(*arguments), getattr(measured, call)(*arguments)
        left, right = (mine[1], theirs[1]) if call == "moe" else (mine.us, theirs.us)
        np.testing.assert_allclose(left, right)
    slower = ScaledTables(folder, str(H200.tables), measured=H200, target=A100)
    assert fit_link(slower, 2)[0] == pytest.approx(fit_link(measured, 2)[0] / 1.5, rel=0.05)
    assert fit_experts(QWEN, slower, 2).expert_us > 2 * fit_experts(QWEN, measured, 2).expert_us


def test_the_sum_describes_an_independent_table_better(data_folder: Path) -> None:
    found = compare_forms(data_folder / "latency" / ACTIVATION_TABLE)
    assert found["sum"].median < 0.08 < found["roofline"].median


def test_a_missing_table_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tables", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
