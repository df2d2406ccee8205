"""Reading the public kernel tables of NVIDIA's aiconfigurator (Apache-2.0): latency per kernel and shape, in ms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from servegym.envs.profiles.hardware import ModelShape
from servegym.errors import InputError

FloatArray = npt.NDArray[np.float64]
Series = tuple[FloatArray, FloatArray]

GRAPH_TOKENS = 512
"""The largest batch that vLLM captures as a CUDA graph by default (``max_cudagraph_capture_size``)."""

REACH = 4
"""How far beyond the measured sizes a matrix product is still inferred, as a factor."""

QUANTISE_US = 2.0
"""A kernel that quantises the input of a small matrix product: modelled."""


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Attention latencies of one layer; every array has shape (rows,).

    Attributes:
        sequences: sequences in the batch.
        tokens: query tokens of the batch.
        pairs: query-key pairs of causal prefill, 0 for decoding rows.
        context: summed context of decoding sequences, 0 for prefill rows.
        us: latency, microseconds.
    """

    sequences: FloatArray
    tokens: FloatArray
    pairs: FloatArray
    context: FloatArray
    us: FloatArray


@dataclass(frozen=True, slots=True)
class KernelTables:
    """The Parquet files of one GPU and one vLLM version in a folder.

    Attributes:
        folder: where the files are.
        prefix: start of their names, such as ``aic_h200_vllm0.24``.
        moe_prefix: the same of the MoE table, where another version's is to be read; None: as the others.
        notes: filled on reading: each shape that is not in the tables and how its cost was inferred.
    """

    folder: Path
    prefix: str
    moe_prefix: str | None = field(default=None, kw_only=True)
    notes: dict[str, None] = field(default_factory=dict, compare=False, kw_only=True)

    def gemm(self, columns: int, depth: int, dtype: str = "bfloat16") -> Series:
        """Return (rows, us) of a matrix product ``rows x depth`` by ``depth x columns``.

        Small products in ``fp8_block`` were measured at their launch from Python: 60 to 90 us whatever the size. Up to
        ``GRAPH_TOKENS`` rows, which vLLM runs in a CUDA graph, the product in ``fp8`` and a kernel that quantises its
        input stand for them where they are faster. ``notes`` records it.
        """
        rows, us = self._gemm(columns, depth, dtype)
        if dtype == "fp8_block":
            graph = rows <= GRAPH_TOKENS
            plain = np.interp(rows, *self._gemm(columns, depth, "fp8")) + QUANTISE_US
            us = np.where(graph, np.minimum(us, plain), us)
            self.notes[f"matrix products fp8_block up to {GRAPH_TOKENS} rows: fp8 and {QUANTISE_US:g} us"] = None
        return rows, us

    def _gemm(self, columns: int, depth: int, dtype: str) -> Series:
        """Return (rows, us) as measured, or inferred from the shapes around it.

        A shape that was not measured is interpolated between its measured neighbours, linearly in the logarithms of
        columns, depth and latency; beyond the largest of them the cost is in proportion, below the smallest it is that
        one's. ``notes`` records it.
        """
        shape = {"gemm_dtype": dtype, "n": columns, "k": depth}
        sizes = self._gemm_sizes(dtype)
        if (columns, depth) in sizes:
            return self._series("gemm", "m", shape)
        grid = sorted({n for n, _ in sizes}), sorted({k for _, k in sizes})
        corners = [(n, k) for n in _around(grid[0], columns) for k in _around(grid[1], depth)]
        near = all(
            axis[0] / REACH <= size <= axis[-1] * REACH for axis, size in zip(grid, (columns, depth), strict=True)
        )
        if not near or not sizes.issuperset(corners):
            wanted = ", ".join(f"{name}={value}" for name, value in shape.items())
            raise InputError(str(self._path("gemm")), "", f"no rows with {wanted}, nor around it")
        series = {(n, k): self._series("gemm", "m", {"gemm_dtype": dtype, "n": n, "k": k}) for n, k in corners}
        rows = next(iter(series.values()))[0]
        log_us = np.zeros(len(rows))
        for n, k in corners:
            weight = _weight(grid[0], columns, n) * _weight(grid[1], depth, k)
            log_us += weight * np.log(np.interp(rows, *series[n, k]))
        beyond = max(columns / grid[0][-1], 1.0) * max(depth / grid[1][-1], 1.0)
        how = "in proportion to the largest" if beyond > 1 else "interpolated"
        how = "as the smallest" if columns < grid[0][0] or depth < grid[1][0] else how
        self.notes[f"matrix product {dtype} n={columns} k={depth}: {how}"] = None
        return rows, beyond * np.exp(log_us)

    def _gemm_sizes(self, dtype: str) -> frozenset[tuple[int, int]]:
        return _gemm_sizes(self._path("gemm"), dtype)

    def moe(self, model: ModelShape, ranks: int, distribution: str, dtype: str = "bfloat16", tensor: int = 1) -> Series:
        """Return (tokens over all ranks, us of the heaviest rank) of one fused MoE layer.

        Args:
            model: shape of the model.
            ranks: expert-parallel ranks.
            distribution: ``balanced``, ``power_law_1.01`` or ``power_law_1.2``.
            dtype: of the experts, as the table names it.
            tensor: GPUs that divide each expert.
        """
        shape = {
            "moe_dtype": dtype,
            "hidden_size": model.hidden,
            "inter_size": model.moe_intermediate,
            "topk": model.top_k,
            "num_experts": model.experts,
            "moe_tp_size": tensor,
            "moe_ep_size": ranks,
            "distribution": distribution,
        }
        try:
            return self._series("moe", "num_tokens", shape)
        except InputError as error:
            if not error.problem.startswith("no rows"):
                raise
            raise InputError(error.source, "", f"{error.problem}; {self._moe_allowed(shape)}") from None

    def _moe_allowed(self, shape: Mapping[str, Any]) -> str:
        """Say which models the table holds, or of this model which precisions and layouts."""
        sizes = ("hidden_size", "inter_size", "topk", "num_experts")
        layout = ("moe_dtype", "moe_tp_size", "moe_ep_size")
        rows = read_rows(self._path("moe"), (*sizes, *layout))
        same = [row for row in rows if all(row[name] == shape[name] for name in sizes)]
        names = layout if same else sizes
        found = sorted({tuple(row[name] for name in names) for row in same or rows})
        listed = ", ".join("/".join(str(value) for value in values) for values in found)
        return f"allowed {'/'.join(names)}: {listed}"

    def all_reduce(self, ranks: int) -> Series:
        """Return (message bytes, us) of vLLM's custom all-reduce in a CUDA graph."""
        shape = {"num_gpus": ranks, "allreduce_dtype": "bfloat16", "backend": "vllm_graph"}
        return self._series("custom_allreduce", "message_size", shape)

    def attention(self, model: ModelShape, kv: str = "bfloat16") -> AttentionRows:
        """Return the prefill (from an empty context) and decode rows of the model's attention shape.

        Args:
            model: shape of the model.
            kv: number format of the KV cache, as the table names it.
        """
        shape = {
            "num_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "kv_cache_dtype": kv,
            "window_size": 0,
        }
        prefill = self._read("context_attention", ("batch_size", "isl", "latency"), shape)
        batch, length = prefill["batch_size"], prefill["isl"]
        decode = self._read("generation_attention", ("batch_size", "step", "latency"), shape)
        sequences, context = decode["batch_size"], decode["step"] + 1
        return AttentionRows(
            sequences=np.concatenate((batch, sequences)),
            tokens=np.concatenate((batch * length, sequences)),
            pairs=np.concatenate((batch * length * (length + 1) / 2, np.zeros(len(sequences)))),
            context=np.concatenate((np.zeros(len(batch)), sequences * context)),
            us=np.concatenate((prefill["latency"], decode["latency"])) * 1e3,
        )

    def _series(self, table: str, key: str, shape: Mapping[str, Any]) -> Series:
        """Latency in us against one column; the median where a shape was measured more than once."""
        rows = self._read(table, (key, "latency"), shape)
        points = np.unique(rows[key])
        us = [1e3 * float(np.median(rows["latency"][rows[key] == point])) for point in points]
        return points, np.array(us)

    def _read(self, table: str, columns: tuple[str, ...], shape: Mapping[str, Any]) -> dict[str, FloatArray]:
        path = self._path(table)
        arrays = read_parquet(path, columns, shape)
        latency = arrays["latency"]
        if not (np.isfinite(latency) & (latency > 0)).all():
            wanted = ", ".join(f"{name}={value}" for name, value in shape.items())
            raise InputError(str(path), "latency", f"not finite and positive in rows with {wanted}")
        return arrays

    def _path(self, table: str) -> Path:
        prefix = self.moe_prefix if table == "moe" and self.moe_prefix else self.prefix
        return self.folder / f"{prefix}_{table}_perf.parquet"


