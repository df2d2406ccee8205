"""The page: everything that a report shows, put into one HTML file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

import servegym
from servegym.agents.evaluation.report import Evaluation
from servegym.agents.report.detail import Detail, DetailRun
from servegym.agents.report.entries import board_grid, condition_grids, finding, level_text, part_grids
from servegym.agents.report.explain import Decision
from servegym.agents.report.figures.differences import difference_figures, ladder_figures
from servegym.agents.report.figures.experts import balance_figure, popularity_figures, rank_figures
from servegym.agents.report.figures.runs import distribution_figures, timeline_figures
from servegym.agents.report.figures.style import PALETTE, Versions, looks, rounded
from servegym.agents.runs import finite

_ASSETS = Path(__file__).parent / "assets"
# Of the mean TTFT of a recorded run, relative to the evaluation's own run on the same requests.
_REPRODUCED = 1e-9


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of which there may be several versions to choose from.

    Attributes:
        key: identity on the page.
        title: what it shows, also for those who do not see it.
        choose: in what its versions differ, a name per dimension.
        versions: figures; keys have an entry per dimension.
    """

    key: str
    title: str
    choose: tuple[str, ...]
    versions: Versions

    def choices(self) -> list[tuple[str, list[str]]]:
        """Return the dimensions, with what there is to choose from."""
        return [(name, list(dict.fromkeys(key[i] for key in self.versions))) for i, name in enumerate(self.choose)]

    def data(self) -> Markup:
        """Return all versions as JSON that may stand in HTML: pairs of choices and figure."""
        return _json(list(self.versions.items()))


def render(result: Evaluation, detail: Detail | None, origin: Mapping[str, Any], *, without_detail: str = "") -> str:
    """Return the page.

    Args:
        result: the evaluation.
        detail: recorded runs of one of its cells.
        origin: command, versions, machine and commit that the results come from.
        without_detail: why there are no recorded runs.
    """
    content = result.as_json()
    config, board = result.config, content["leaderboard"]
    labels = detail.selection.policies if detail is not None else tuple(row["policy"] for row in board)[:6]
    shown = looks(labels, config.baseline)
    shown = {label: shown[label] for label in labels}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.j2").render(
        config=config,
        version=servegym.__version__,
        digest=content["config_sha256"],
        finding=finding(board, config.baseline),
        board=board_grid(board),
        parts=part_grids(board),
        conditions=condition_grids(result, content["statistics"], board),
        differences=Picture(
            "differences", "Paired differences", ("metric", "against"), difference_figures(board, config.baseline)
        ),
        ladder=Picture(
            "ladder",
            "Metrics over the load",
            ("condition", "metric", "view"),
            ladder_figures(result, content["statistics"], shown),
        ),
        published=content["published"],
        detail=None if detail is None else _detail(result, detail, shown),
        without_detail=without_detail,
        decisions=None if detail is None or detail.explained is None else _decisions(detail),
        origin=origin,
        config_yaml=yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=100),
        summary=_json({key: content[key] for key in content if key not in ("cells", "statistics")}),
        palette=_json(PALETTE),
        plotly=Markup(get_plotlyjs()),
        asset=lambda name: Markup((_ASSETS / name).read_text(encoding="utf-8")),
    )


def _detail(result: Evaluation, detail: Detail, shown: Mapping[str, Any]) -> dict[str, Any]:
    """What the sections on recorded runs show."""
    _, level, seed = detail.selection.cell
    experts = []
    if detail.runs[0].series.experts is not None:
        experts = [
            Picture("balance", "Load of the heaviest rank over time", (), {(): balance_figure(detail, shown)}),
            Picture("ranks", "Load of the heaviest rank by layer over time", ("policy",), rank_figures(detail)),
            Picture("popularity", "Popularity of the experts over time", ("layer",), popularity_figures(detail)),
        ]
    return {
        "cell": f"{detail.condition.label}, {level_text(result.config.level_name, level)}, seed {seed}",
        "why": detail.selection.why,
        "explained": detail.explained,
        "policies": detail.selection.policies,
        "deviating": [
            f"{run.label} by {100 * run.deviation:.2g} %" for run in detail.runs if run.deviation > _REPRODUCED
        ],
        "distributions": [
            Picture(f"distribution-{name}", f"Distribution of {name}", ("view",), versions)
            for name, versions in distribution_figures(detail, shown, result.config.slo).items()
        ],
        "timelines": Picture("timelines", "Engines over time", ("policy",), timeline_figures(detail)),
        "experts": experts,
    }


def _decisions(detail: Detail) -> Markup:
    """The sampled decisions as JSON: by policy, each with its candidates and what was seen of them."""
    return _json(
        {
            "layer": detail.explained,
            "policies": {run.label: [_decision(one, detail.runs) for one in run.decisions] for run in detail.runs},
        }
    )


def _decision(one: Decision, runs: Sequence[DetailRun]) -> dict[str, Any]:
    outcomes = []
    for run in runs if one.subject >= 0 else ():
        outcome = run.outcome
        outcomes.append(
            {
                "policy": run.label,
                "engine": int(outcome.engine[one.subject]),
                "ttft_ms": 1e3 * float(outcome.ttft_s[one.subject]),
                "tpot_ms": 1e3 * float(outcome.tpot_s[one.subject]),
                "e2e_s": float(outcome.e2e_s[one.subject]),
            }
        )
    return {
        "time_s": round(one.time_s, 3),
        "request": one.subject,
        "facts": one.facts,
        "candidates": one.candidates,
        "scores": rounded(one.scores, 6),
        "chosen": one.chosen,
        "seen": [[name, rounded(values)] for name, values in one.seen],
        "features": [[name, rounded(values)] for name, values in one.features],
        "outcomes": outcomes,
    }


def _json(content: Any) -> Markup:
    """Return JSON that may stand in an HTML script."""
    text = json.dumps(finite(content), separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c"))
