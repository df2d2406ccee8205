"""``servegym profile``: a profile of any shape in the tables, and bad input in one line."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from servegym.agents.cli import app
from servegym.agents.profile_cli import _report, _tables
from servegym.envs.profiles import load_profile
from servegym.envs.profiles.silicon import Check, Compared
from servegym.envs.profiles.silicon_rows import Case
from servegym.errors import InputError

SHAPE = (
    "layers=24,hidden=2048,heads=32,kv_heads=4,head_dim=128,experts=128,top_k=8,moe_intermediate=768,vocabulary=100000"
)


def test_another_shape_and_precision(data_folder: Path, tmp_path: Path) -> None:
    def build(*options: str) -> tuple[float, dict[str, object]]:
        out = tmp_path / "made.yaml"
        command = ["profile", "build", "--tables", str(data_folder / "latency"), "--out", str(out), "--json", *options]
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0
        return load_profile(out).step_time.dense_us.us[0], json.loads(result.stdout)

    whole, _ = build()
    half, _ = build("--model", "half", "--shape", SHAPE)
    assert half == pytest.approx(whole / 2, rel=0.01)
    _, report = build("--model", "minimax-m2.5", "--tp", "8", "--precision", "fp8_block")
    assert report["profile"] == "minimax-m2.5-h200-tp8-ep8-fp8-block"
    assert any("fp8_block" in str(note) for note in report["inferred"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ep", "3"], "--ep: got 3; allowed with --tp 1 --dp 1: 1"),
        (["--gpu", "b200"], "--gpu: got 'b200'"),
        (["--precision", "fp3"], "--precision: got 'fp3'"),
        (["--gpu", "h100", "--precision", "fp8"], "allowed on NVIDIA H100, which is scaled: bf16"),
        (["--shape", "layers=3"], "--shape: missing: hidden"),
        (["--shape", "layers=0"], "--shape: layers: got '0'"),
        (["--shape", "depth=3"], "--shape: depth: unknown key"),
        (["--json"], "--json: got no --out"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        CliRunner().invoke(app, ["profile", "build", "--tables", str(tmp_path), *options], catch_exceptions=False)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_check_reports_errors_by_model_and_batch_size_and_the_worst_cases() -> None:
    def compared(concurrency: int, ttft_ms: float, tpot_ms: float) -> Compared:
        return Compared(Case("MiniMaxAI/MiniMax-M2.5", 1024, 1024, concurrency, 8, 100.0, 10.0), ttft_ms, tpot_ms)

    unfitted = [compared(4, 60.0, 9.0), compared(8, 70.0, 9.0)]
    crossed = [compared(4, 90.0, 10.0), compared(8, 120.0, 10.5)]
    outcome = Check(unfitted, crossed, {(4,): 1000.0, (8,): 1200.0}, {"sglang: no kernel tables of it": 3})
    report = _report(outcome, 1)
    assert report["fitted_to_other_batch_sizes"]["MiniMax-M2.5"]["ttft_median_absolute"] == pytest.approx(0.15)
    assert report["without_launches"]["MiniMax-M2.5 batch 8"]["ttft_bias"] == pytest.approx(-0.3)
    assert report["launch_us"] == {"4": 1000.0, "8": 1200.0}
    assert [item["case"] for item in report["worst"]] == ["MiniMax-M2.5 tp8 1024/1024 c8"]
    console = Console(width=120, file=StringIO())
    for table in _tables(outcome, 1):
        console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1200 us for 8" in shown
    assert "not known" in shown


def test_what_an_engine_adds_stands_in_the_source(data_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.yaml"
    tables = str(data_folder / "latency")
    command = ["profile", "build", "--tables", tables, "--gpu", "h100", "--tp", "4", "--out", str(out)]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    source = load_profile(out).source
    assert "nothing here was measured on NVIDIA H100" in source
    assert "at least 1400 us a layer" in source
    assert "bounded by NCCL's ring" in source
