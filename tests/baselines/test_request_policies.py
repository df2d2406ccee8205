"""The rule of every queue order, on queues small enough to order by hand."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines import registry
from servegym.errors import InputError


def order(spec: str, queue) -> list[int]:
    return np.argsort(registry.create("request", spec).score(queue), kind="stable").tolist()


def test_fcfs(make_queue) -> None:
    assert order("fcfs", make_queue(9.0, arrival_s=[3, 1, 2])) == [1, 2, 0]


def test_priority_then_arrival(make_queue) -> None:
    queue = make_queue(9.0, arrival_s=[1, 2, 3, 4, 5], priority=[1, 0, -3, 1, 0])
    assert order("priority", queue) == [2, 1, 4, 0, 3]


def test_priority_outweighs_any_arrival(make_queue) -> None:
    assert order("priority", make_queue(9e6, arrival_s=[0, 8.64e6], priority=[1000, 999])) == [1, 0]
    assert order("priority", make_queue(9.0, arrival_s=[1.00001, 1.0], priority=[1000, 1000])) == [1, 0]


def test_sjf_age_orders_by_prompt_and_promotes_the_old(make_queue) -> None:
    queue = make_queue(10.0, arrival_s=[4.9, 4.0, 5.0, 8.0, 9.0], prompt_tokens=[9000, 9999, 300, 100, 300])
    # The first two waited longer than 5 s, the third exactly 5 s; equal prompts go by arrival.
    assert order("sjf_age", queue) == [1, 0, 3, 2, 4]
    assert order("sjf_age,theta_age_s=100", queue) == [3, 2, 4, 0, 1]


def test_chunked_takes_the_order_of_another_rule(make_queue) -> None:
    queue = make_queue(10.0, arrival_s=[4, 5, 8], prompt_tokens=[900, 300, 100])
    assert order("chunked", queue) == [0, 1, 2]
    policy = registry.create("request", "chunked,inner=vtc,share=0.3")
    assert (policy.budget_share, policy.served_weights) == (0.3, registry.create("request", "vtc").served_weights)
    assert registry.create("request", "chunked").static
    assert not getattr(registry.create("request", "chunked,inner=sjf_age"), "static", False)
    assert registry.create("request", "chunked,inner=sjf_oracle").needs_oracle
    for wrong in ("chunked,share=0", "chunked,share=1.1", "chunked,inner=fcsf"):
        with pytest.raises(InputError):
            registry.create("request", wrong)


def test_spf_aging_trades_tokens_for_waiting(make_queue) -> None:
    queue = make_queue(10.0, arrival_s=[0, 9], prompt_tokens=[1000, 200])  # 9 s of waiting against 800 tokens
    assert order("spf_aging", queue) == [0, 1]
    assert order("spf_aging,gamma=80", queue) == [1, 0]
    assert order("spf_aging,gamma=0", queue) == [1, 0]


def test_spf_aging_counts_what_remains(make_queue) -> None:
    queue = make_queue(1.0, arrival_s=[0, 0], prompt_tokens=[1000, 900], computed_tokens=[512, 0])
    assert registry.create("request", "spf_aging").score(queue).tolist() == [488, 900]


def test_spf_aging_is_the_published_order(make_queue, draw_queue) -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        queue = draw_queue(rng)
        published = queue.prompt_tokens - queue.computed_tokens - 7.0 * queue.wait_s
        shifted = registry.create("request", "spf_aging,gamma=7").score(queue)
        np.testing.assert_allclose(shifted - published, 7.0 * queue.now_s)


def test_output_length_orders(make_queue) -> None:
    queue = make_queue(
        1.0,
        arrival_s=[0, 0, 0],
        prompt_tokens=[100, 5000, 10],
        output_tokens=[50, 10, 90],
        predicted_tokens=[300, 200, np.nan],
    )
    assert order("sjf_oracle", queue) == [1, 0, 2]
    assert order("srpt_oracle", queue) == [0, 2, 1]  # 100 + 20 * 50, 10 + 20 * 90, 5000 + 20 * 10
    assert order("srpt_oracle,decode_weight=1000", queue) == [1, 0, 2]
    assert order("sjf_predicted", queue) == [1, 2, 0]  # 256 tokens where nothing is predicted
    assert order("sjf_predicted,unknown_tokens=1000", queue) == [1, 0, 2]


@pytest.mark.parametrize("spec", registry.names("request"))
def test_declared_static_means_that_time_changes_nothing(make_queue, draw_queue, spec) -> None:
    policy = registry.create("request", spec)
    rng = np.random.default_rng(4)
    changed = False
    for _ in range(50):
        queue = draw_queue(rng)
        later = make_queue(
            queue.now_s + 3.0,
            **{
                name: getattr(queue, name)
                for name in (
                    "arrival_s",
                    "prompt_tokens",
                    "computed_tokens",
                    "priority",
                    "deadline_s",
                    "index",
                    "output_tokens",
                    "predicted_tokens",
                )
            },
        )
        changed |= not np.array_equal(policy.score(queue), policy.score(later))
    assert changed != policy.static


def test_attributes_that_the_simulator_reads() -> None:
    attributes = {
        name: (policy.native, policy.needs_oracle)
        for name in registry.names("request")
        for policy in [registry.policy_class("request", name)]
    }
    assert {name for name, (_, oracle) in attributes.items() if oracle} == {
        "sjf_noisy",
        "sjf_oracle",
        "srpt_oracle",
    }
    assert {name: native for name, (native, _) in attributes.items() if native} == {
        "fcfs": "fcfs",
        "priority": "priority",
    }


@pytest.mark.parametrize("spec", registry.names("request"))
def test_an_empty_queue(make_queue, spec) -> None:
    assert registry.create("request", spec).score(make_queue(1.0, arrival_s=[])).shape == (0,)


def test_hrrn_lets_waiting_outweigh_size(make_queue) -> None:
    # Service of 40,000 tokens/s: 20 and 200 tokens of output cost 0.0125 s and 0.1025 s.
    columns = {"prompt_tokens": [100, 100], "predicted_tokens": [20, 200]}
    assert order("hrrn", make_queue(1.0, arrival_s=[0.9, 0.9], **columns)) == [0, 1]
    assert order("hrrn", make_queue(1.0, arrival_s=[0.9, 0.1], **columns)) == [1, 0]


def test_ewsjf_is_the_published_score(make_queue) -> None:
    queue = make_queue(10.0, arrival_s=[0.0, 2.0, 9.0], prompt_tokens=[2000, 600, 10])
    expected = [-10 * (1 + 0.5 * np.log(2001)) * 512 / 4, -8 * (1 + 0.5 * np.log(601)) * 512 / 2]
    expected.append(-1 * (1 + 0.5 * np.log(11)) * 512)
    np.testing.assert_allclose(registry.create("request", "ewsjf").score(queue), expected)


def test_mlfq_joins_the_level_that_covers_the_prefill_and_raises_the_starving(make_queue) -> None:
    # 40,000 tokens/s: 400 tokens take the first quantum of 10 ms, 500 the second one's 20 ms.
    columns = {"arrival_s": [7.5, 7.0, 7.2], "prompt_tokens": [400, 500, 400], "preemptions": [0, 0, 2]}
    assert order("mlfq", make_queue(8.0, **columns)) == [0, 1, 2]
    assert order("mlfq", make_queue(10.1, **columns)) == [1, 0, 2]  # only the second waited over 3 s


def test_deadline_orders(make_queue) -> None:
    # Due at 0 + 1 + 0.125, at 0.5 + 0.3 and at 1 + 1 s.
    columns = {"arrival_s": [0, 0.5, 1], "prompt_tokens": [2000, 100, 40_000], "deadline_s": [np.inf, 0.3, 1]}
    assert order("edf", make_queue(1.0, **columns)) == [1, 0, 2]
    # Less 0.05, 0.0025 and 1 s of prefill.
    np.testing.assert_allclose(
        registry.create("request", "llf").score(make_queue(1.0, **columns)), [1.075, 0.7975, 1.0]
    )


def test_vtc_serves_the_least_served_user(make_queue) -> None:
    queue = make_queue(1.0, arrival_s=[0, 0, 0], user_served=[30.0, np.nan, 7.0])
    assert order("vtc", queue) == [1, 2, 0]
    assert registry.create("request", "vtc,prompt_weight=3,output_weight=4").served_weights == (3.0, 4.0)


def test_svf_weighs_length_by_residence(make_queue) -> None:
    queue = make_queue(1.0, arrival_s=[0, 0], prompt_tokens=[1000, 10], predicted_tokens=[10, 200])
    assert registry.create("request", "svf").score(queue).tolist() == [10_055.0, 22_100.0]


def test_noisy_lengths_are_lognormal_and_the_same_at_each_look(make_queue) -> None:
    queue = make_queue(1.0, arrival_s=np.zeros(20_000), output_tokens=np.full(20_000, 8.0), index=np.arange(20_000))
    policy = registry.create("request", "sjf_noisy,sigma=0.7")
    errors = np.log(policy.score(queue) / 8.0)
    assert abs(errors.mean()) < 0.02
    assert errors.std() == pytest.approx(0.7, rel=0.02)
    np.testing.assert_array_equal(policy.score(queue), policy.score(queue))
    assert not np.array_equal(policy.score(queue), registry.create("request", "sjf_noisy,seed=1").score(queue))
