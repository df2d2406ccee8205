"""Make the report of an evaluation and write it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from servegym.agents.evaluation.report import Evaluation
from servegym.agents.report.detail import record
from servegym.agents.report.selection import Wish, select
from servegym.agents.runs import atomic_write
from servegym.errors import InputError

_NEEDED = ("plotly", "jinja2")


def check_page(path: Path) -> None:
    """Make sure that a page can be written before anything else is done.

    Raises:
        InputError: another kind of file, no such folder, or a package is absent.
    """
    if path.suffix not in (".html", ".htm"):
        raise InputError("--html", str(path), "allowed: a file that ends in .html")
    if not path.resolve().parent.is_dir():
        raise InputError("--html", str(path), "the folder does not exist")
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise InputError("--html", str(path), f"{name} is not installed; allowed: pip install 'servegym[plot]'")


def write_report(
    path: Path,
    result: Evaluation,
    origin: Mapping[str, Any],
    *,
    wish: Wish | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Write the report of an evaluation as one HTML file, which asks no network for anything.

    One cell is run again, with everything recorded; live engines are not.

    Args:
        path: the file.
        result: the evaluation.
        origin: what it was made with, as :func:`servegym.agents.evaluation.folder.origin` says.
        wish: which cell and which policies to look into; default: chosen by the results.
        progress: called with the share of runs that have finished.

    Raises:
        InputError: as :func:`check_page`, or a wish that the evaluation does not hold.
    """
    check_page(path)
    # Only here: it needs the extra "plot".
    from servegym.agents.report.page import render

    selection = select(result, wish)
    live = result.config.live is not None
    detail = None if live else record(result, selection, progress)
    why = "requests on live engines are not recorded one by one" if live else ""
    text = render(result, detail, origin, without_detail=why)
    atomic_write(path, lambda file: file.write(text.encode()))
