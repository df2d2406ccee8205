"""The expert model: costs, loads, traffic, and what a placement changes; in both modes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from support import TOY, random_table

from servegym.baselines.interface import ExpertLoad, Placement
from servegym.baselines.registry import create
from servegym.envs.profiles.profile import ExpertShape, Profile
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.simulator.experts.costs import expert_costs, uniform_activated, uniform_traffic
from servegym.envs.simulator.kernel.experts.excess import expected_max
from servegym.envs.simulator.metrics import RunOutcome, engine_metrics
from servegym.errors import InputError

SHAPE: dict[str, Any] = {
    "layers": 6,
    "experts": 16,
    "top_k": 2,
    "ranks": 1,
    "expert_us": 1.0,
    "expert_bytes": 1_000_000,
}
SHAPE |= {"token_bytes": 4096, "link_gb_s": 10, "link_latency_us": 5}
POWER_LAW = {"source": "power_law", "preset": "power_law_1.2", "tokens": 2048, "tasks": 3}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("profiles") / "experts.yaml"
    path.write_text(yaml.safe_dump(TOY | {"experts": SHAPE}))
    return str(path)


def run(profile: str, policy: Any = None, *, count: int = 400, seed: int = 1, **config: Any) -> SimulatedCluster:
    experts = {"routing": POWER_LAW} | config.pop("experts", {})
    cluster = ClusterConfig.model_validate(
        {"profile": profile, "engines": 4, "mode": "lockstep", "experts": experts} | config
    )
    table = random_table(seed, count=count, rate_rps=120.0)
    simulated = SimulatedCluster(cluster, table, create("request", "fcfs"), create("engine", "round_robin"), policy)
    simulated.run()
    return simulated


def statistics(simulated: SimulatedCluster) -> dict[str, float]:
    assert simulated.experts is not None
    return simulated.experts.groups[0].statistics()


class Fixed:
    """Places the experts as told, once."""

    def __init__(self, wanted: npt.NDArray[np.int64]) -> None:
        self.wanted = wanted
        self.loads: list[ExpertLoad] = []

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        self.loads.append(load)
        return Placement(self.wanted, current.ranks)


class Watcher:
    needs_sources = True
    needs_coactivation = True

    def __init__(self) -> None:
        self.loads: list[ExpertLoad] = []

    def __deepcopy__(self, memo: Any) -> Watcher:
        return self

    def place(self, load: ExpertLoad, current: Placement) -> None:
        self.loads.append(load)


class TestCosts:
    def test_uniform_routing_on_equal_ranks_costs_what_the_profile_says(self) -> None:
        profile = Profile.model_validate(TOY | {"experts": SHAPE})
        costs = expert_costs(profile, 4, 4, 512)
        assert profile.experts is not None
        assert profile.step_time.moe_us is not None
        for tokens in (8, 64, 512):
            load = tokens * SHAPE["top_k"]  # all on the one rank that the curve was taken for
            compute = costs.compute_s[int(load * costs.compute_scale)]
            active = uniform_activated(profile.experts, 1, tokens)
            layer = compute + costs.expert_s * active
            measured = float(profile.step_time.moe_us.at(np.array([tokens]))[0]) * 1e-6
            assert layer * SHAPE["layers"] == pytest.approx(measured, rel=0.03)

    def test_uniform_traffic_counts_remote_ranks(self) -> None:
        rng = np.random.default_rng(0)
        shape = ExpertShape(**(SHAPE | {"top_k": 3}))
        chosen = np.argsort(rng.random((40_000, 16)), axis=1)[:, :3] // 4
        counted = np.mean([len({rank for rank in row if rank != 0}) for row in chosen])
        assert uniform_traffic(shape, 4) == pytest.approx(counted, rel=0.01)

    def test_expected_max_of_normals(self) -> None:
        rng = np.random.default_rng(0)
        for mean, deviation in (([10.0] * 8, [2.0] * 8), ([5.0, 9.0, 9.5], [1.0, 2.0, 0.5]), ([3.0, 50.0], [1.0, 1.0])):
            sampled = rng.normal(mean, deviation, size=(200_000, len(mean))).max(axis=1).mean()
            found = expected_max(np.array(mean), np.array(deviation), len(mean))
            assert found == pytest.approx(sampled, rel=0.01)


class TestModes:
    @pytest.mark.parametrize("traffic", ["return", "stay"])
    @pytest.mark.parametrize("engines", [{"engines": 4}, {"engines": 2, "mode": "independent"}])
    def test_mean_field_comes_close_to_sampled_tokens(
        self, profile: str, traffic: str, engines: dict[str, Any]
    ) -> None:
        ranks = {"ranks": 4, "traffic": traffic}
        field = statistics(run(profile, **engines, experts=ranks))
        sampled = statistics(run(profile, **engines, experts=ranks | {"mode": "sampled"}))
        assert field["imbalance"] == pytest.approx(sampled["imbalance"], rel=0.06)
        assert field["experts_s"] == pytest.approx(sampled["experts_s"], rel=0.04)
        # For staying tokens the busiest of dispatch and combine fluctuates more than the tables know.
        tolerance = 0.06 if traffic == "return" else 0.12
        assert field["exchange_s"] == pytest.approx(sampled["exchange_s"], rel=tolerance)

    def test_same_seed_same_result(self, profile: str) -> None:
        for mode in ("mean_field", "sampled"):
            first, second = (run(profile, experts={"mode": mode}, count=100) for _ in range(2))
            assert first.memory.requests.tobytes() == second.memory.requests.tobytes()

    def test_every_request_finishes(self, profile: str) -> None:
        outcome = RunOutcome.of(run(profile))
        assert np.isfinite(outcome.finish_s).all()

    def test_long_chunks_are_sampled_without_bias(self, profile: str) -> None:
        whole = statistics(run(profile, experts={"mode": "sampled", "chunk_sample": 4096}, count=100))
        part = statistics(run(profile, experts={"mode": "sampled", "chunk_sample": 32}, count=100))
        assert part["experts_s"] == pytest.approx(whole["experts_s"], rel=0.03)
        assert part["exchange_s"] == pytest.approx(whole["exchange_s"], rel=0.05)


class TestLoad:
    def test_counts_every_token_of_the_window(self, profile: str) -> None:
        for mode in ("mean_field", "sampled"):
            watcher = Watcher()
            replacement = {"interval_steps": 400, "first_steps": 400, "window_steps": 400}
            simulated = run(profile, watcher, experts={"mode": mode, "replacement": replacement})
            load = watcher.loads[0]
            assert load.steps == 400
            per_layer = load.tokens.sum(axis=1)
            assert per_layer == pytest.approx(per_layer[0])
            assert load.by_source is not None
            assert load.coactivation is not None
            assert load.by_source.shape == (6, 4, 16)
            assert load.by_source.sum(axis=1) == pytest.approx(load.tokens)
            assert load.coactivation.sum(axis=(1, 2)) == pytest.approx(2048 * 4)
            # Idle ranks count one dummy token a step, all others what the engines computed.
            computed = simulated.memory.engines["computed_tokens"].sum() + 4 * simulated.memory.engines["steps"].sum()
            assert 0 < per_layer[0] <= 2 * computed

    def test_policy_is_asked_at_vllms_times(self, profile: str) -> None:
        watcher = Watcher()
        simulated = run(profile, watcher, experts={"replacement": {"interval_steps": 200}})
        steps = int(statistics(simulated)["steps"])
        assert len(watcher.loads) == 1 + (steps - 50) // 200


class TestPlacement:
    def test_balanced_placement_is_balanced(self, profile: str) -> None:
        """Power-law loads on linear ranks are uneven; experts dealt by their load are not."""
        watcher = Watcher()
        before = run(profile, watcher, experts={"replacement": {"interval_steps": 300, "first_steps": 300}})
        order = np.argsort(-watcher.loads[0].tokens, axis=1)
        dealt = np.stack([order[:, i::4] for i in range(4)], axis=1).reshape(6, 16)
        after = run(profile, Fixed(dealt), experts={"replacement": {"interval_steps": 100}})
        assert statistics(after)["imbalance"] < statistics(before)["imbalance"]
        assert engine_metrics(after)["replacements"] == 1
        assert engine_metrics(after)["expert_imbalance"] == statistics(after)["imbalance"]

    def test_a_stall_lasts_as_long_as_the_transfer(self, profile: str) -> None:
        reversed_ = np.tile(np.arange(16)[::-1], (6, 1))
        replacement = {"interval_steps": 100_000, "first_steps": 50, "mode": "stall", "layer_overhead_s": 0.01}
        stalled = run(profile, Fixed(reversed_), experts={"replacement": replacement})
        free = run(profile, Fixed(reversed_), experts={"replacement": replacement | {"layer_overhead_s": 0.0}})
        # Four experts of 1 MB at 10 GB/s to each rank, and the overhead, for each of 6 layers.
        assert stalled.replacers[0].transfer_s == pytest.approx(6 * (0.01 + 4 * 1e6 / 10e9))
        assert free.replacers[0].transfer_s == pytest.approx(6 * 4 * 1e6 / 10e9)

    def test_async_layers_come_into_force_one_by_one(self, profile: str) -> None:
        wanted = np.tile(np.arange(16)[::-1], (6, 1))
        replacement = {"interval_steps": 100_000, "first_steps": 20, "layer_overhead_s": 0.05}
        simulated = run(profile, Fixed(wanted), count=60, experts={"replacement": replacement})
        assert simulated.experts is not None
        assert (simulated.experts.groups[0].placement.physical_to_logical == wanted).all()
        assert not simulated.replacers[0].busy
        slow = run(profile, Fixed(wanted), count=60, experts={"replacement": replacement | {"layer_overhead_s": 1e3}})
        assert slow.experts is not None
        assert (slow.experts.groups[0].placement.physical_to_logical[0] == np.arange(16)).all()
        assert slow.replacers[0].busy

    def test_staying_tokens_travel_less_when_affine_experts_share_a_rank(self, profile: str) -> None:
        """Experts of layer l + 1 sorted by their best predecessor's rank: fewer tokens leave their rank."""
        watcher = Watcher()
        settings = {"traffic": "stay", "ranks": 4, "replacement": {"interval_steps": 10_000, "first_steps": 200}}
        base = run(profile, watcher, experts=settings)
        pairs = watcher.loads[0].coactivation
        assert pairs is not None
        rows = [np.arange(16)]
        for layer in range(5):
            rank = np.empty(16, dtype=int)
            rank[rows[-1]] = np.arange(16) // 4
            pull = np.stack([pairs[layer][rank == r].sum(axis=0) for r in range(4)])
            free, row = [4] * 4, [[] for _ in range(4)]  # type: ignore[var-annotated]
            for expert in np.argsort(-pull.max(axis=0)):
                best = max((r for r in range(4) if free[r]), key=lambda r: pull[r, expert])
                row[best].append(expert)
                free[best] -= 1
            rows.append(np.concatenate(row))
        policy = Fixed(np.array(rows, dtype=np.int64))
        moved = run(profile, policy, experts=settings | {"replacement": {"interval_steps": 10_000, "first_steps": 1}})
        assert statistics(moved)["exchange_s"] <= statistics(base)["exchange_s"]

    def test_redundant_slots_split_the_load(self, profile: str) -> None:
        """All 16 experts twice on 4 ranks: with replicas everywhere each rank gets the same expected load."""
        twice = np.tile(np.concatenate([np.arange(16), np.roll(np.arange(16), 8)]), (6, 1))
        plain = statistics(run(profile))
        settings = {"redundant_experts": 16, "replacement": {"interval_steps": 100_000, "first_steps": 1}}
        double = statistics(run(profile, Fixed(twice), experts=settings))
        assert double["imbalance"] < plain["imbalance"]


class TestBadInput:
    @pytest.mark.parametrize(
        ("experts", "message"),
        [
            ({"ranks": 3}, "16 slots .* on 3 ranks; allowed: slots that are a multiple of ranks"),
            ({"redundant_experts": 2}, "18 slots .* on 4 ranks"),
            ({"ranks": 2}, "got 2 on 4 engines in lockstep; allowed: a multiple of engines"),
        ],
    )
    def test_sizes_that_do_not_divide(self, profile: str, experts: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            run(profile, experts=experts, count=5)

    def test_a_placement_that_loses_an_expert(self, profile: str) -> None:
        lost = np.tile(np.arange(16), (6, 1))
        lost[2, 5] = 4
        with pytest.raises(InputError, match=r"layer 2.*expert 5"):
            run(profile, Fixed(lost), experts={"replacement": {"interval_steps": 100}})

    def test_a_profile_without_experts(self, tmp_path: Any) -> None:
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(TOY))
        with pytest.raises(InputError, match="profile toy has no section experts"):
            run(str(path), count=5)

    def test_more_choices_than_experts(self) -> None:
        with pytest.raises(ValueError, match="top_k"):
            ExpertShape(**(SHAPE | {"experts": 4, "top_k": 5}))
