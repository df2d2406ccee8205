"""``servegym validate``: the simulator against live engines, on the same requests under the same policies."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from servegym.agents.validation import Compared, Validation


def validate_command(
    config: Annotated[str, typer.Argument(help="A validate config by name (local), or a path.")],
    profile: Annotated[
        str | None, typer.Option(help="What `servegym calibrate` has written of the engines. Overrides the config's.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="A cluster that runs, by its name or folder. Overrides the config's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Keep finished cells here; a rerun goes on from them.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw queue lengths over time, live and simulated, and errors; an image.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config value: repetitions=1.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Replay workloads on live engines and in the simulator, and report how far apart the two are."""
    import servegym.engine_bridge.bundle  # noqa: F401 - makes bundles available by path
    from servegym.agents.plots import check_image, plot_validation
    from servegym.agents.validation import validate
    from servegym.configuration import load_config
    from servegym.envs.validation.config import ValidationConfig
    from servegym.errors import InputError

    overrides = [*(settings or [])]
    overrides += [f"profile={json.dumps(profile)}"] if profile is not None else []
    overrides += [f"live.cluster={json.dumps(cluster)}"] if cluster is not None else []
    loaded = load_config(ValidationConfig, config, "validate", overrides)
    if loaded.profile is None:
        raise InputError("--profile", "", "missing; allowed: a file that `servegym calibrate` has written")
    if plot is not None:
        check_image(plot)
    try:
        result = validate(loaded, loaded.profile, out, progress=not as_json)
    except KeyboardInterrupt:
        hint = "the results are lost" if out is None else f"the same command goes on with what {out} holds"
        print(f"interrupted; {hint}", file=sys.stderr)
        raise
    content = result.as_json()
    if out is not None:
        (out / "validation.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    if plot is not None:
        plot_validation(plot, result)
    if as_json:
        print(json.dumps(content, indent=2))
        return
    console = Console() if sys.stdout.isatty() else Console(width=140)
    for table in _tables(result):
        console.print(table)


_SHOWN = (
    ("ttft_s", "mean"),
    ("ttft_s", "p50"),
    ("ttft_s", "p95"),
    ("ttft_s", "p99"),
    ("tpot_s", "mean"),
    ("tpot_s", "p50"),
    ("tpot_s", "p95"),
    ("e2e_s", "mean"),
    ("e2e_s", "p95"),
)


def _tables(result: Validation) -> list[Table]:
    first = next(iter(result.config.policies))
    shown = [one for one in result.compared if one.policy == first and not _ranked(one, result)]
    sides = [side for side in _TITLES if shown and all(side in one.sides for one in shown)]
    tables = [_errors(result, shown, side) for side in sides]
    for ranking in result.rankings:
        agreement = ranking.agreement()
        title = f"{ranking.scenario}, load {ranking.load:g}: mean TTFT, ms"
        heads = ("policy", "live", "simulated", "error", *(() if ranking.at_speed is None else ("at speed",)))
        table = Table(*heads, title=title, title_justify="left")
        for i in sorted(range(len(ranking.policies)), key=ranking.live.__getitem__):
            live, simulated = ranking.live[i], ranking.simulated[i]
            known = () if ranking.at_speed is None else (f"{1e3 * ranking.at_speed[i]:.1f}",)
            name = ranking.policies[i]
            table.add_row(name, f"{1e3 * live:.1f}", f"{1e3 * simulated:.1f}", f"{simulated / live - 1:+.1%}", *known)
        others = {"repeat": "live with live", "at_speed": "at the speed of each live run"}
        table.caption = (
            f"rank agreement: Spearman {agreement['spearman']:.3f}, Kendall {agreement['kendall']:.3f}"
            f" (bound {result.config.bounds.rank:g})"
        ) + "".join(
            f"; {text} {agreement[f'spearman_{other}']:.3f}, {agreement[f'kendall_{other}']:.3f}"
            for other, text in others.items()
            if agreement[f"spearman_{other}"] is not None
        )
        table.caption_justify = "left"
        tables.append(table)
    return tables


_TITLES = {
    "simulated": "simulated over live, % (in brackets: live over live)",
    "at_speed": "the same, simulated at the speed that the machine had in each live run",
}


def _ranked(one: Compared, result: Validation) -> bool:
    return any((one.scenario, one.load) == (ranking.scenario, ranking.load) for ranking in result.rankings)


def _errors(result: Validation, shown: list[Compared], side: str) -> Table:
    from servegym.agents.validation import summarise

    heads = [f"{metric.removesuffix('_s').upper()} {statistic}" for metric, statistic in _SHOWN]
    title = f"{result.config.name}: {_TITLES[side]}"
    table = Table("workload", "load", *heads, "queue", "machine", title=title, title_justify="left")
    for one in shown:
        cells = [_cell(one, metric, statistic, side) for metric, statistic in _SHOWN]
        machine = "-" if one.machine is None else f"{100 * (one.machine - 1):+.1f}"
        table.add_row(one.scenario, f"{one.load:g}", *cells, f"{100 * one.queue_error(side):.0f}", machine)
    sizes = [summarise(one.error(metric, statistic, side) for one in shown) for metric, statistic in _SHOWN]
    table.add_section()
    table.add_row("median", "", *(f"{100 * median:.1f}" for median, _ in sizes), "", "")
    table.add_row("largest", "", *(f"{100 * largest:.1f}" for _, largest in sizes), "", "")
    if side == "simulated" and all(one.drift("ttft_s", "mean") for one in shown):
        inside = [sum(bool(one.within_drift(metric, statistic)) for one in shown) for metric, statistic in _SHOWN]
        table.add_row("within drift", "", *map(str, inside), "", "")
    missed = [(one, one.misses(result.config.bounds, side)) for one in shown]
    count = sum(bool(found) for _, found in missed)
    table.caption = "\n".join(
        [
            "machine: how much longer the engines' steps took than the profile says of the same steps",
            "within drift: cells that lie between a machine as fast and one as slow as in 95 % of calibration's rounds",
            f"beyond the bounds, {count} of {len(shown)}:" if count else "all within the bounds",
            *(f"  {one.scenario}, load {one.load:g}: {', '.join(found)}" for one, found in missed if found),
        ]
    )
    table.caption_justify = "left"
    return table


def _cell(one: Compared, metric: str, statistic: str, side: str) -> str:
    repeat = one.repeat_error(metric, statistic) if side == "simulated" else None
    return f"{100 * one.error(metric, statistic, side):+.1f}" + ("" if repeat is None else f" ({100 * repeat:.1f})")
