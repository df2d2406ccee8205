"""What a training run says of its progress: steps, rate, return and TTFT against the reference."""

from __future__ import annotations

import time

from servegym.agents.progress import Bar


class TrainingProgress(Bar):
    """Shows a training run.

    Args:
        total: steps of the whole run.
        start: steps done before this process started.
        shown: False for none at all.
    """

    def __init__(self, total: int, start: int, shown: bool) -> None:
        super().__init__("train", total, unit="steps", done=start, quiet=not shown, heartbeat=True)
        self._shown = shown
        self._first_step, self._first_s = start, time.monotonic()

    def say(self, line: str) -> None:
        """Print a line of its own; nothing if nothing is shown."""
        if self._shown:
            super().say(line)

    def trained(self, steps: int, episode_return: float | None, ttft_ratio: float | None) -> None:
        """Show the state after a rollout; None leaves a part out."""
        rate = (steps - self._first_step) / max(time.monotonic() - self._first_s, 1e-9)
        parts = [f"{rate:,.0f} steps/s"]
        if episode_return is not None:
            parts.append(f"return {episode_return:.3g}")
        if ttft_ratio is not None:
            parts.append(f"TTFT {ttft_ratio - 1:+.1%} vs reference")
        self.update(steps, "  ".join(parts))
