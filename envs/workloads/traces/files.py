"""Trace files: CSV, JSON lines and Parquet, read column by column with errors that name the line."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from servegym.envs.workloads.traces.columns import Array, BadValueError, Kind
from servegym.errors import InputError, nearest

# Rows at a time: a row may hold thousands of block ids.
_CHUNK = 4096


class TraceFile(ABC):
    """A file of requests, one row each.

    Attributes:
        path: the file.
        columns: names of its columns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = self._header()

    def read(self, required: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None) -> dict[str, Array]:
        """Read columns, shape (rows,) each; of the optional ones those that are there.

        Raises:
            InputError: a column is missing, a value is not allowed, or there is no row.
        """
        for name in required:
            if name not in self.columns:
                raise self.missing(name, required)
        kinds = dict(required) | {name: kind for name, kind in (optional or {}).items() if name in self.columns}
        parts: dict[str, list[Array]] = {name: [] for name in kinds}
        rows = 0
        for chunk in self._chunks(list(kinds)):
            for (name, kind), values in zip(kinds.items(), chunk, strict=True):
                try:
                    parts[name].append(kind.convert(values))
                except BadValueError as error:
                    raise InputError(self._where(rows + error.row), name, str(error)) from None
            rows += len(chunk[0])
        if not rows:
            raise InputError(str(self.path), "", "no requests; allowed: at least 1")
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def missing(self, name: str, expected: Collection[str]) -> InputError:
        """Return the error for a missing column, one of those expected; the hint leaves out the other ones."""
        unused = [column for column in self.columns if column not in expected]
        return InputError(self._where(-1), name, f"missing column; {nearest(name, unused or self.columns)}")

    @abstractmethod
    def _header(self) -> list[str]:
        """Names of the columns."""

    @abstractmethod
    def _chunks(self, names: Sequence[str]) -> Iterator[Sequence[Sequence[Any]]]:
        """Yield the values of the named columns, some rows at a time."""

    @abstractmethod
    def _where(self, row: int) -> str:
        """Say where a row is; -1 stands for the names of the columns."""


class CsvFile(TraceFile):
    """Comma-separated values with a header line."""

    def _header(self) -> list[str]:
        with _open_text(self.path) as file:
            header = next(csv.reader(file), None)
        if not header:
            raise InputError(str(self.path), "", "empty file; allowed: a header line and a line per request")
        return [name.strip() for name in header]

    def _chunks(self, names: Sequence[str]) -> Iterator[Sequence[Sequence[Any]]]:
        indices = [self.columns.index(name) for name in names]
        start = 0
        with _open_text(self.path) as file:
            rows = _data_rows(csv.reader(file))
            while chunk := list(islice(rows, _CHUNK)):
                if min(map(len, chunk)) <= max(indices):
                    self._reject_short(chunk, start)
                columns = list(zip(*chunk, strict=False))
                yield [columns[index] for index in indices]
                start += len(chunk)

    def _reject_short(self, chunk: Sequence[Sequence[str]], start: int) -> None:
        row = next(i for i, cells in enumerate(chunk) if len(cells) < len(self.columns))
        problem = f"got {len(chunk[row])} columns; allowed: {len(self.columns)} as in the header"
        raise InputError(self._where(start + row), "", problem)

    def _where(self, row: int) -> str:
        if row < 0:
            return f"{self.path}:1"
        with _open_text(self.path) as file:
            reader = csv.reader(file)
            next(islice(_data_rows(reader), row, None))
            return f"{self.path}:{reader.line_num}"


def _data_rows(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """Rows after the header that are not blank."""
    return filter(None, islice(reader, 1, None))


class JsonLinesFile(TraceFile):
    """One JSON object per line."""

    def _header(self) -> list[str]:
        for _, record in self._records():
            return list(record)
        raise InputError(str(self.path), "", "no requests; allowed: a JSON object per line")

    def _chunks(self, names: Sequence[str]) -> Iterator[Sequence[Sequence[Any]]]:
        records = self._records()
        while chunk := list(islice(records, _CHUNK)):
            for number, record in chunk:
                for name in names:
                    if name not in record:
                        raise InputError(f"{self.path}:{number}", name, "missing; this field is required")
            yield [[record[name] for _, record in chunk] for name in names]

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with _open_text(self.path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    where = f"{self.path}:{number}:{error.colno}"
                    raise InputError(where, "", f"not valid JSON: {error.msg}") from None
                if not isinstance(record, dict):
                    raise InputError(f"{self.path}:{number}", "", f"got {line.strip()[:40]!r}; allowed: a JSON object")
                yield number, record

    def _where(self, row: int) -> str:
        number = 1 if row < 0 else next(islice(self._records(), row, None))[0]
        return f"{self.path}:{number}"


class ParquetFile(TraceFile):
    """Parquet, through the optional dependency pyarrow."""

    def _header(self) -> list[str]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            problem = "Parquet needs pyarrow; install servegym[train], or use CSV"
            raise InputError(str(self.path), "", problem) from None
        try:
            self._file = pyarrow.parquet.ParquetFile(self.path)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise InputError(str(self.path), "", f"cannot be read as Parquet: {_one_line(error)}") from None
        return list(self._file.schema_arrow.names)

    def _chunks(self, names: Sequence[str]) -> Iterator[Sequence[Sequence[Any]]]:
        for batch in self._file.iter_batches(batch_size=_CHUNK, columns=list(names)):
            yield [_plain(batch.column(name)) for name in names]

    def _where(self, row: int) -> str:
        return str(self.path) if row < 0 else f"{self.path}:row {row + 1}"


def _plain(column: Any) -> Sequence[Any]:
    """A Parquet column as numpy where that is exact, else as Python objects."""
    if column.null_count or str(column.type).startswith(("list", "large_list", "string", "large_string")):
        values: Sequence[Any] = column.to_pylist()
        return values
    array: Sequence[Any] = column.to_numpy(zero_copy_only=False)
    return array


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """Open plain or gzipped text; failures while it is read become one line."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError:
        raise InputError(str(path), "", "cannot be read: not UTF-8 text") from None
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise InputError(str(path), "", f"cannot be read: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split())


_SUFFIXES: dict[str, type[TraceFile]] = {
    ".csv": CsvFile,
    ".jsonl": JsonLinesFile,
    ".parquet": ParquetFile,
}


def open_trace(path: Path) -> TraceFile:
    """Open a trace file by the end of its name; ``.csv`` and ``.jsonl`` may be gzipped.

    Raises:
        InputError: no such file, another ending, or a file that cannot be read.
    """
    if not path.is_file():
        raise InputError(str(path), "", "no such file")
    suffixes = [suffix for suffix in path.suffixes[-2:] if suffix != ".gz"]
    kind = _SUFFIXES.get(suffixes[-1] if suffixes else "")
    if kind is None or (path.suffix == ".gz" and kind is ParquetFile):
        raise InputError(str(path), "", f"unknown kind of file; allowed: {', '.join(_SUFFIXES)}, or .csv.gz, .jsonl.gz")
    return kind(path)
