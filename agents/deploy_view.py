"""A deployment on the terminal: a page that is drawn anew, a line per interval, or JSON lines."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Status = dict[str, Any]
_WIDE = 120
_SAMPLES = 40
_STALE_S = 5.0
_NAMES = ("engine", "state", "decided by")
_BARS, _BARS_ASCII = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
_STYLES = {"up": "green", "draining": "yellow", "ejected": "bold red"}


class Trends:
    """The last samples of what a watcher wants to see move."""

    def __init__(self) -> None:
        self._samples: dict[str, deque[float]] = {}

    def add(self, status: Status) -> None:
        """Note a status."""
        total = status["recent"]["total"]
        values = {
            "requests/s": total["requests_per_s"],
            "TTFT p99, s": (total["ttft_s"] or {}).get("p99", 0.0),
            "waiting": float(sum(engine["waiting"] for engine in status["engines"])),
        }
        for name, value in values.items():
            self._samples.setdefault(name, deque(maxlen=_SAMPLES)).append(value)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        grid = Table.grid(padding=(0, 2, 0, 0))
        for name, samples in self._samples.items():
            bars = sparkline(samples, _BARS_ASCII if options.ascii_only else _BARS)
            grid.add_row(name, Text(bars, style="cyan"), f"{samples[-1]:.3g}, at most {max(samples):.3g}")
        yield grid


def sparkline(values: Sequence[float], bars: str = _BARS) -> str:
    """Return a character per value, the higher the larger, from zero to the largest.

    >>> sparkline([0, 1, 2, 4])
    ' ▂▄█'
    """
    most = max(values)
    return "".join(bars[round((len(bars) - 1) * value / most) if most > 0 else 0] for value in values)


def page(status: Status, trends: Trends | None = None, width: int = 140) -> RenderableType:
    """Return all about a deployment: what decides, the traffic, the engines.

    Args:
        status: of its admin page.
        trends: shown too, if given.
        width: of the terminal; a narrow one shows fewer columns.
    """
    head = Table.grid(padding=(0, 2, 0, 0))
    head.add_column(style="bold", no_wrap=True)
    for name, text in _facts(status):
        head.add_row(name, text)
    parts: list[RenderableType] = [head, "", _engines(status, width)]
    policies = status["recent"]["policies"]
    if len(policies) > 1:
        parts += ["", _policies(policies)]
    if trends is not None:
        parts += ["", trends]
    return Group(*parts)


def line(status: Status) -> str:
    """Return the same in one line, for logs."""
    recent, engines = status["recent"], status["engines"]
    down = [f"{engine['endpoint']} {engine['state']}" for engine in engines if engine["state"] != "up"]
    parts = [
        f"{_decides(status)}: {recent['total']['requests_per_s']:.1f} requests/s",
        f"TTFT {_ttft(recent['total'])}",
        f"{status['in_flight']} in flight",
        f"waiting {'+'.join(str(engine['waiting']) for engine in engines)}",
        f"running {'+'.join(str(engine['running']) for engine in engines)}",
        f"KV {'+'.join(format(engine['kv_usage'], '.0%') for engine in engines)}",
        f"fallbacks {sum(status['fallbacks'].values())}",
        *_unserved(recent),
        *down,
    ]
    return f"{datetime.now():%H:%M:%S} {status['name']} " + ", ".join(parts)


def watch(read: Callable[[], Status], interval_s: float, as_json: bool) -> None:
    """Show a deployment until Ctrl-C: as a page on a terminal, else a line per interval.

    Args:
        read: returns its status; may raise, which ends the watch.
        interval_s: between two looks.
        as_json: print JSON lines.
    """
    console = Console()
    with contextlib.suppress(KeyboardInterrupt):
        if as_json or not sys.stdout.isatty() or console.is_dumb_terminal:
            while True:
                status = read()
                stamped = {"time": datetime.now().astimezone().isoformat(timespec="milliseconds")} | status
                print(json.dumps(stamped) if as_json else line(status), flush=True)
                time.sleep(interval_s)
        trends = Trends()
        with Live(console=console, auto_refresh=False) as live:
            while True:
                status = read()
                trends.add(status)
                live.update(page(status, trends, console.width), refresh=True)
                time.sleep(interval_s)


def _decides(status: Status) -> str:
    share = f" {status['percent']:g} %" if status["percent"] else ""
    return f"{status['policy']} (version {status['version']}), mode {status['mode']}{share}"


def _facts(status: Status) -> list[tuple[str, RenderableType]]:
    recent = status["recent"]
    where = f"on http://{status['listen']}/v1" if status["listen"] else f"Endpoint Picker {status['picker']}"
    up = timedelta(seconds=round(status["uptime_s"]))
    decides = _decides(status)
    if status["mode"] == "canary" and status["policy"] in recent["policies"]:
        decides += f" of sessions ({recent['policies'][status['policy']]['share']:.1%} of recent requests)"
    if status["mode"] != "full":
        decides += f", baseline {status['baseline']}"
    if recent["agreement"] is not None:
        decides += f"; they agree on {recent['agreement']:.1%}"
    traffic = f"{recent['total']['requests_per_s']:.1f} requests/s, {status['in_flight']} in flight"
    traffic = ", ".join([traffic, *_unserved(recent)]) + f"; of the last {recent['window_s']:g} s"
    fallbacks = ", ".join(f"{count} {reason}" for reason, count in status["fallbacks"].items())
    facts: list[tuple[str, RenderableType]] = [
        (status["name"], Text(f"{where}, up {up}")),
        ("policy", Text(decides)),
        ("traffic", Text(traffic)),
        ("TTFT", Text(_ttft(recent["total"]))),
        ("fallbacks", Text(f"to least_requests: {fallbacks}" if fallbacks else "none", "yellow" if fallbacks else "")),
    ]
    return facts + [("", Text(cause, "red")) for cause in status["causes"].values()]


def _unserved(recent: Status) -> list[str]:
    return [f"{reason} {rate:.2g}/s" for reason, rate in recent["unserved_per_s"].items()]


def _ttft(traffic: Status) -> str:
    """Return percentiles in seconds."""
    if traffic["ttft_s"] is None:
        return "no first token yet"
    return ", ".join(f"{name} {_seconds(value)}" for name, value in traffic["ttft_s"].items()) + " s"


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _percentiles(traffic: Status, names: Sequence[str]) -> list[str]:
    return [_seconds(traffic["ttft_s"][name]) if traffic["ttft_s"] else "-" for name in names]


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        left = column in _NAMES
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "decided by", overflow="fold")
    return table


def _engines(status: Status, width: int) -> Table:
    wide = width >= _WIDE
    more = ("in flight", "prefill", "ejections", "telemetry") if wide else ()
    table = _table("engine", "state", "waiting", "running", "KV", "req/s", "TTFT p50", "p99", *more)
    table.columns[0].min_width = max((len(engine["endpoint"]) for engine in status["engines"]), default=0)
    for engine in status["engines"]:
        usage: RenderableType = f"{engine['kv_usage']:.0%}"
        if wide:
            cell = Table.grid(padding=(0, 1, 0, 0))
            cell.add_column(width=10)
            cell.add_column(width=4, justify="right")
            bar = ProgressBar(
                total=1.0, completed=engine["kv_usage"], width=10, complete_style="cyan", finished_style="bold red"
            )
            cell.add_row(bar, usage)
            usage = cell
        cells = [
            str(engine["in_flight"]),
            f"{engine['prefill_tokens']:,}",
            str(engine["ejections"]),
            f"{engine['telemetry_age_s']:.1f} s",
        ]
        table.add_row(
            engine["endpoint"],
            Text(engine["state"], _STYLES.get(engine["state"], "")),
            str(engine["waiting"]),
            str(engine["running"]),
            usage,
            f"{engine['requests_per_s']:.1f}",
            *_percentiles(engine, ("p50", "p99")),
            *(cells if wide else ()),
            style="dim" if engine["telemetry_age_s"] > _STALE_S else "",
        )
    return table


def _policies(policies: dict[str, Status]) -> Table:
    table = _table("decided by", "share", "req/s", "TTFT p50", "p90", "p99")
    for name, traffic in policies.items():
        figures = _percentiles(traffic, ("p50", "p90", "p99"))
        table.add_row(name, f"{traffic['share']:.1%}", f"{traffic['requests_per_s']:.1f}", *figures)
    return table
