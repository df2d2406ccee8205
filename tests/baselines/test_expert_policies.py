"""Expert placements: what holds for all of them, and what each does differently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.baselines.expert.loads import (
    balancedness,
    check_placement,
    crossing_share,
    moved_experts,
    rank_loads,
    remote_share,
    replica_counts,
)
from servegym.baselines.expert.static import linear_placement
from servegym.baselines.interface import ExpertLoad, Placement
from servegym.baselines.registry import create, names
from servegym.errors import InputError

POLICIES = names("expert")


def skewed(seed: int, layers: int = 4, experts: int = 16, ranks: int = 4, steps: int = 100) -> ExpertLoad:
    """A load with everything that a policy may ask for."""
    rng = np.random.default_rng(seed)
    tokens = rng.dirichlet(np.full(experts, 1.5), size=layers) * 1e5
    sources = rng.dirichlet(np.full(ranks, 0.5), size=(layers, experts)).swapaxes(1, 2) * tokens[:, None]
    pairs = rng.gamma(0.2, 1.0, size=(layers - 1, experts, experts)) * 1e3
    return ExpertLoad(tokens, sources, pairs, steps=steps, future=tokens[:, ::-1].copy(), top_k=2)


def linear(layers: int = 4, experts: int = 16, slots: int = 16, ranks: int = 4) -> Placement:
    return Placement(linear_placement(layers, experts, slots), ranks)


class TestAll:
    @pytest.mark.parametrize("name", POLICIES)
    @pytest.mark.parametrize("slots", [16, 20, 32, 64])
    @given(seed=st.integers(0, 10_000))
    @settings(max_examples=8, deadline=None)
    def test_every_expert_keeps_a_slot_and_the_same_input_gives_the_same_answer(
        self, name: str, slots: int, seed: int
    ) -> None:
        load, current = skewed(seed), linear(slots=slots)
        wanted = create("expert", name).place(load, current)
        again = create("expert", name).place(load, current)
        if wanted is None:
            assert again is None
            return
        check_placement(wanted, 16)
        assert again is not None
        np.testing.assert_array_equal(wanted.physical_to_logical, again.physical_to_logical)
        assert wanted.physical_to_logical.shape == current.physical_to_logical.shape

    @pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("linear", "round_robin", "random")])
    def test_nothing_routed_moves_nothing(self, name: str) -> None:
        empty = ExpertLoad(np.zeros((4, 16)), np.zeros((4, 4, 16)), np.zeros((3, 16, 16)), future=np.zeros((4, 16)))
        assert create("expert", name).place(empty, linear()) is None

    @pytest.mark.parametrize("name", [name for name in POLICIES if name != "flashlb"])
    def test_a_placement_that_stands_is_kept(self, name: str) -> None:
        policy, load = create("expert", name), skewed(3)
        wanted = policy.place(load, linear()) or linear()
        if name == "source_aware":  # where experts are now is part of its objective
            wanted = policy.place(load, wanted) or wanted
        if name in ("exflow", "grace"):  # they descend from where they are
            for _ in range(4):
                wanted = policy.place(load, wanted) or wanted
        assert policy.place(load, wanted) is None


class TestBalance:
    @pytest.mark.parametrize(
        "name", ["eplb", "flashlb", "edr", "source_aware,beta=0.05", "moetuner", "mindspeed", "prism"]
    )
    def test_ranks_become_more_even(self, name: str) -> None:
        load, current = skewed(1), linear()
        wanted = create("expert", name).place(load, current)
        assert wanted is not None
        before, after = (balancedness(rank_loads(load.tokens, p)).mean() for p in (current, wanted))
        assert after > before + 0.1

    def test_eplb_copies_the_heaviest(self) -> None:
        load = ExpertLoad(np.array([[90.0, 10.0, 10.0, 10.0]]))
        wanted = create("expert", "eplb").place(load, Placement(linear_placement(1, 4, 6), 2))
        assert wanted is not None
        assert replica_counts(wanted.physical_to_logical, 4)[0, 0] == 3

    def test_flashlb_waits_until_it_has_worsened(self) -> None:
        policy, load = create("expert", "flashlb"), skewed(2)
        first = policy.place(load, linear())
        assert first is not None
        assert policy.place(load, first) is None
        slightly = ExpertLoad(load.tokens * (1 + 0.02 * np.cos(np.arange(16))), steps=100)
        assert policy.place(slightly, first) is None
        assert policy.place(skewed(9), first) is not None

    def test_flashlb_puts_no_two_copies_on_one_rank(self) -> None:
        wanted = create("expert", "flashlb").place(skewed(5), linear(slots=32))
        assert wanted is not None
        for row in wanted.physical_to_logical.reshape(4, 4, 8):
            for rank in row:
                assert len(set(rank.tolist())) == 8

    def test_metro_balances_activations_not_tokens(self) -> None:
        """Two experts with nearly all tokens, and two that are activated as often: in tokens 2 + 0, in reads 1 + 1."""
        load = ExpertLoad(np.array([[9000.0, 9000.0, 3000.0, 3000.0, 1.0, 1.0, 1.0, 1.0]]), steps=1000)
        wanted = create("expert", "metro").place(load, Placement(linear_placement(1, 8, 8), 2))
        assert wanted is not None
        often = wanted.physical_to_logical.reshape(2, 4) < 4
        assert often.sum(axis=1).tolist() == [2, 2]

    def test_metro_copies_what_is_rarely_used(self) -> None:
        load = ExpertLoad(np.array([[9000.0, 5000.0, 3000.0, 10.0]]), steps=100)
        wanted = create("expert", "metro").place(load, Placement(linear_placement(1, 4, 6), 2))
        assert wanted is None or replica_counts(wanted.physical_to_logical, 4)[0].tolist() == [1, 1, 2, 2]

    def test_the_oracle_balances_what_is_to_come(self) -> None:
        load = skewed(4)
        wanted = create("expert", "oracle").place(load, linear())
        assert wanted is not None
        assert load.future is not None
        now, later = (balancedness(rank_loads(tokens, wanted)).mean() for tokens in (load.tokens, load.future))
        assert later > 0.9 > now


class TestAffinity:
    def chain(self) -> ExpertLoad:
        """Expert ``e`` of a layer is followed by expert ``5 e mod 16`` of the next, always."""
        pairs = np.zeros((3, 16, 16))
        pairs[:, np.arange(16), np.arange(16) * 5 % 16] = 100.0
        return ExpertLoad(np.full((4, 16), 100.0), coactivation=pairs, steps=10)

    @pytest.mark.parametrize("name", ["exflow", "grace", "edr,lambda_a=1"])
    def test_chains_stay_on_one_rank(self, name: str) -> None:
        load = self.chain()
        wanted = create("expert", name).place(load, linear())
        assert wanted is not None
        assert load.coactivation is not None
        assert crossing_share(load.coactivation, linear()).mean() > 0.6
        assert crossing_share(load.coactivation, wanted).mean() < 0.1

    def test_moetuner_deals_whole_clusters(self) -> None:
        load = skewed(6)
        plain, tuned = (create("expert", name).place(load, linear()) for name in ("eplb", "moetuner"))
        assert plain is not None
        assert tuned is not None
        assert load.coactivation is not None
        for policy in (plain, tuned):
            assert balancedness(rank_loads(load.tokens, policy)).tolist() == pytest.approx(
                balancedness(rank_loads(load.tokens, plain)).tolist()
            )
        assert crossing_share(load.coactivation, tuned).mean() < crossing_share(load.coactivation, plain).mean()

    def test_edr_keeps_its_first_affinity(self) -> None:
        policy = create("expert", "edr,lambda_a=1")
        load = self.chain()
        wanted = policy.place(load, linear())
        assert wanted is not None
        assert load.coactivation is not None
        other = ExpertLoad(load.tokens, coactivation=load.coactivation[:, ::-1].copy(), steps=10)
        assert policy.place(other, wanted) is None

    def test_edr_reads_an_affinity_file(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", coactivation=self.chain().coactivation)
        policy = create("expert", f"edr,lambda_a=1,affinity={tmp_path / 'a.npz'}")
        assert policy.place(ExpertLoad(self.chain().tokens, steps=10), linear()) is not None
        with pytest.raises(InputError, match=r"missing\.npz.*coactivation"):
            create("expert", f"edr,affinity={tmp_path / 'missing.npz'}")

    def test_source_aware_moves_experts_to_their_tokens(self) -> None:
        load, current = skewed(7), linear()
        assert load.by_source is not None
        near = create("expert", "source_aware,beta=3").place(load, current)
        far = create("expert", "source_aware,beta=0").place(load, current)
        assert near is not None
        assert far is not None
        assert remote_share(load.by_source, near).mean() < remote_share(load.by_source, far).mean() - 0.1

    def test_source_aware_moves_less_when_moving_costs_more(self) -> None:
        load, current = skewed(8), linear()
        moved = []
        for gamma in (0.0, 0.5, 50.0):
            wanted = create("expert", f"source_aware,gamma={gamma}").place(load, current)
            moved.append(0 if wanted is None else int(moved_experts(current, wanted).sum()))
        assert moved[0] > moved[1] > moved[2] == 0


class TestTriggers:
    def test_prism_moves_only_when_it_pays(self) -> None:
        load = skewed(1)
        assert create("expert", "prism,migration_tokens=1").place(load, linear()) is not None
        assert create("expert", "prism,migration_tokens=1e9").place(load, linear()) is None

    def test_mindspeed_needs_a_fall_of_variation(self) -> None:
        load = skewed(1)
        assert create("expert", "mindspeed").place(load, linear()) is not None
        assert create("expert", "mindspeed,min_drop=2").place(load, linear()) is None

    def test_mindspeed_smooths(self) -> None:
        policy = create("expert", "mindspeed,ema=0.9,min_drop=0")
        first = policy.place(skewed(1), linear())
        assert first is not None
        # One window of another load hardly shifts the average.
        wanted = policy.place(skewed(2), first) or first
        balance = balancedness(rank_loads(skewed(1).tokens, wanted)).mean()
        assert balance > balancedness(rank_loads(skewed(2).tokens, wanted)).mean()

    def test_triggers_nest(self) -> None:
        policy: Any = create("expert", "prism,inner=edr")
        assert policy.needs_coactivation
        assert policy.place(skewed(1), linear()) is not None


class TestLoads:
    def test_moved_experts_counts_newcomers(self) -> None:
        current, wanted = Placement(np.array([[0, 1, 2, 3]]), 2), Placement(np.array([[1, 2, 3, 0]]), 2)
        assert moved_experts(current, wanted).tolist() == [[1, 1]]
        assert moved_experts(current, Placement(np.array([[1, 0, 3, 2]]), 2)).tolist() == [[0, 0]]

    @pytest.mark.parametrize(
        ("slots", "ranks", "message"),
        [
            (np.array([[0, 1, 2]]), 2, "3 slots on 2 ranks; allowed: slots a multiple of ranks"),
            (np.array([[0, 1, 2, 2]]), 2, "layer 0 has no slot for expert 3"),
            (np.array([[0, 1, 2, 4]]), 2, "layer 0, slot 3: got expert 4; allowed: 0 to 3"),
            (np.array([[0.0, 1.0]]), 1, "got float64 of shape"),
        ],
    )
    def test_check_placement(self, slots: npt.NDArray[Any], ranks: int, message: str) -> None:
        with pytest.raises(InputError, match=message):
            check_placement(Placement(slots, ranks), 4)
