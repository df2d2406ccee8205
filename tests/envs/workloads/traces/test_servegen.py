"""ServeGen: requests drawn from tables of clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.envs.workloads.table import RequestTable
from servegym.envs.workloads.traces import TraceConfig, load_trace
from servegym.errors import InputError

LEVELS = ("01", "05", "10", "20", "30", "40", "50", "60", "70", "80", "90", "95", "99")
PARTS = ("input_tokens", "output_tokens", "text_tokens", "image_tokens", "audio_tokens", "video_tokens")


def length_row(model: str, client: int, time_s: int, **quantiles: tuple[float, list[float]]) -> str:
    cells = [model, str(client), str(time_s)]
    for part in PARTS:
        mean, values = quantiles.get(part, (None, [None] * len(LEVELS)))
        cells += ["" if mean is None else str(mean), *("" if value is None else str(value) for value in values)]
    return ",".join(cells)


def flat(value: float) -> tuple[float, list[float]]:
    """A property that is always the same."""
    return value, [value] * len(LEVELS)


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    """Two models: `a` with clients 0 (steady), 1 (bursty) and 2 (no lengths), `b` with pictures."""
    rows = ["model,client,t_s,rate,cv,pattern,shape,scale"]
    for start in range(0, 7200, 600):
        rows += [f"a,0,{start},2.0,1,Gamma,1.0,0", f"a,1,{start},1.0,5,Gamma,0.04,0"]
        rows += [f"a,2,{start},1.0,1,Weibull,0.8,0", f"b,0,{start},1.0,1,Gamma,1,0"]
    rows += ["a,0,7200,8.0,1,Gamma,1.0,0"]
    path = tmp_path / "client_windows.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    columns = [
        "model",
        "client",
        "t",
        *(f"{part}_{item}" for part in PARTS for item in ("mean", *(f"q{q}" for q in LEVELS))),
    ]
    spread = (200.0, [100.0 + 10 * i for i in range(len(LEVELS))])
    lengths = [
        ",".join(columns),
        length_row("a", 0, 0, input_tokens=flat(100), output_tokens=flat(7)),
        length_row("a", 0, 3600, input_tokens=flat(300), output_tokens=flat(7)),
        length_row("a", 1, 3600, input_tokens=spread, output_tokens=flat(9)),
        length_row("b", 0, 0, text_tokens=flat(10), image_tokens=flat(600), output_tokens=flat(3)),
    ]
    (tmp_path / "client_lengths.csv").write_text("\n".join(lengths) + "\n", encoding="utf-8")
    return path


def load(path: Path, **options: Any) -> RequestTable:
    return load_trace(TraceConfig(path=path, **options))


def test_rates_and_lengths_of_clients(windows: Path) -> None:
    table = load(windows, model="a", duration_s=7200)
    assert np.bincount(table.user) == pytest.approx([14_400, 7200, 7200], rel=0.01)
    steady = table.user == 0
    late = table.arrival_s >= 3600
    assert set(table.prompt_tokens[steady & ~late].tolist()) == {100}
    assert set(table.prompt_tokens[steady & late].tolist()) == {300}
    # The upper end of the table is placed so that the mean is met.
    assert table.prompt_tokens[table.user == 1].mean() == pytest.approx(200, rel=0.05)
    # Client 2 borrows from the others, in proportion to their requests.
    assert (table.output_tokens[table.user == 2] == 7).mean() == pytest.approx(2 / 3, abs=0.03)
    assert (np.diff(table.arrival_s) >= 0).all()


def test_burstiness_of_clients(windows: Path) -> None:
    table = load(windows, model="a", duration_s=7200)
    for user, low, high in ((0, 0.9, 1.1), (1, 3.5, 5.5), (2, 1.15, 1.4)):
        gaps = np.diff(table.arrival_s[table.user == user])
        assert low < gaps.std() / gaps.mean() < high


def test_target_rate_scales_every_client(windows: Path) -> None:
    table = load(windows, model="a", rate_rps=40.0, duration_s=3600)
    assert len(table) / 3600 == pytest.approx(40, rel=0.01)
    assert np.bincount(table.user) / len(table) == pytest.approx([0.5, 0.25, 0.25], abs=0.01)
    assert table.arrival_s[-1] == pytest.approx(3600, abs=5)


def test_parts_of_multimodal_prompts_add_up(windows: Path) -> None:
    table = load(windows, model="b")
    assert set(table.prompt_tokens.tolist()) == {610}
    assert len(table) == pytest.approx(3600, rel=0.01)


def test_window(windows: Path) -> None:
    table = load(windows, model="a", start_s=7200, duration_s=60)
    assert len(table) == pytest.approx(480, rel=0.3)
    assert table.arrival_s[-1] < 60


def test_seeds(windows: Path) -> None:
    one, again, other = (load(windows, model="b", seed=seed).arrival_s for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one[:100], other[:100])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model: missing; known: a, b"),
        ({"model": "c"}, "model: got 'c'; known: a, b"),
        ({"model": "a", "start_s": 90_000}, "start_s: no client of a is active"),
        ({"model": "a", "rate_rps": 1e-9}, "rate_rps: no request is drawn"),
        ({"model": "a", "rate_rps": 1e9}, "rate_rps: 3.6e+12 requests would be drawn; allowed: at most 20,000,000"),
    ],
)
def test_bad_options(windows: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(windows, **options)
    assert message in str(caught.value)


def test_lengths_must_lie_beside(windows: Path) -> None:
    (windows.parent / "client_lengths.csv").unlink()
    with pytest.raises(InputError, match=r"needs the clients' lengths beside it, in client_lengths.csv"):
        load(windows, model="a")
