"""The check against published measurements: what is covered, what errors it finds, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from servegym.envs.profiles.profile import load_profile
from servegym.envs.profiles.serving import LAUNCH_US
from servegym.envs.profiles.silicon import Compared, Engine, busy, cross, fit_launch, predict, reason, table_engines
from servegym.envs.profiles.silicon_rows import LLAMA_8B, LLAMA_70B, RUNS, SILICON_TABLE, Case, read_cases
from servegym.errors import InputError

MINIMAX = "MiniMaxAI/MiniMax-M2.5"


def with_launches(case: Case, launch_us: float) -> Engine:
    """An engine whose steps beyond CUDA graphs take ten layers of launches at least."""
    engine = Engine.of(load_profile("qwen3-30b-a3b-h200"))
    least = np.where(np.arange(len(engine.cost.local_table_s)) > 512, 1e-5 * launch_us, 0.0)
    return replace(engine, cost=replace(engine.cost, local_table_s=np.maximum(engine.cost.local_table_s, least)))


def measured(concurrencies: tuple[int, ...], launch_us: float) -> list[Case]:
    cases = [Case("m", 1000, 50, concurrency, 1, 1.0, 1.0) for concurrency in concurrencies]
    made = predict(cases, with_launches, launch_us)
    return [replace(item.case, ttft_ms=item.ttft_ms, tpot_ms=item.tpot_ms) for item in made]


def test_dumps_of_one_setting_are_one_case(data_folder: Path) -> None:
    cases, left_out = read_cases(data_folder / "latency")
    assert len(cases) == 114
    assert len({case.label for case in cases}) == len(cases)
    assert any("Kimi" in reason for reason in left_out)
    twice = next(case for case in cases if case.label == "MiniMax-M2.5 tp8 1024/1024 c16")
    assert twice.spread == pytest.approx(131.153427 / 84.137981 - 1)
    assert twice.version == "0.18.0"


def test_small_batches_are_within_the_errors_that_the_check_reports(data_folder: Path) -> None:
    folder = data_folder / "latency"
    cases = [case for case in read_cases(folder)[0] if case.concurrency in (4, 8) and case.osl == 1024]
    compared = predict(cases, table_engines(folder), LAUNCH_US)
    for model, tpot, ttft in ((LLAMA_70B.model, 0.07, 0.09), (MINIMAX, 0.2, 0.12)):
        items = [item for item in compared if item.case.model == model]
        assert np.median([abs(item.tpot_error) for item in items]) < tpot
        assert np.median([abs(item.ttft_error) for item in items]) < ttft


def test_engine_of_a_described_run_is_busy_all_the_time_and_the_others_would_need_more(data_folder: Path) -> None:
    folder = data_folder / "latency"
    engines = table_engines(folder)
    found: dict[str, list[float]] = {}
    for case in read_cases(folder)[0]:
        share = busy(case, engines(case, LAUNCH_US).cost, 0.9 * case.isl, 0.9 * case.osl)
        found.setdefault(case.model, []).append(share)
    assert np.median(found[LLAMA_70B.model]) == pytest.approx(1, abs=0.1)
    assert np.median(found[MINIMAX]) == pytest.approx(1, abs=0.1)
    assert min(found[LLAMA_8B.model]) > 1.15
    assert [model for model, run in RUNS.items() if not run.described] == [LLAMA_8B.model]


def test_fit_finds_the_launches_that_made_the_measurements() -> None:
    assert fit_launch(measured((1, 4), 1000.0), with_launches) == 1000.0


def test_each_half_of_the_batch_sizes_is_predicted_from_the_other() -> None:
    cases = measured((1, 4), 1600.0) + measured((2, 8), 800.0)
    crossed, fitted = cross(cases, with_launches)
    assert fitted == {(1, 4): 800.0, (2, 8): 1600.0}
    assert all((item.ttft_error < 0) == (item.case.concurrency in (1, 4)) for item in crossed)


def test_reasons_name_what_the_rows_tell() -> None:
    case = Case(MINIMAX, 1024, 1024, 4, 4, 100.0, 10.0, version="0.16.0")
    assert "fill only 65% of its time" in reason(Compared(case, 90.0, 8.0, busy=0.65))
    assert "differ by 56%" in reason(Compared(replace(case, spread=0.56), 90.0, 8.0))
    assert "KV cache" in reason(Compared(case, 90.0, 8.0, full=True))
    assert reason(Compared(replace(case, version="0.18.0"), 90.0, 8.0)) == "not known"
    assert "2.5 s a second" in reason(Compared(replace(case, model=LLAMA_8B.model), 90.0, 8.0, busy=2.5))


def test_other_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"aic_silicon_ttft_tpot.parquet: no such file"):
        read_cases(tmp_path)
    pq.write_table(pa.table({"backend": ["vllm"]}), tmp_path / SILICON_TABLE)
    with pytest.raises(InputError, match=r"backend_version: missing column; found: backend"):
        read_cases(tmp_path)
