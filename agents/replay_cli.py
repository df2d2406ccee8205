"""``servegym replay``: a workload or a trace against live engines."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from servegym.agents.progress import Bar


def replay_command(
    config: Annotated[str, typer.Argument(help="A replay config by name (local), or a path.")],
    url: Annotated[list[str] | None, typer.Option(help="A server; several take turns. Overrides the config.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="The engines of a cluster that runs, by its name or folder.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(metavar="NAME[,KEY=VALUE]", help="Engine policy that chooses the server; default: in turn."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Overrides the config's seed.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config value: a.b=3.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Send a workload or a trace to live engines, each request at its time, and print the metrics."""
    from servegym.baselines.policy_spec import PolicySpec
    from servegym.configuration import load_config
    from servegym.envs.live.dispatch import by_policy
    from servegym.envs.live.replay import ReplayConfig, replay

    overrides = list(settings or []) + ([f"seed={seed}"] if seed is not None else [])
    loaded = load_config(ReplayConfig, config, "replay", overrides)
    given = {"urls": tuple(url)} if url else {}
    target = loaded.model_copy(update=given | ({"cluster": cluster} if cluster or url else {})).target()
    with Bar("replaying", quiet=as_json) as bar:
        table = loaded.table(loaded.workload, loaded.seed)
        dispatcher = None
        if policy is not None:
            spec = PolicySpec.parse(policy.removeprefix("engine="))
            dispatcher = by_policy(spec, table, loaded, len(target.urls), loaded.seed)
        result = replay(table, target.urls, target.model, loaded, dispatcher=dispatcher, progress=bar.update)
    for r, error in list(result.errors.items())[:5]:
        print(f"request {r} failed: {error}", file=sys.stderr)
    metrics = result.metrics(loaded.slo, loaded.warmup_share)
    if dispatcher is not None:
        metrics |= {"policy": policy, "fallbacks": dict(dispatcher.router.fallbacks)}
    if as_json:
        print(json.dumps(metrics, indent=2))
    else:
        (Console() if sys.stdout.isatty() else Console(width=110)).print(_table(metrics))


def _table(metrics: dict[str, Any]) -> Table:
    names = ("mean", "p50", "p90", "p95", "p99")
    title = f"{metrics['requests']:,} requests in {metrics['wall_s']:.1f} s, {metrics['failed']} failed"
    table = Table("seconds", *names, title=title, title_justify="left", caption_justify="left")
    for label, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("E2E", "e2e_s"), ("slip", "slip_s")):
        table.add_row(label, *("-" if metrics[key][n] is None else f"{metrics[key][n]:.4f}" for n in names))
    table.caption = (
        f"{metrics['throughput_rps']:.2f} requests/s, {metrics['output_tokens_per_s']:,.0f} output tokens/s,"
        f" goodput {metrics['goodput_rps']:.2f}/s\n"
        f"requests by engine: {', '.join(str(engine['requests']) for engine in metrics['per_engine'])}"
        + (f"\nby {metrics['policy']}, {sum(metrics['fallbacks'].values())} fallbacks" if "policy" in metrics else "")
    )
    return table
