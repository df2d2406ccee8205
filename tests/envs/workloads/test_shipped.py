"""The shipped workloads: all of them generate, and the fitted ones resemble their data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import beta, ks_2samp

from servegym.configuration import shipped_configs
from servegym.envs.workloads import RequestTable, TraceConfig, generate, load_trace, load_workload

NAMES = sorted(shipped_configs("workloads"))
COUNT = 100_000


def draw(name: str, **options: Any) -> RequestTable:
    return generate(load_workload(name), **({"rate_rps": 5.0, "requests": COUNT, "seed": 0} | options))


def test_names() -> None:
    expected = {
        "azure-conv",
        "azure-conv-predicted",
        "azure-code",
        "reasoning",
        "mooncake-conversation",
        "agentic-coding",
        "chat-sessions",
        "fixed",
        "tenants",
    }
    expected |= {f"servegen-m-{size}" for size in ("large", "mid", "small")}
    expected |= {f"small-{kind}" for kind in ("steady", "bursty", "mixed", "sessions")}
    expected |= {f"burstgpt-{shape}" for shape in ("random", "central", "descending", "two-end", "average")}
    assert set(NAMES) == expected


def test_predictions_change_nothing_else() -> None:
    plain, predicted = (
        generate(load_workload(name), rate_rps=5.0, requests=5000, seed=1)
        for name in ("azure-conv", "azure-conv-predicted")
    )
    assert np.isnan(plain.predicted_tokens).all()
    for column in ("arrival_s", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(plain, column), getattr(predicted, column))
    error = np.log(predicted.predicted_tokens / predicted.output_tokens)
    assert abs(error.mean()) < 0.03
    assert error.std() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_tokens", [None, 4096])
def test_every_workload_generates(name: str, max_tokens: int | None) -> None:
    config = load_workload(name)
    assert config.name == name
    assert config.description
    assert config.source
    table = generate(config, rate_rps=5.0, requests=3000, seed=1, max_tokens=max_tokens)
    table.check(name)
    assert len(table) == 3000
    if max_tokens is not None:
        assert (table.prompt_tokens + table.output_tokens).max() <= max_tokens
    again = generate(config, rate_rps=5.0, requests=3000, seed=1, max_tokens=max_tokens)
    np.testing.assert_array_equal(table.prompt_tokens, again.prompt_tokens)
    np.testing.assert_array_equal(table.arrival_s, again.arrival_s)


@pytest.mark.parametrize("name", NAMES)
def test_mean_rates(name: str) -> None:
    counts = [len(draw(name, requests=None, duration_s=4000.0, seed=seed)) for seed in range(12)]
    assert np.mean(counts) == pytest.approx(20_000, rel=0.12)


@pytest.mark.parametrize(
    ("shape", "a", "b"), [("central", 5, 5), ("descending", 1, 3), ("two-end", 0.35, 0.35), ("average", 1, 1)]
)
def test_shapes_of_the_burstgpt_reconstructions(shape: str, a: float, b: float) -> None:
    prompts = draw(f"burstgpt-{shape}").prompt_tokens
    assert prompts.min() >= 16
    assert prompts.max() <= 2048
    quarters = np.diff(beta.cdf(np.linspace(0, 1, 5), a, b))
    assert np.histogram(prompts, np.linspace(16, 2048, 5))[0] / COUNT == pytest.approx(quarters, abs=0.01)


def test_burstgpt_random_has_the_reported_mean_and_median() -> None:
    prompts = draw("burstgpt-random").prompt_tokens
    assert prompts.mean() == pytest.approx(621, rel=0.02)
    assert np.median(prompts) == pytest.approx(353, rel=0.02)


# ---------------------------------------------------------------------------------------------- against data
Tokens = npt.NDArray[np.int32]


def fits(data_folder: Path, trace: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((data_folder / "traces" / "trace_fits.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = content[trace]
    return found


def distance_to_quantiles(tokens: Tokens, quantiles: list[float]) -> float:
    """Largest gap between the generated share of values up to each percentile of the data, and its percentage."""
    values = np.array(quantiles)
    below = np.searchsorted(np.sort(tokens), values, side="right") / len(tokens)
    # At ties the data's own distribution function jumps past several percentages.
    reached = np.searchsorted(values, values, side="right") - 1
    return float(np.abs(below - reached / 100)[:-1].max())


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "trace", "prompt_bound", "output_bound", "mean_error"),
    [
        ("azure-conv", "azure2023_conv", 0.055, 0.045, 0.02),
        ("azure-code", "azure2023_code", 0.035, 0.03, 0.03),
        ("mooncake-conversation", "mooncake_conversation", 0.045, 0.025, 0.03),
        ("reasoning", "servegen_deepseek-r1", 0.015, 0.015, 0.03),
        ("servegen-m-large", "servegen_m-large", 0.015, 0.015, 0.03),
        ("servegen-m-mid", "servegen_m-mid", 0.015, 0.02, 0.03),
        ("servegen-m-small", "servegen_m-small", 0.015, 0.015, 0.05),
    ],
)
def test_lengths_against_the_percentiles_of_the_data(
    data_folder: Path, name: str, trace: str, prompt_bound: float, output_bound: float, mean_error: float
) -> None:
    data, table = fits(data_folder, trace), draw(name, requests=300_000)
    prompt, output = (
        data.get(kind) or data[other] for kind, other in (("prompt", "input_tokens"), ("output", "output_tokens"))
    )
    for tokens, recorded, bound in (
        (table.prompt_tokens, prompt, prompt_bound),
        (table.output_tokens, output, output_bound),
    ):
        assert distance_to_quantiles(tokens, np.maximum(recorded["quantiles_101"], 1).tolist()) < bound
        assert tokens.mean() == pytest.approx(recorded["mean"], rel=mean_error)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "file", "prompt_bound", "output_bound"),
    [
        ("azure-code", "azure2023_code.csv.gz", 0.04, 0.03),
        # The file holds the first 60 % of the hour, the fit is to all of it.
        ("azure-conv", "azure2023_conv.csv.gz", 0.1, 0.1),
        ("mooncake-conversation", "mooncake_conversation.parquet", 0.045, 0.03),
    ],
)
def test_lengths_against_the_requests(
    data_folder: Path, name: str, file: str, prompt_bound: float, output_bound: float
) -> None:
    real, table = load_trace(TraceConfig(path=data_folder / "traces" / file)), draw(name)
    assert ks_2samp(table.prompt_tokens, real.prompt_tokens).statistic < prompt_bound
    assert ks_2samp(table.output_tokens, real.output_tokens).statistic < output_bound


def burstiness(table: RequestTable) -> list[float]:
    """CV of gaps, and dispersion of counts in windows of 1, 10 and 60 s."""
    gaps = np.diff(table.arrival_s)
    counts = [np.histogram(table.arrival_s, np.arange(0, table.arrival_s[-1], width))[0] for width in (1, 10, 60)]
    return [float(gaps.std() / gaps.mean()), *(float(count.var() / count.mean()) for count in counts)]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "trace", "bounds"),
    [
        ("azure-conv", "azure2023_conv", [0.04, 0.1, 0.2, 0.2]),
        ("azure-code", "azure2023_code", [0.25, 0.25, 0.25, 0.25]),
        ("mooncake-conversation", "mooncake_conversation", [0.04, 0.1, 0.25, 0.25]),
    ],
)
def test_burstiness_against_the_data(data_folder: Path, name: str, trace: str, bounds: list[float]) -> None:
    arrival = fits(data_folder, trace)["arrival"]
    recorded = [arrival["iat_cv"], arrival["dispersion_1s"], arrival["dispersion_10s"], arrival["dispersion_60s"]]
    table = draw(name, rate_rps=arrival["rate"], requests=200_000)
    for ours, theirs, bound in zip(burstiness(table), recorded, bounds, strict=True):
        assert ours == pytest.approx(theirs, rel=bound)


@pytest.mark.data
def test_mooncake_sessions_against_the_data(data_folder: Path) -> None:
    path = data_folder / "traces" / "mooncake_conversation.parquet"
    real, prefix = load_trace(TraceConfig(path=path)), fits(data_folder, "mooncake_conversation")["prefix"]
    assert len(np.unique(real.session)) == prefix["sessions"]
    assert (real.turn > 0).mean() == pytest.approx(prefix["multi_turn_frac_requests"], abs=1e-4)
    table = draw("mooncake-conversation", rate_rps=3.4, requests=12_031)
    assert (table.turn > 0).mean() == pytest.approx(prefix["multi_turn_frac_requests"], abs=0.02)
    assert hit_ratio(table) == pytest.approx(prefix["block_hit_ratio_infinite_cache"], abs=0.05)
    closed = load_trace(TraceConfig(path=path, closed_loop=True))
    think = [item.think_s[item.parent >= 0] for item in (closed, table)]
    # The hour leaves out long gaps, in the trace as in a window of the workload; the steps of 3 s are jittered.
    assert ks_2samp(*think).statistic < 0.07


def hit_ratio(table: RequestTable) -> float:
    """Share of full 512-token prompt blocks that an infinite cache would have."""
    templates: dict[int, int] = {}
    streams: dict[int, int] = {}
    hits = blocks = 0
    for i in range(len(table)):
        template, stream = int(table.template[i]), int(table.stream[i])
        prompt, shared = int(table.prompt_tokens[i]), int(table.template_tokens[i])
        known = max(min(shared, templates.get(template, 0)), streams.get(stream, 0))
        hits += min(known, prompt) // 512
        blocks += -(-prompt // 512)
        templates[template] = max(templates.get(template, 0), shared)
        streams[stream] = prompt + int(table.output_tokens[i])
    return hits / blocks


@pytest.mark.data
def test_reasoning_lengths_against_servegen(data_folder: Path) -> None:
    """The loader draws from the clients' tables, the workload from the fit to such draws."""
    path = data_folder / "traces" / "servegen_client_windows.parquet"
    drawn = load_trace(TraceConfig(path=path, model="deepseek-r1", duration_s=86_400, rate_rps=2.0))
    table = draw("reasoning")
    assert ks_2samp(drawn.prompt_tokens, table.prompt_tokens).statistic < 0.03
    assert ks_2samp(drawn.output_tokens, table.output_tokens).statistic < 0.03


@pytest.mark.data
def test_tracelab_example(data_folder: Path) -> None:
    table = load_trace(TraceConfig(path=data_folder / "traces" / "tracelab_replay_example_synthetic.csv"))
    assert len(table) == 303
    assert (table.parent >= 0).sum() == 303 - 48
    child = table.parent >= 0
    total = table.prompt_tokens + table.output_tokens
    assert (table.prompt_tokens[child] >= total[table.parent[child]]).all()
