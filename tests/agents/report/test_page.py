"""The report page: one file, whole, true to the evaluation's numbers, and made of runs that reproduce it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects
import pytest
import yaml
from support import TOY, command

from servegym.agents.evaluation import Evaluation, EvaluationConfig, evaluate
from servegym.agents.evaluation.folder import load_evaluation, origin
from servegym.agents.report.detail import record
from servegym.agents.report.figures.style import PALETTE, SERIES
from servegym.agents.report.selection import Wish, select
from servegym.agents.report.write import write_report
from servegym.configuration import validate
from servegym.errors import InputError

EXPERTS: dict[str, Any] = {"layers": 3, "experts": 8, "top_k": 2, "expert_us": 20.0, "expert_bytes": 1_000_000}
EXPERTS |= {"token_bytes": 4096, "link_gb_s": 10, "link_latency_us": 5}
LENGTHS = {"kind": "lognormal", "sigma": [0.8]}
WORKLOAD = {
    "name": "toy",
    "description": "made-up lengths",
    "source": "invented",
    "arrivals": {"process": "poisson"},
    "prompt_tokens": LENGTHS | {"mu": [4.5]},
    "output_tokens": LENGTHS | {"mu": [3.5]},
}
SECTIONS = (
    "leaderboard", "differences", "figures", "ladder", "recorded", "distributions", "timelines", "experts", "decisions",
    "environment",
)  # fmt: skip


@dataclass
class Made:
    """An evaluation and its page."""

    result: Evaluation
    page: str
    path: Path
    folder: Path


def _config(folder: Path, **changes: Any) -> EvaluationConfig:
    (folder / "profile.yaml").write_text(yaml.safe_dump(TOY | {"experts": EXPERTS}), encoding="utf-8")
    (folder / "workload.yaml").write_text(yaml.safe_dump(WORKLOAD), encoding="utf-8")
    content = {
        "name": "tiny <b>",
        "cluster": {"engines": 2, "profile": str(folder / "profile.yaml")},
        "workloads": [{"name": str(folder / "workload.yaml"), "requests": 200}],
        "loads": [0.6, 0.9],
        "seeds": 2,
        "baseline": "rr",
        "policies": {
            "rr": {"engine": "round_robin"},
            "lmetric": {"engine": "lmetric"},
            "gimbal2": {"engine": "gimbal2"},
            "learned": {"engine": "servegym/dispatch"},
            "oracle": {"engine": "jsw_oracle"},
        },
    }
    return validate(EvaluationConfig, content | changes, "test")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("report")
    result = evaluate(_config(folder), processes=1, out=folder / "run", command="servegym evaluate tiny")
    path = folder / "report.html"
    write_report(path, *load_evaluation(folder / "run"))
    return Made(result, path.read_text(encoding="utf-8"), path, folder / "run")


class _Page(HTMLParser):
    """Tags with their attributes, the numbers of tables by place, and the text outside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.scripts: dict[str, str] = {}
        self.text = ""
        self._script = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        self._script = str(given.get("id") or given.get("data-versions") or "other") if tag == "script" else ""
        if tag == "tbody":
            self.tables.append([])
        elif tag == "tr" and self.tables:
            self.tables[-1].append([])
        elif tag in ("td", "th") and self.tables and self.tables[-1] and "data-value" in given:
            self.tables[-1][-1].append(str(given["data-value"]))

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        else:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._script = ""

    def versions(self, key: str) -> dict[tuple[str, ...], Any]:
        return {tuple(names): drawn for names, drawn in json.loads(self.scripts[key])}


