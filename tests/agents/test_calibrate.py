"""``servegym calibrate`` against a server that answers at known times."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import command

from servegym.engine_bridge.cluster.config import ClusterFile
from servegym.engine_bridge.cluster.launcher import running_cluster
from servegym.envs.profiles.profile import load_profile

# With two sequences the frontend and a prefill's first tokens would be one column of the fit.
LIMITS = ["num_blocks=129", "block_size=16", "max_num_seqs=4", "max_num_batched_tokens=512", "max_model_len=640"]


@pytest.fixture
def url(fake_cluster: Callable[..., ClusterFile], tmp_path: Path) -> Iterator[str]:
    file = fake_cluster({"ttft_s": 0.04, "itl_s": 0.006}, engines=1)
    with running_cluster(file, tmp_path / "cluster") as cluster:
        yield cluster.engines[0].url


def test_a_profile_of_a_server_and_going_on_with_it(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "mine.yaml", tmp_path / "mine.png"
    sets = [word for limit in LIMITS for word in ("--set", limit)]
    options = ["--engine", url, "--out", str(out), "--rounds", "2", "--plot", str(plot), "--json", *sets]
    assert command(monkeypatch, "calibrate", *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert plot.stat().st_size > 1000
    time = load_profile(out).step_time
    assert time.fixed_us + time.dense_us.us[0] + time.per_sequence_us == pytest.approx(6000, rel=0.5)
    assert report["frontend"]["request_us"] == pytest.approx(34_000, rel=0.3)
    assert not report["exact_step_records"]

    # A run that was cut off: what is there is not measured again.
    path = out.with_suffix(".measurements.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-3]) + "\n")
    assert command(monkeypatch, "calibrate", *options) == 0
    again = path.read_text().splitlines()
    assert again[: len(lines) - 3] == lines[:-3]
    assert len(again) == len(lines)

    capsys.readouterr()
    assert command(monkeypatch, "calibrate", *options, "--set", "max_num_seqs=1") == 2
    assert "measurements of another engine or other limits" in capsys.readouterr().err


def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "a.yaml")]
    for arguments, said in (
        (out, "allowed: --engine with a URL, or --cluster with a name"),
        (["--out", str(tmp_path / "a.txt"), "--engine", "http://127.0.0.1:1"], "allowed: a .yaml file"),
        ([*out, "--engine", "http://127.0.0.1:1"], "127.0.0.1:1"),
        ([*out, "--engine", "http://127.0.0.1:1", "--set", "x"], "allowed: LIMIT=VALUE"),
        ([*out, "--cluster", str(tmp_path)], "no such cluster runs"),
    ):
        assert command(monkeypatch, "calibrate", *arguments) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
