"""What a run achieved: the metrics of serving, from the outcome of each request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from servegym.envs.backend import ServingRun
from servegym.envs.simulator.cluster import SimulatedCluster

Float = npt.NDArray[np.float64]


def summary(values: Float) -> dict[str, float | None]:
    """Return mean, p50, p90, p95 and p99 of the finite values; None without any.

    >>> summary(np.array([1.0, 3.0, np.nan]))["mean"]
    2.0
    """
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return dict.fromkeys(("mean", "p50", "p90", "p95", "p99"))
    p50, p90, p95, p99 = np.quantile(finite, (0.5, 0.9, 0.95, 0.99)).tolist()
    return {"mean": float(finite.mean()), "p50": p50, "p90": p90, "p95": p95, "p99": p99}


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """Outcome of each request of a run, in order of the workload; NaN where a request never got that far.

    Attributes:
        arrival_s: arrival at the router, shape (requests,), as all below.
        ttft_s: first token - arrival.
        tpot_s: (last token - first token) / (output tokens - 1); NaN for outputs of one token.
        e2e_s: last token - arrival.
        finish_s: time of the last token.
        prompt_tokens, output_tokens: lengths.
        deadline_s: TTFT objective of the request itself, inf without one.
        engine: engine that finished it.
        preemptions: times it was preempted.
        hit_tokens: prompt tokens found in the prefix cache at first admission.
    """

    arrival_s: Float
    ttft_s: Float
    tpot_s: Float
    e2e_s: Float
    finish_s: Float
    prompt_tokens: npt.NDArray[np.int32]
    output_tokens: npt.NDArray[np.int32]
    deadline_s: Float
    engine: npt.NDArray[np.int32]
    preemptions: npt.NDArray[np.int32]
    hit_tokens: npt.NDArray[np.int32]

    @classmethod
    def of(cls, cluster: ServingRun) -> RunOutcome:
        """Read the outcome of a run, as a client of its frontend sees it."""
        requests = cluster.memory.requests
        arrival, first, finish = requests["arrival_s"], requests["first_s"], requests["finish_s"]
        if cluster.frontend is not None:
            arrival = arrival - cluster.frontend.before_s(requests["prompt"])
            first, finish = first + cluster.frontend.after_s, finish + cluster.frontend.after_s
        gaps = np.where(requests["output"] > 1, requests["output"] - 1, np.nan)
        return cls(
            arrival_s=arrival.copy(),
            ttft_s=first - arrival,
            tpot_s=(finish - first) / gaps,
            e2e_s=finish - arrival,
            finish_s=finish.copy(),
            prompt_tokens=requests["prompt"].copy(),
            output_tokens=requests["output"].copy(),
            deadline_s=requests["deadline_s"].copy(),
            engine=requests["engine"].copy(),
            preemptions=requests["preemptions"].copy(),
            hit_tokens=requests["hit_tokens"].copy(),
        )

    def counted(self, warmup_share: float) -> npt.NDArray[np.bool_]:
        """Return which requests come after the first ``warmup_share`` of arrivals, shape (requests,)."""
        order = np.argsort(self.arrival_s, kind="stable")
        counted = np.zeros(len(order), dtype=bool)
        counted[order[int(warmup_share * len(order)) :]] = True
        return counted

    def metrics(
        self, *, warmup_share: float = 0.0, ttft_slo_s: float = np.inf, tpot_slo_s: float = np.inf
    ) -> dict[str, Any]:
        """Summarise the requests after the first ``warmup_share`` of arrivals.

        Rates count finished requests between the first counted arrival and the last arrival: the drain after the last
        arrival, which has no steady load, lengthens latencies but no rate. Goodput counts those within both objectives;
        a request's own deadline replaces ``ttft_slo_s``.
        """
        counted = self.counted(warmup_share)
        start, last = self.arrival_s[counted].min(), self.arrival_s[counted].max()
        done = np.isfinite(self.finish_s)
        span = max(last - start, 1e-9) if counted.sum() > 1 else float(np.nanmax(self.finish_s) - start)
        in_span = done & (self.finish_s >= start) & (self.finish_s <= start + span)
        objective = np.where(np.isfinite(self.deadline_s), self.deadline_s, ttft_slo_s)
        good = in_span & (self.ttft_s <= objective) & ~(self.tpot_s > tpot_slo_s)
        return {
            "requests": int(counted.sum()),
            "unfinished": int((~done).sum()),
            "ttft_s": summary(self.ttft_s[counted]),
            "tpot_s": summary(self.tpot_s[counted]),
            "e2e_s": summary(self.e2e_s[counted]),
            "throughput_rps": float(in_span.sum() / span),
            "output_tokens_per_s": float(self.output_tokens[in_span].sum() / span),
            "goodput_rps": float(good.sum() / span),
            "preemptions": int(self.preemptions[counted].sum()),
        }


def engine_metrics(cluster: SimulatedCluster) -> dict[str, Any]:
    """Return what the engines report of a whole run: steps, prefix hits, share of requests and of busy time."""
    engines = cluster.memory.engines
    finish = cluster.memory.requests["finish_s"]
    span = float(np.nanmax(finish)) if np.isfinite(finish).any() else cluster.now_s
    queries = int(engines["cache_queries"].sum())
    return {
        "simulated_s": span,
        "engine_steps": int(engines["steps"].sum()),
        "prefix_hit_ratio": float(engines["cache_hits"].sum() / queries) if queries else 0.0,
        "per_engine": [
            {
                "requests": int(record["finished"]),
                "busy_share": float(record["busy_s"] / span) if span > 0 else 0.0,
                "steps": int(record["steps"]),
                "preemptions": int(record["preemptions"]),
                "peak_kv_usage": float(record["peak_blocks"] / (record["num_blocks"] - 1)),
            }
            for record in engines
        ],
    } | _expert_metrics(cluster)


def _expert_metrics(cluster: SimulatedCluster) -> dict[str, Any]:
    """Imbalance of the experts and, with an expert model, what placement made of it."""
    if cluster.experts is None:
        return {"expert_imbalance": max(spec.profile.step_time.moe_imbalance for spec in cluster.specs)}
    groups = [group.statistics() for group in cluster.experts.groups]
    steps = np.array([group["steps"] for group in groups], dtype=np.float64)
    weights = steps / steps.sum() if steps.sum() else np.full(len(steps), 1.0 / len(steps))
    mean = {name: float(np.dot(weights, [group[name] for group in groups])) for name in groups[0]}
    return {
        "expert_imbalance": mean["imbalance"],
        "expert_balancedness": mean["balancedness"],
        "expert_step_s": mean["experts_s"],
        "exchange_step_s": mean["exchange_s"],
        "replacements": sum(replacer.count for replacer in cluster.replacers),
        "transfer_s": sum(replacer.transfer_s for replacer in cluster.replacers),
    }
