"""Bars: with the time that is left on a terminal, silent elsewhere."""

from __future__ import annotations

import io
import sys
import time

import pytest

from servegym.agents import progress
from servegym.agents.progress import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stderr a terminal; not a fixture, as pytest puts its own in place before each test."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("CI", raising=False)
    return screen


def run(**options: object) -> None:
    with Bar("evaluating", 8, unit="cells", done=2, **options) as bar:  # type: ignore[arg-type]
        time.sleep(0.05)
        bar.update(4, "cell 4 of [8]")
        bar.say("a line")
        time.sleep(0.3)


def test_a_terminal_shows_amount_remark_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    run()
    screen = stderr.getvalue()
    for part in ("evaluating", "4/8 cells", "cell 4 of [8]", "0:00:00 left", "a line\n"):
        assert part in screen, part
    assert screen.rstrip().endswith(("\x1b[?25h", "\x1b[2K", "\r"))  # the cursor is back, the bar gone


def test_the_time_left_follows_from_the_rate_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(monkeypatch)
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Bar("evaluating", 10, unit="cells", done=4) as bar:
        now[0] += 30
        bar.update(6)  # two in half a minute; four are left
        assert bar._progress is not None
        assert bar._progress.tasks[0].fields["ends"] == pytest.approx(now[0] + 60)


def test_without_a_total_there_is_no_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    with Bar("draining", None) as bar:
        bar.update(text="3 streams run")
        time.sleep(0.3)
    assert "3 streams run" in stderr.getvalue()
    assert "left" not in stderr.getvalue()


@pytest.mark.parametrize("why", ["json", "ci", "no terminal", "dumb"])
def test_it_is_silent_where_nobody_looks(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr: io.StringIO = terminal(monkeypatch)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as some CI services do, which makes rich believe in a terminal
    if why == "ci":
        monkeypatch.setenv("CI", "true")
    elif why == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    elif why == "no terminal":
        stderr = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stderr)
    with Bar("evaluating", 8, quiet=why == "json") as bar:
        bar.update(4)
    assert stderr.getvalue() == ""


def test_long_work_says_a_line_a_minute_off_a_terminal_but_not_in_ci(monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT_S", 0.0)
    for ci, lines in (("", 1), ("1", 0)):
        monkeypatch.setenv("CI", ci)
        with Bar("train", 200, unit="steps", heartbeat=True) as bar:
            bar.update(50, "7 steps/s")
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines
    assert not any("\x1b" in line for line in said)
