"""Kinds of columns: how the values of a trace are read and what they may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from servegym.envs.workloads.distributions import MOST_TOKENS

Array = npt.NDArray[Any]


class BadValueError(ValueError):
    """A value that is not allowed; the file that holds it knows the line.

    Args:
        row: index within the converted values.
        value: as it was found.
        allowed: what is allowed, as a phrase.
    """

    def __init__(self, row: int, value: object, allowed: str) -> None:
        self.row = row
        self.value = value
        self.allowed = allowed
        shown = repr(value.item() if isinstance(value, np.generic) else value)
        super().__init__(f"got {shown if len(shown) <= 60 else shown[:57] + '...'}; allowed: {allowed}")


class Kind(Protocol):
    """Converts the values of a column."""

    def convert(self, values: Sequence[Any] | Array) -> Array:
        """Return the values as an array of the same length.

        Raises:
            BadValueError: the first value that is not allowed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Number:
    """Finite numbers of ``[low, high]``, whole if asked, as float64; an empty cell is ``empty`` if that is given."""

    low: float = 0.0
    high: float = math.inf
    whole: bool = False
    empty: float | None = None

    @property
    def allowed(self) -> str:
        """The phrase of error messages."""
        noun = "an integer" if self.whole else "a finite number"
        least = f" of at least {self.low:g}" if self.low > -math.inf else ""
        return noun + least + (f" and at most {self.high:.0f}" if self.high < math.inf else "")

    def convert(self, values: Sequence[Any] | Array) -> Array:
        """Return float64 numbers, shape (values,)."""
        if isinstance(values, np.ndarray) and values.dtype.kind in "iuf":
            numbers = values.astype(np.float64)
            if self.empty is not None:
                numbers[np.isnan(numbers)] = self.empty
        else:
            try:
                numbers = np.fromiter(map(self._parse, values), np.float64, len(values))
            except (ValueError, TypeError):
                raise self._first_unreadable(values) from None
        good = np.isfinite(numbers) & (numbers >= self.low) & (numbers <= self.high)
        if self.whole:
            good &= numbers == np.rint(numbers)
        if self.empty is not None:
            good |= numbers == self.empty
        if not good.all():
            row = int(good.argmin())
            raise BadValueError(row, values[row], self.allowed)
        return numbers

    def _parse(self, value: Any) -> float:
        if self.empty is not None and (value is None or value == "" or value != value):
            return self.empty
        return float(value)

    def _first_unreadable(self, values: Sequence[Any] | Array) -> BadValueError:
        for row, value in enumerate(values):
            try:
                self._parse(value)
            except (ValueError, TypeError):
                return BadValueError(row, value, self.allowed)
        raise AssertionError("every value can be read")


@dataclass(frozen=True, slots=True)
class Label:
    """Names of users or sessions, as text; empty where there is none."""

    def convert(self, values: Sequence[Any] | Array) -> Array:
        """Return str objects, shape (values,)."""
        return np.array(["" if value is None or value != value else str(value) for value in values], dtype=object)


@dataclass(frozen=True, slots=True)
class Instant:
    """Points in time in ISO format, UTC."""

    allowed: str = "a time such as 2023-11-16 18:15:46.680"

    def convert(self, values: Sequence[Any] | Array) -> Array:
        """Return datetime64[ns], shape (values,)."""
        if isinstance(values, np.ndarray):
            instants = values.astype("datetime64[ns]")
        else:
            texts = [str(value).removesuffix("+00:00").removesuffix("Z") for value in values]
            try:
                instants = np.array(texts, dtype="datetime64[ns]")
            except ValueError:
                raise self._first_unreadable(texts) from None
        missing = np.isnat(instants)
        if missing.any():
            row = int(missing.argmax())
            raise BadValueError(row, values[row], self.allowed)
        return instants

    def _first_unreadable(self, texts: Sequence[str]) -> BadValueError:
        for row, text in enumerate(texts):
            try:
                np.datetime64(text, "ns")
            except ValueError:
                return BadValueError(row, text, self.allowed)
        raise AssertionError("every value can be read")


@dataclass(frozen=True, slots=True)
class Blocks:
    """Lists of block ids: JSON or Parquet lists, or integers separated by blanks in a cell."""

    allowed: str = "a list of integers"

    def convert(self, values: Sequence[Any] | Array) -> Array:
        """Return an int64 array per value, shape (values,)."""
        lists = np.empty(len(values), dtype=object)
        for row, value in enumerate(values):
            try:
                lists[row] = self._parse(value)
            except (ValueError, TypeError, OverflowError):
                raise BadValueError(row, value, self.allowed) from None
        return lists

    def _parse(self, value: Any) -> npt.NDArray[np.int64]:
        if value is None:
            return np.zeros(0, dtype=np.int64)
        items = np.array(value.strip("[]").replace(",", " ").split() if isinstance(value, str) else list(value))
        if items.size and (items.ndim != 1 or items.dtype.kind not in "iuU"):
            raise ValueError(value)
        # Hashes of 64 bits without sign wrap around, and stay distinct.
        return items.astype(np.int64)


SECONDS = Number()
TOKENS = Number(low=1, high=MOST_TOKENS, whole=True)
TOKENS_OR_ZERO = Number(low=0, high=MOST_TOKENS, whole=True)
INTEGER = Number(low=-(2.0**31), high=2.0**31 - 1, whole=True)


def dense_ids(labels: Array) -> npt.NDArray[np.int32]:
    """Number labels from 0 in their order of appearance; -1 where a label is empty. Shape (labels,).

    >>> dense_ids(np.array(["b", "", "a", "b"], dtype=object)).tolist()
    [0, -1, 1, 0]
    """
    known: dict[str, int] = {"": -1}
    return np.fromiter((known.setdefault(label, len(known) - 1) for label in labels), np.int32, len(labels))


def flatten(lists: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the lengths of lists of int, shape (lists,), and all their items in a row."""
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    return lengths, np.concatenate([np.zeros(0, dtype=np.int64), *lists])
