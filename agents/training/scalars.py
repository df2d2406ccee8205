"""Stable-Baselines3's log records as TensorBoard scalars."""

from __future__ import annotations

import numbers
from typing import Any

from stable_baselines3.common.logger import KVWriter
from torch.utils.tensorboard import SummaryWriter


class TensorBoardScalars(KVWriter):
    """Writes every number of a record.

    Args:
        writer: where to; opened with ``purge_step`` when a run is resumed, so that what came after the checkpoint is
            overwritten.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Write one record."""
        for key, value in sorted(key_values.items()):
            if isinstance(value, numbers.Real) and "tensorboard" not in key_excluded.get(key, ()):
                self._writer.add_scalar(key, float(value), step)
        self._writer.flush()

    def close(self) -> None:
        """Leave the writer open: its owner closes it."""
