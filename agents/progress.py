"""How long work shows its progress: one bar on stderr with the time that is left, where a person looks on.

Nothing is shown where nobody does: with ``--json``, in CI (the environment variable ``CI``), and where stderr is no
terminal. Training, which may take hours, then says a line a minute instead, but for CI and ``--json``.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

HEARTBEAT_S = 60.0


def in_ci() -> bool:
    """Whether this is a run of continuous integration, whose logs bars would fill."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


class Bar:
    """A bar, or a spinner where nobody knows how much there is to do.

    Args:
        title: what is being done: "replaying".
        total: how much there is to do; 1: shown as a percentage; None: unknown.
        unit: of the total: "cells".
        done: of the total, before this process began.
        quiet: show nothing.
        heartbeat: off a terminal, print a line a minute instead.

    >>> with Bar("replaying", quiet=True) as bar:
    ...     bar.update(0.5)
    """

    def __init__(
        self,
        title: str,
        total: float | None = 1.0,
        *,
        unit: str = "",
        done: float = 0.0,
        quiet: bool = False,
        heartbeat: bool = False,
    ) -> None:
        self._title, self._total, self._unit, self._start = title, total, unit, done
        self._done = done
        self._began = self._spoke = time.monotonic()
        console = Console(stderr=True)
        watched = sys.stderr.isatty() and not console.is_dumb_terminal
        self._heartbeat = heartbeat and not quiet and not in_ci() and not watched
        self._progress: Progress | None = None
        if watched and not quiet and not in_ci():
            self._progress = Progress(*self._columns(), console=console, transient=True)
            self._task = self._progress.add_task(title, total=total, text="", ends=None)
            self._progress.update(self._task, completed=done)

    def _columns(self) -> list[ProgressColumn]:
        title, text = TextColumn("{task.description}"), TextColumn("{task.fields[text]}", markup=False)
        if self._total is None:
            return [SpinnerColumn(), title, text, TimeElapsedColumn()]
        amount: ProgressColumn = TaskProgressColumn()
        if self._unit:
            amount = TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {self._unit}")
        return [title, BarColumn(), amount, text, TimeElapsedColumn(), _Left()]

    @property
    def shown(self) -> bool:
        """Whether a bar is drawn; what need not report to nobody may save itself the trouble."""
        return self._progress is not None

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, done: float | None = None, text: str | None = None) -> None:
        """Show how much is done, counted as ``total``, and a remark; None keeps what was shown."""
        now = time.monotonic()
        changes: dict[str, object] = {} if text is None else {"text": text}
        left_s = None
        if done is not None:
            self._done = done
            changes["completed"] = done if self._total is None else min(done, self._total)
        if self._total is not None and self._done > self._start:
            left_s = (now - self._began) * max(self._total - self._done, 0.0) / (self._done - self._start)
        if done is not None and left_s is not None:
            changes["ends"] = now + left_s
        if self._progress is not None:
            self._progress.update(self._task, **changes)  # type: ignore[arg-type]
        elif self._heartbeat and left_s is not None and now - self._spoke >= HEARTBEAT_S:
            self._spoke = now
            amount = f"{self._done:,.0f} of {self._total:,.0f} {self._unit}"
            self.say(", ".join(filter(None, (f"{self._title}: {amount}", text, f"{left_s / 60:.0f} min left"))))

    def advance(self, text: str | None = None) -> None:
        """One more is done."""
        self.update(self._done + 1, text)

    def say(self, line: str) -> None:
        """Print a line of its own on stderr, above the bar if there is one."""
        if self._progress is not None:
            self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


class _Left(ProgressColumn):
    """The time that is left, by the rate since the beginning."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        if ends is None or task.finished:
            return Text("")
        left = max(round(ends - time.monotonic()), 0)
        return Text(f"{timedelta(seconds=left)} left", style="progress.remaining")
