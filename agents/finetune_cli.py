"""``servegym finetune``: a bundle learns from the decisions of live engines."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from servegym.agents.statistics import Interval


def finetune_command(
    bundle: Annotated[Path, typer.Argument(help="A bundle or run folder of a dispatch policy.")],
    logs: Annotated[list[Path], typer.Argument(help="Decision logs (log_observations and epsilon on).")],
    out: Annotated[Path, typer.Option(help="Folder; the new bundle is OUT/policy, if it is proven to be better.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value: divergence=0.1.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Learn from logged decisions, and judge the result on the end of the log before it may act."""
    from servegym.agents.offpolicy.finetune import FinetuneConfig, finetune
    from servegym.agents.progress import Bar
    from servegym.configuration import apply_overrides, validate

    config = validate(FinetuneConfig, apply_overrides({}, settings or []), "--set")
    with Bar("learning", quiet=as_json) as bar:
        result = finetune(bundle, logs, out, config, progress=bar.update)
    if as_json:
        print(json.dumps(asdict(result) | {"folder": str(result.folder)}, indent=1))
        return
    learned, judged = result.decisions
    print(f"learned from {learned:,} decisions, judged on {judged:,} later ones")
    for reason, count in result.dropped.items():
        print(f"left out: {count:,} {reason}")
    print(f"{result.changed:.1%} of these are others than before; the estimate rests on {result.effective:,.0f}")
    print(f"cost against the bundle before: {_percent(result.against_old)}")
    print(f"cost against the log:           {_percent(result.against_log)}")
    if result.proven:
        print(f"better, beyond doubt: {result.folder}")
    else:
        print(f"not proven to be better, not to be deployed: {result.folder}")


def _percent(interval: Interval) -> str:
    value, low, high = (100 * (end - 1) for end in (interval.value, interval.low, interval.high))
    return f"{value:+.1f} % [{low:+.1f}, {high:+.1f}]"