def test_the_page_asks_no_network_for_anything(made: Made) -> None:
    page = _Page(made.page)
    names = {"src", "href", "srcset", "data", "action", "poster"}
    asked = [value for _, given in page.tags for name, value in given.items() if name in names]
    assert asked
    assert all(str(value).startswith("#") for value in asked)
    assert "link" not in {tag for tag, _ in page.tags}
    policy = next(given["content"] for tag, given in page.tags if tag == "meta" and "http-equiv" in given)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"https?:", policy)
    style = made.page[made.page.index("<style>") : made.page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_every_section_is_there_and_names_are_text(made: Made) -> None:
    page = _Page(made.page)
    ids = [given.get("id") for tag, given in page.tags if tag == "section"]
    assert ids == list(SECTIONS)
    for target in (given["href"] for tag, given in page.tags if tag == "a"):
        assert str(target).removeprefix("#") in ids
    assert "tiny <b>" in page.text
    assert made.result.config.digest() in page.text
    assert "servegym evaluate tiny" in page.text
    assert "the cluster has no expert model" in " ".join(page.text.split())


def test_numbers_are_those_of_the_json(made: Made) -> None:
    content, page = made.result.as_json(), _Page(made.page)
    board, *conditions = [[row for row in table if row] for table in page.tables]
    metrics = ("ttft_s", "ttft_p99_s", "tpot_s", "e2e_s", "throughput_rps")
    for row, shown in zip(content["leaderboard"], board, strict=True):
        expected = [row["versus_baseline"][metric]["value"] for metric in metrics]
        expected += [row[f"versus_{rival}_heuristic"]["ttft_s"]["value"] for rival in ("best", "chosen")]
        expected += [row[name] for name in ("worst_cell", "cells_won", "cells_lost")]
        assert shown == [row["policy"], *map(str, expected)]
    found = {}
    for (_, level), table in zip(made.result.conditions, conditions, strict=True):
        found |= {(level, row[0]): row[1:] for row in table}
    assert len(found) == len(content["statistics"])
    for entry in content["statistics"]:
        means = [str(figures["mean"]["value"]) for figures in entry["metrics"].values()]
        assert found[entry["load"], entry["policy"]] == means
    embedded = json.loads(page.scripts["evaluation"])["leaderboard"]
    assert [row["versus_baseline"] for row in embedded] == [row["versus_baseline"] for row in content["leaderboard"]]
    forest = [trace for trace in page.versions("differences")["TTFT", "rr"]["data"] if trace["mode"] == "markers"]
    assert [trace["x"][0] - 1 for trace in forest] == pytest.approx(
        [row["versus_baseline"]["ttft_s"]["value"] for row in content["leaderboard"]]
    )
    low = content["leaderboard"][0]["versus_baseline"]["ttft_s"]["low"]
    assert forest[0]["x"][0] - forest[0]["error_x"]["arrayminus"][0] - 1 == pytest.approx(low)


def test_the_page_of_a_folder_is_the_page_of_its_evaluation(made: Made, tmp_path: Path) -> None:
    again, made_with = load_evaluation(made.folder)
    assert again.rows == made.result.rows
    assert again.config.digest() == made.result.config.digest()
    write_report(tmp_path / "again.html", made.result, made_with)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == made.page


def test_recorded_runs_are_those_of_the_evaluation(made: Made) -> None:
    detail = record(made.result, select(made.result))
    assert "rr" in detail.selection.policies
    assert "learned" in detail.selection.policies
    assert "oracle" not in detail.selection.policies
    for run in detail.runs:
        assert run.deviation == 0.0
        assert len(run.decisions) == 24
        for decision in run.decisions:
            assert run.outcome.engine[decision.subject] == decision.chosen
            assert decision.scores.argmin() == decision.chosen
        assert (run.series.waiting + run.series.running).max() > 0
        assert run.series.time_s[-1] == pytest.approx(np.nanmax(run.outcome.finish_s), rel=0.02)
    subjects = {tuple(decision.subject for decision in run.decisions) for run in detail.runs}
    assert len(subjects) == 1
    shown = json.loads(_Page(made.page).scripts["decisions-data"])["policies"]
    for run in detail.runs:
        assert [one["chosen"] for one in shown[run.label]] == [one.chosen for one in run.decisions]


def test_what_to_look_into_can_be_asked_for(made: Made) -> None:
    selection = select(made.result, Wish(level=0.9, seed=1, policies=("oracle", "rr")))
    assert selection.cell == (0, 0.9, 1)
    assert set(selection.policies) == {"oracle", "rr"}
    for wish, message in (
        (Wish(level=0.7), r"--load: 0\.7: allowed: 0\.6, 0\.9"),
        (Wish(seed=5), "--seed: 5: allowed: 0, 1"),
        (Wish(workload="toi"), "--workload: toi: not in the evaluation"),
        (Wish(policies=("lmetrik",)), "--policies: lmetrik: not in the evaluation; did you mean lmetric"),
    ):
        with pytest.raises(InputError, match=message):
            select(made.result, wish)


def test_experts_have_a_heat_map(tmp_path: Path) -> None:
    experts = {
        "routing": {"source": "power_law", "preset": "power_law_1.2", "tokens": 1024},
        "replacement": {"interval_steps": 20, "window_steps": 20, "layer_overhead_s": 0.001},
    }
    cluster = {"engines": 2, "mode": "lockstep", "profile": str(tmp_path / "profile.yaml"), "experts": experts}
    policies = {"keep": {"expert": "linear"}, "eplb": {"expert": "eplb"}}
    config = _config(tmp_path, cluster=cluster, policies=policies, baseline="keep", loads=[0.7], seeds=1)
    result = evaluate(config, processes=1)
    write_report(tmp_path / "page.html", result, origin())
    page = _Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    ranks = page.versions("ranks")
    assert set(ranks) == {("keep",), ("eplb",)}
    heat, marks = ranks["eplb",]["data"]
    assert heat["type"] == "heatmap"
    assert marks["x"]  # re-placements
    assert not ranks["keep",]["data"][1]["x"]
    popularity = next(iter(page.versions("popularity").values()))["data"][0]
    assert len(popularity["y"]) == EXPERTS["experts"]
    text = " ".join(page.text.split())
    assert "no interval" in text or "No policy has a lower TTFT than keep" in text
    assert "Left out: the evaluation has one load" in text
    assert "differ neither in the choice of the engine nor in the order" in text


def test_queues_are_explained_where_policies_order_them(tmp_path: Path) -> None:
    cluster = {"engines": 1, "profile": str(tmp_path / "profile.yaml"), "engine": {"max_num_seqs": 2}}
    policies = {"fcfs": {"request": "fcfs"}, "spf": {"request": "spf_aging,gamma=0"}}
    config = _config(tmp_path, cluster=cluster, policies=policies, baseline="fcfs", loads=[1.5], seeds=1)
    result = evaluate(config, processes=1)
    detail = record(result, select(result))
    assert detail.explained == "request"
    shortest = next(run for run in detail.runs if run.label == "spf")
    assert shortest.deviation == 0.0
    assert shortest.decisions
    for decision in shortest.decisions:
        prompts = dict(decision.seen)["prompt tokens"]
        assert (np.diff(prompts) >= 0).all()
        assert decision.chosen == 0


def test_live_engines_have_no_recorded_runs(tmp_path: Path) -> None:
    live = {"cluster": "local"}
    config = _config(tmp_path, live=live, rates_rps=[5.0], loads=[], policies={"rr": {}, "rr2": {}}, seeds=1)
    latency = {"mean": 0.1, "p99": 0.2}
    metrics = dict.fromkeys(("ttft_s", "tpot_s", "e2e_s"), latency) | {"throughput_rps": 1.0, "goodput_rps": 1.0}
    cell = {"workload": config.conditions[0].label, "rate_rps": 5.0, "seed": 0}
    result = Evaluation(config, [cell | {"policy": label} | metrics for label in config.policies])
    write_report(tmp_path / "page.html", result, origin())
    page = _Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert " ".join(page.text.split()).count("Left out: requests on live engines are not recorded one by one.") == 4


def test_the_commands(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page, folder = tmp_path / "page.html", made.folder
    assert command(monkeypatch, "report", folder, "--html", page, "--load", "0.9", "--policies", "rr,oracle") == 0
    text = _Page(page.read_text(encoding="utf-8")).text
    assert "load 0.9, seed" in text
    assert "rr, oracle" in text or "oracle, rr" in text
    assert capsys.readouterr().out == f"report: {page}\n"
    config = folder / "config.yaml"  # that of a folder is a config like any other
    again = ("evaluate", config, "--out", folder, "--json", "--html", tmp_path / "again.html")
    assert command(monkeypatch, *again) == 0
    assert json.loads(capsys.readouterr().out)["config_sha256"] == made.result.config.digest()
    assert made.result.config.digest() in (tmp_path / "again.html").read_text(encoding="utf-8")
    for missing in ("plotly", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            assert command(patch, *again) == 2
        line = f"{missing} is not installed; allowed: pip install 'servegym[plot]'"
        assert capsys.readouterr().err.strip().endswith(line)


def test_what_cannot_be_done_is_one_line(made: Made, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "page.pdf", "allowed: a file that ends in .html"),
        (tmp_path / "absent" / "page.html", "the folder does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            write_report(path, made.result, {})
    unfinished = tmp_path / "unfinished"
    shutil.copytree(made.folder, unfinished)
    lines = (unfinished / "cells.jsonl").read_text(encoding="utf-8").splitlines()
    (unfinished / "cells.jsonl").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="1 of 4 cells are missing"):
        load_evaluation(unfinished)
    with pytest.raises(InputError, match=r"has no config\.yaml; allowed: the folder of `servegym evaluate"):
        load_evaluation(tmp_path)


def test_figures_are_plotlys(made: Made) -> None:
    page = _Page(made.page)
    keys = [str(given["data-versions"]) for tag, given in page.tags if tag == "script" and "data-versions" in given]
    assert len(keys) == 5
    for key in keys:
        for names, drawn in page.versions(key).items():
            assert plotly.graph_objects.Figure(drawn).data, (key, names)  # raises on what plotly does not know


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def test_lines_stand_out_in_both_themes() -> None:
    style = (Path(__file__).parents[3] / "agents" / "report" / "assets" / "style.css").read_text(encoding="utf-8")
    grounds = re.findall(r"--ground: (#[0-9a-f]{6})", style)
    assert len(grounds) == 2
    for pair in SERIES:
        for color, behind in zip(pair, grounds, strict=True):
            low, high = sorted((_luminance(color), _luminance(behind)))
            assert (high + 0.05) / (low + 0.05) >= 3, (color, behind)
    assert len(set(PALETTE.values())) == len(PALETTE)


def test_a_browser_draws_every_picture(made: Made, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on the PATH: the page is not looked at")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--no-first-run", f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([*command, made.path.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    page = _Page(done.stdout)
    plots = [given for tag, given in page.tags if given.get("class") and "js-plotly-plot" in str(given["class"])]
    assert {given["data-plot"] for given in plots} == {
        "differences", "ladder", "distribution-TTFT", "distribution-TPOT", "timelines"
    }  # fmt: skip
    assert "score, lowest wins" in page.text
    assert "How request" in page.text
