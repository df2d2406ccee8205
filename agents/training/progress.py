"""How a training run shows its progress: a bar on a terminal, a line a minute elsewhere; on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_PERIOD_S = 60.0


class TrainingProgress:
    """Shows steps, speed, return and TTFT against the reference.

    Args:
        total: steps of the whole run.
        start: steps done before this process started.
        shown: False for none at all.
    """

    def __init__(self, total: int, start: int, shown: bool) -> None:
        self._total, self._start, self._shown = total, start, shown
        self._began = self._spoke = time.monotonic()
        self._text = ""
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if shown and console.is_terminal:
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed:,}/{task.total:,} steps"),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("train", total=total, completed=start, text="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        elif self._shown:
            print(line, file=sys.stderr, flush=True)

    def update(self, steps: int, episode_return: float | None, ttft_ratio: float | None) -> None:
        """Show the state after a rollout; None keeps what was shown."""
        rate = (steps - self._start) / max(time.monotonic() - self._began, 1e-9)
        parts = [f"{rate:,.0f} steps/s"]
        if episode_return is not None:
            parts.append(f"return {episode_return:.3g}")
        if ttft_ratio is not None:
            parts.append(f"TTFT {ttft_ratio - 1:+.1%} vs reference")
        self._text = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=min(steps, self._total), text=self._text)
        elif self._shown and time.monotonic() - self._spoke >= QUIET_PERIOD_S:
            self._spoke = time.monotonic()
            left = (self._total - steps) / max(rate, 1e-9)
            self.say(f"train: {steps:,} of {self._total:,} steps, {self._text}, {left / 60:.0f} min left")
