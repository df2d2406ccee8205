"""Tables for people."""

from __future__ import annotations

from rich import box
from rich.table import Table

from servegym.envs.simulation import SimulationResult


def report_table(title: str, caption: str) -> Table:
    """Return an empty table in the style of reports, with its first column, that of the policies."""
    table = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    table.add_column("policy", no_wrap=True)
    return table


def simulation_table(result: SimulationResult) -> Table:
    """Return latencies by quantile, and in the caption rates, steps and the load of the engines."""
    metrics = result.metrics()
    table = Table(
        "seconds",
        title=f"{metrics['requests']:,} requests, {_names(result)}",
        title_justify="left",
        caption_justify="left",
    )
    names = ("mean", "p50", "p90", "p95", "p99")
    for name in names:
        table.add_column(name, justify="right")
    for label, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("E2E", "e2e_s")):
        values = (metrics[key][name] for name in names)
        table.add_row(label, *("-" if value is None else f"{value:.4f}" for value in values))
    busy = ", ".join(f"{engine['requests']:,} ({engine['busy_share']:.0%})" for engine in metrics["per_engine"])
    experts = ""
    if "expert_balancedness" in metrics:
        experts = (
            f"experts: balancedness {metrics['expert_balancedness']:.3f}, {metrics['replacements']} re-placements in"
            f" {metrics['transfer_s']:.1f} s; of a step {metrics['expert_step_s'] * 1e3:.2f} ms experts and"
            f" {metrics['exchange_step_s'] * 1e3:.2f} ms dispatch and combine\n"
        )
    table.caption = (
        f"{metrics['throughput_rps']:.2f} requests/s, {metrics['output_tokens_per_s']:,.0f} output tokens/s,"
        f" goodput {metrics['goodput_rps']:.2f}/s\n"
        f"{metrics['preemptions']} preemptions, prefix hits {metrics['prefix_hit_ratio']:.1%}\n"
        f"{experts}"
        f"requests by engine (busy): {busy}\n"
        f"{metrics['simulated_s']:,.1f} s in {metrics['wall_s']:.3f} s, {metrics['engine_steps']:,} steps"
    )
    return table


def _names(result: SimulationResult) -> str:
    policies = result.config.policies
    names = [str(policies.request), str(policies.engine)]
    if result.config.cluster.experts is not None:
        names.append(str(policies.expert))
    return " / ".join(names)
