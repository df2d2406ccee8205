"""``servegym tune``: parameters of heuristics and of training, the same budget for each."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from servegym.agents.backend_options import Address, Backend, Workers, backend_overrides

if TYPE_CHECKING:
    from rich.table import Table

    from servegym.agents.tuning.config import TuneConfig
    from servegym.agents.tuning.tune import Tuned


def tune_command(
    config: Annotated[str, typer.Argument(help="A tune config: a YAML file, or the name of a shipped one.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the trials; a rerun goes on. Default: runs/tune/NAME.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Overrides the config's trials.")] = None,
    workers: Workers = None,
    backend: Backend = None,
    address: Address = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the importance of the parameters, an image.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config value: a.b=3.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Search the parameters of heuristics and of training; OUT/best.yaml is for `servegym evaluate --policies`."""
    from rich.console import Console

    from servegym.agents.plots import check_image, plot_importance
    from servegym.agents.progress import Bar
    from servegym.agents.tuning.config import TuneConfig
    from servegym.agents.tuning.tune import tune
    from servegym.configuration import load_config

    overrides = [*(settings or []), *([f"trials={trials}"] if trials is not None else [])]
    overrides += backend_overrides(backend, address, workers)
    loaded = load_config(TuneConfig, config, "tune", overrides)
    if plot is not None:
        check_image(plot)
    folder = out or Path("runs") / "tune" / loaded.name
    try:
        with Bar("tuning", loaded.trials * len(loaded.contestants), unit="trials", quiet=as_json) as bar:
            found = tune(loaded, folder, progress=bar.update)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on with what {folder} holds", file=sys.stderr)
        raise
    if plot is not None:
        plot_importance(plot, {tuned.label: tuned.importance for tuned in found})
    if as_json:
        print(json.dumps({"folder": str(folder), "contestants": [_plain(tuned) for tuned in found]}, indent=1))
        return
    (Console() if sys.stdout.isatty() else Console(width=110)).print(_table(loaded, found))
    print(f"tuned policies: {folder / 'best.yaml'}")


def _plain(tuned: Tuned) -> dict[str, object]:
    return {
        "label": tuned.label,
        "trials": tuned.trials,
        "first": math.expm1(tuned.first),
        "best": math.expm1(tuned.best),
        "values": tuned.values,
        "policies": tuned.policies.model_dump(mode="json"),
        "importance": tuned.importance,
    }


def _table(config: TuneConfig, found: list[Tuned]) -> Table:
    from rich import box
    from rich.table import Table

    judged = config.judged()
    weights = " + ".join(f"{weight:g} {metric}" for metric, weight in config.objective.items())
    table = Table(
        title=f"{config.name}: {config.trials} trials each, {len(judged.cells)} cells",
        caption=f"{weights}, difference to {judged.baseline} in %, geometric mean over cells; in brackets the share"
        " of a parameter in what the best tenth of the trials have in common.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("contestant", "as it is", "tuned"):
        table.add_column(heading, justify="left" if heading == "contestant" else "right")
    table.add_column("values")
    for tuned in found:
        values = (
            f"{key}={value:.4g}" + (f" ({tuned.importance[key]:.0%})" if key in tuned.importance else "")
            if isinstance(value, float)
            else f"{key}={value}"
            for key, value in tuned.values.items()
        )
        costs = (f"{100 * math.expm1(cost):+.1f}" for cost in (tuned.first, tuned.best))
        table.add_row(tuned.label, *costs, "\n".join(values) or "as they are")
    return table