@lru_cache(maxsize=8)
def _gemm_sizes(path: Path, dtype: str) -> frozenset[tuple[int, int]]:
    rows = read_parquet(path, ("n", "k"), {"gemm_dtype": dtype})
    return frozenset((int(n), int(k)) for n, k in zip(rows["n"], rows["k"], strict=True))


def _around(grid: list[int], value: int) -> tuple[int, ...]:
    """Return the measured sizes next to a value: itself, the two around it, or the one at the end of the grid."""
    below, above = [size for size in grid if size <= value][-1:], [size for size in grid if size >= value][:1]
    return tuple(dict.fromkeys(below + above))


def _weight(grid: list[int], value: int, size: int) -> float:
    """Return the share of a measured size in the interpolation at a value."""
    around = _around(grid, value)
    if len(around) == 1:
        return 1.0
    share = float(np.log(value / around[0]) / np.log(around[1] / around[0]))
    return share if size == around[1] else 1 - share


def read_parquet(path: Path, columns: tuple[str, ...], shape: Mapping[str, Any]) -> dict[str, FloatArray]:
    """Return columns of the rows whose other columns have the values of ``shape``.

    Raises:
        InputError: no such file, no such column, or no such row.
    """
    parquet = _parquet()
    if not path.is_file():
        raise InputError(str(path), "", "no such file")
    try:
        known = parquet.read_schema(path).names
        for name in (*columns, *shape):
            if name not in known:
                raise InputError(str(path), name, f"missing column; found: {', '.join(known)}")
        filters = [(name, "=", value) for name, value in shape.items()]
        rows = parquet.read_table(path, columns=list(columns), filters=filters or None)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these two
        raise InputError(str(path), "", f"cannot be read: {' '.join(str(error).split())}") from None
    wanted = ", ".join(f"{name}={value}" for name, value in shape.items())
    if not rows.num_rows:
        raise InputError(str(path), "", f"no rows with {wanted}" if wanted else "no rows")
    return {name: rows[name].to_numpy().astype(np.float64) for name in columns}


def _parquet() -> Any:
    try:
        return import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(
            "pyarrow", "", "not installed; the kernel tables are Parquet: pip install 'pyarrow>=18'"
        ) from None


def read_rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return columns of all rows, of any type.

    Raises:
        InputError: no such file or column.
    """
    parquet = _parquet()
    if not path.is_file():
        raise InputError(str(path), "", "no such file")
    try:
        known = parquet.read_schema(path).names
        missing = [name for name in columns if name not in known]
        rows = [] if missing else parquet.read_table(path, columns=list(columns)).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(str(path), "", f"cannot be read: {' '.join(str(error).split())}") from None
    if missing:
        raise InputError(str(path), missing[0], f"missing column; found: {', '.join(known)}")
    return list(rows)
