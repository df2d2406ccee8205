"""Profiles from kernel tables: physical plausibility, reproduction of the shipped files, errors."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from servegym.configuration import find_config
from servegym.envs.profiles import decode_step_s, load_profile, prefill_tokens_per_s
from servegym.envs.profiles.hardware import H200, MODELS, kv_blocks
from servegym.envs.profiles.kernel_costs import KernelCosts
from servegym.envs.profiles.kernel_tables import build_profile, main
from servegym.envs.profiles.profile import Profile
from servegym.envs.profiles.serving import REAL_DATA, Serving
from servegym.envs.profiles.tables import KernelTables
from servegym.errors import InputError

QWEN = MODELS["qwen3-30b-a3b"]


@pytest.fixture(scope="module")
def h200() -> Profile:
    return load_profile("qwen3-30b-a3b-h200")


def test_decode_of_one_sequence_is_bound_by_launches_and_active_weights(h200: Profile) -> None:
    step = decode_step_s(h200, 1, 1000)
    active = QWEN.expert_parameters * QWEN.top_k / QWEN.experts + QWEN.other_parameters
    assert step > 2 * active / H200.bandwidth_bytes_per_s  # cannot be faster than reading the active weights
    assert 3e-3 < step < 6e-3


def test_large_batch_reads_all_experts_and_the_cache(h200: Profile) -> None:
    step = decode_step_s(h200, 256, 1000)
    read = QWEN.weight_bytes() + 256 * 1000 * QWEN.kv_bytes_per_token
    floor = read / H200.bandwidth_bytes_per_s
    assert floor < step < 2 * floor


def test_full_prefill_chunk_takes_a_plausible_share_of_peak_flops(h200: Profile) -> None:
    tokens = 8192
    active = QWEN.layers * 3 * QWEN.hidden * QWEN.moe_intermediate * QWEN.top_k
    active += QWEN.layers * QWEN.hidden * (QWEN.qkv_width + QWEN.heads * QWEN.head_dim)
    attention = 4 * QWEN.layers * QWEN.heads * QWEN.head_dim * tokens * (tokens + 1) / 2
    flops = 2 * active * tokens + attention
    share = flops * prefill_tokens_per_s(h200) / tokens / 989e12
    assert 0.35 < share < 0.8


def test_decode_context_costs_the_reading_of_the_cache(h200: Profile) -> None:
    ideal_us = 1e6 * QWEN.kv_bytes_per_token / H200.bandwidth_bytes_per_s
    assert ideal_us < h200.step_time.decode_context_us < 1.3 * ideal_us


def test_expert_parallel_rank_is_faster_at_decode_and_has_more_cache(h200: Profile) -> None:
    rank = load_profile("qwen3-30b-a3b-h200-ep4")
    assert decode_step_s(rank, 64, 1000) < decode_step_s(h200, 64, 1000)
    assert rank.engine.num_blocks > h200.engine.num_blocks
    assert rank.step_time.communication_us is not None


def test_kv_blocks_fill_what_weights_leave() -> None:
    blocks = kv_blocks(
        QWEN, H200, ranks=1, block_size=16, max_num_batched_tokens=8192, max_num_seqs=256, utilization=0.92
    )
    assert QWEN.kv_bytes_per_token == 98304
    left = 0.92 * 139.8 * 2**30 - 61_063_823_360 - 2 * 8192 * 8 * (2048 + 3 * 768) - 8 * 256 * 151936 - 2 * 2**30
    assert blocks == int(left / (16 * 98304))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("qwen3-30b-a3b-h200", ""),
        ("qwen3-30b-a3b-h200-ep4", "--ep 4"),
        ("qwen3-30b-a3b-a100-ep2", "--gpu a100 --ep 2"),
        ("qwen3-30b-a3b-h100-tp2-ep4", "--gpu h100 --tp 2 --ep 4"),
    ],
)
def test_script_reproduces_the_shipped_profile(name: str, arguments: str, data_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.yaml"
    assert main(["--tables", str(data_folder / "latency"), *arguments.split(), "--out", str(out)]) == 0
    made, shipped = load_profile(out).model_dump(), load_profile(name).model_dump()
    _assert_close(made, shipped)
    shipped_text, made_text = find_config(name, "profiles").read_text(), out.read_text()
    assert _comments(made_text) == _comments(shipped_text)


def _assert_close(made: Any, shipped: Any) -> None:
    """Equal up to one unit of the last of the four digits that the file holds."""
    if isinstance(shipped, dict):
        assert made.keys() == shipped.keys()
        for key, value in shipped.items():
            _assert_close(made[key], value)
    elif isinstance(shipped, float | tuple):
        np.testing.assert_allclose(made, shipped, rtol=1.1e-3)
    else:
        assert made == shipped


def _comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("#")]


def test_fit_repeats_whole_steps(data_folder: Path) -> None:
    _, report = build_profile("qwen3-30b-a3b", data_folder / "latency")
    for kind in ("decode steps", "prefill steps"):
        assert report.fits[kind].points > 50
        assert report.fits[kind].median < 0.02
        assert report.fits[kind].worst < 0.1
    for _, large, highest in report.skew.values():
        assert 1.0 < large < highest < 1.5


def test_random_routing_activates_the_expected_experts(data_folder: Path) -> None:
    costs = KernelCosts(QWEN, H200, KernelTables(data_folder / "latency", H200.tables))
    tokens, dealt = costs.moe_measured("balanced")
    moe = costs.moe(tokens)
    assert moe[0] == pytest.approx(dealt[0])  # one token: 8 experts either way
    np.testing.assert_allclose(moe[tokens >= 256], dealt[tokens >= 256], rtol=1e-3)  # all experts either way
    sixteen = tokens == 16  # dealt tokens activate all 128 experts, random ones 82
    skewed = costs.moe_measured("power_law_1.01")[1][sixteen]
    assert skewed < moe[sixteen] < 0.75 * dealt[sixteen]


def table(folder: Path, name: str, **columns: list[Any]) -> None:
    pq.write_table(pa.table(columns), folder / f"aic_h200_vllm0.24_{name}_perf.parquet")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, "no such file"),
        (
            {"m": [1], "n": [5120], "latency": [0.1], "gemm_dtype": ["bfloat16"]},
            "k: missing column; found: m, n, latency",
        ),
        (
            {"m": [1], "n": [64], "k": [2048], "latency": [0.1], "gemm_dtype": ["bfloat16"]},
            "no rows with gemm_dtype=bfloat16, n=5120, k=2048",
        ),
        (
            {"m": [1], "n": [5120], "k": [2048], "latency": [float("nan")], "gemm_dtype": ["bfloat16"]},
            "latency: not finite and positive in rows with gemm_dtype=bfloat16, n=5120, k=2048",
        ),
    ],
)
def test_unusable_table_is_one_line(tmp_path: Path, columns: dict[str, list[Any]] | None, message: str) -> None:
    if columns is not None:
        table(tmp_path, "gemm", **columns)
    with pytest.raises(InputError) as caught:
        KernelTables(tmp_path, "aic_h200_vllm0.24").gemm(5120, 2048)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "aic_h200_vllm0.24_gemm_perf.parquet"))


def test_file_that_is_no_parquet_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "aic_h200_vllm0.24_gemm_perf.parquet").write_text("latency\n1\n")
    with pytest.raises(InputError, match=r"gemm_perf\.parquet: cannot be read: [^\n]+$"):
        KernelTables(tmp_path, "aic_h200_vllm0.24").gemm(5120, 2048)


def test_repeated_measurements_give_their_median(tmp_path: Path) -> None:
    table(
        tmp_path,
        "gemm",
        m=[2, 1, 2, 2],
        n=[8] * 4,
        k=[8] * 4,
        latency=[3.0, 1.0, 9.0, 4.0],
        gemm_dtype=["bfloat16"] * 4,
    )
    rows, us = KernelTables(tmp_path, "aic_h200_vllm0.24").gemm(8, 8)
    assert rows.tolist() == [1, 2]
    assert us.tolist() == [1000, 4000]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "qwen3-30b"], "--model: got 'qwen3-30b'; did you mean qwen3-30b-a3b or qwen3-235b-a22b?"),
        (["--ep", "0"], "--ep: got 0; allowed: an integer of at least 1"),
        ([], "no such file"),
    ],
)
def test_script_exits_with_2_and_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--tables", str(tmp_path), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_absent_pyarrow_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"pyarrow: not installed; .*pip install"):
        KernelTables(tmp_path, "aic_h200_vllm0.24").gemm(8, 8)


def test_product_that_was_not_measured_lies_between_its_neighbours_and_is_noted(tmp_path: Path) -> None:
    sizes = [(n, k) for n in (64, 256) for k in (64, 256)]
    columns = {"m": [8] * 4, "n": [n for n, _ in sizes], "k": [k for _, k in sizes], "gemm_dtype": ["bfloat16"] * 4}
    table(tmp_path, "gemm", **columns, latency=[1e-9 * n * k for n, k in sizes])
    tables = KernelTables(tmp_path, "aic_h200_vllm0.24")
    assert tables.gemm(128, 64)[1][0] == pytest.approx(1e-6 * 128 * 64)
    assert tables.gemm(128, 128)[1][0] == pytest.approx(1e-6 * 128 * 128)
    assert tables.gemm(512, 256)[1][0] == pytest.approx(1e-6 * 512 * 256)  # in proportion
    assert [note.rpartition(": ")[2] for note in tables.notes] == ["interpolated"] * 2 + [
        "in proportion to the largest"
    ]
    with pytest.raises(InputError, match="no rows with gemm_dtype=bfloat16, n=5120, k=64"):
        tables.gemm(5120, 64)


def test_large_all_reduce_is_bounded_by_the_ring_and_small_ones_are_as_measured(data_folder: Path) -> None:
    tables = KernelTables(data_folder / "latency", "aic_h200_vllm0.24")
    custom, nccl = (KernelCosts(QWEN, H200, tables, 8, 8, serving=serving) for serving in (None, Serving()))
    tokens = np.array([1.0, 256.0, 8192.0])
    ratio = nccl.communication(tokens) / custom.communication(tokens)
    assert ratio[:2].tolist() == [1, 1]
    assert 0.4 < ratio[2] < 0.9


def test_launches_bound_moe_steps_outside_cuda_graphs_from_below(data_folder: Path) -> None:
    def steps_s(launch_us: float) -> list[float]:
        serving = Serving(launch_us=launch_us)
        profile, _ = build_profile("qwen3-30b-a3b", data_folder / "latency", 4, H200, 4, serving=serving)
        cost = profile.compile(8192)
        return [cost.step_s([(0, tokens)], []) for tokens in (256, 512, 513, 1024, 8192)]

    free, slow = steps_s(0.0), steps_s(2000.0)
    assert slow[:2] == free[:2]
    assert all(48 * 2e-3 < step < 1.1 * 48 * 2e-3 for step in slow[2:4])  # the rest is the host's share of any step
    assert free[3] < 0.5 * slow[3]
    assert slow[4] == pytest.approx(max(free[4], 48 * 2e-3), rel=0.02)


def test_products_with_real_data_take_longer_where_compute_bounds_them(data_folder: Path) -> None:
    tables = KernelTables(data_folder / "latency", "aic_h200_vllm0.24")
    tokens, alone = KernelCosts(QWEN, H200, tables).projections
    ratio = KernelCosts(QWEN, H200, tables, serving=Serving()).projections[1] / alone
    assert ratio[tokens <= 512].tolist() == [1.0] * int((tokens <= 512).sum())
    assert ratio[tokens > 512] == pytest.approx(REAL_DATA)


def test_router_in_float32_and_norm_across_heads_cost_extra(data_folder: Path) -> None:
    tables = KernelTables(data_folder / "latency", "aic_h200_vllm0.24")
    special = MODELS["minimax-m2.5"]
    plain = replace(special, float32_router=False, norm_across_heads=False)
    one, other = (KernelCosts(model, H200, tables, 4, 4) for model in (special, plain))
    tokens = one.projections[0]
    extra = (one.projections[1] - other.projections[1])[tokens == 8192] / special.layers
    assert extra == pytest.approx(2e6 * 8192 * 256 * 3072 / (0.8 * 67e12), rel=0.3)
    added = one.communication(np.array([8.0])) - other.communication(np.array([8.0]))
    assert special.layers * 3 < added < special.layers * 15


def test_cache_in_fp8_is_read_in_less_time_and_holds_twice_the_tokens(data_folder: Path) -> None:
    def build(kv: str) -> Profile:
        return build_profile("qwen3-30b-a3b", data_folder / "latency", serving=Serving(kv=kv))[0]

    half, whole = build("fp8"), build("bfloat16")
    assert half.engine.num_blocks == pytest.approx(2 * whole.engine.num_blocks, abs=1)
    assert half.step_time.decode_context_us < 0.8 * whole.step_time.decode_context_us


def test_missing_moe_layout_lists_what_there_is(data_folder: Path) -> None:
    with pytest.raises(InputError, match=r"allowed moe_dtype/moe_tp_size/moe_ep_size: bfloat16/1/1"):
        KernelTables(data_folder / "latency", "aic_h200_vllm0.24").moe(QWEN, 3, "balanced")
