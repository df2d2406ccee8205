"""``servegym calibrate``: a profile of a live engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from servegym.agents.progress import Bar

if TYPE_CHECKING:
    from servegym.engine_bridge.cluster.launcher import LiveEngine
    from servegym.envs.calibration.calibrate import Calibration


def calibrate_command(
    out: Annotated[Path, typer.Option(help="Profile to write, .yaml; measurements and the report stand beside it.")],
    url: Annotated[str | None, typer.Option("--engine", help="The engine's server.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="The first engine of a cluster that runs, by its name or folder.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Visits of each point.")] = 5,
    max_seconds: Annotated[float, typer.Option(min=5, help="No visit begins later.")] = 280.0,
    vocabulary: Annotated[int, typer.Option(min=2, help="Token ids of the prompts are below this number.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of points.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw measured against fitted steps, an image.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="LIMIT=VALUE", help="A limit that the engine does not tell: max_num_seqs=16."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure a live engine that serves nobody else, and write its profile. A run that ended early goes on."""
    from servegym.agents.plots import check_image
    from servegym.envs.calibration.calibrate import Options, calibrate
    from servegym.errors import InputError

    if out.suffix not in (".yaml", ".yml") or not out.resolve().parent.is_dir():
        raise InputError("--out", str(out), "allowed: a .yaml file in a folder that exists")
    if plot is not None:
        check_image(plot)
    limits = dict(_limit(text) for text in settings or [])
    engine = _engine(url, cluster)
    options = Options(out, limits, rounds, max_seconds, vocabulary, seed)
    with Bar("calibrating", quiet=as_json) as bar:
        result = calibrate(engine, options, bar.update)
    report = result.report() | {"out": str(out)}
    out.with_suffix(".report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    if plot is not None:
        from servegym.agents.plots import plot_calibration

        plot_calibration(plot, result)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _show(result, out)


def _limit(text: str) -> tuple[str, Any]:
    from servegym.errors import InputError

    name, equals, value = text.partition("=")
    if not equals:
        raise InputError("--set", text, "allowed: LIMIT=VALUE")
    return name.removeprefix("engine."), yaml.safe_load(value)


def _engine(url: str | None, cluster: str | None) -> LiveEngine:
    from servegym.engine_bridge.cluster.launcher import LiveEngine, find_cluster
    from servegym.errors import InputError

    if (url is None) == (cluster is None):
        raise InputError("servegym calibrate", "", "allowed: --engine with a URL, or --cluster with a name")
    if url is not None:
        return LiveEngine(url.rstrip("/"))
    assert cluster is not None
    folder = Path(cluster) if Path(cluster).is_dir() else Path("runs") / "clusters" / cluster
    found = find_cluster(folder)
    if found is None or not found.engines[0].running:
        raise InputError("--cluster", cluster, f"no such cluster runs; start one: servegym cluster up {cluster}")
    return found.engines[0]


def _show(result: Calibration, out: Path) -> None:
    from servegym.envs.calibration.calibrate import drift_of

    console = Console() if sys.stdout.isatty() else Console(width=110)
    how = "exact step records" if result.exact else "client times"
    table = Table("term", "us", "95 % interval", title=f"{out}: {len(result.samples)} samples, {how}")
    for term in result.fit.terms:
        table.add_row(term.name, f"{term.value:.4g}", f"{term.low:.4g} to {term.high:.4g}")
    lines = [f"{name}: {quality}" for name, quality in result.fit.quality.items()]
    lines += [f"{name}: {1e3 * value:.3f} ms" for name, value in result.overheads.items() if value is not None]
    if result.profile.frontend is not None:
        lines += [f"frontend {name}: {value:.4g}" for name, value in result.profile.frontend]
    lines += [f"noise {result.fit.noise:.1%}, stragglers {result.fit.stragglers:.1%}", drift_of(result.fit)]
    lines += ["not identified:"]
    table.caption = "\n".join([*lines, *(f"  {text}" for text in result.fit.unidentified)])
    table.caption_justify = table.title_justify = "left"
    console.print(table)
