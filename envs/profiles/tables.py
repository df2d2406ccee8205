"""Reading the public kernel tables of NVIDIA's aiconfigurator (Apache-2.0): latency per kernel and shape, in ms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from servegym.envs.profiles.hardware import ModelShape
from servegym.errors import InputError

FloatArray = npt.NDArray[np.float64]
Series = tuple[FloatArray, FloatArray]


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
    """

    folder: Path
    prefix: str

    def gemm(self, columns: int, depth: int) -> Series:
        """Return (rows, us) of a bfloat16 matrix product ``rows x depth`` by ``depth x columns``."""
        return self._series("gemm", "m", {"gemm_dtype": "bfloat16", "n": columns, "k": depth})

    def moe(self, model: ModelShape, ranks: int, distribution: str) -> Series:
        """Return (tokens over all ranks, us of the heaviest rank) of one fused bfloat16 MoE layer.

        Args:
            model: shape of the model.
            ranks: expert-parallel ranks.
            distribution: ``balanced``, ``power_law_1.01`` or ``power_law_1.2``.
        """
        shape = {
            "moe_dtype": "bfloat16",
            "hidden_size": model.hidden,
            "inter_size": model.moe_intermediate,
            "topk": model.top_k,
            "num_experts": model.experts,
            "moe_tp_size": 1,
            "moe_ep_size": ranks,
            "distribution": distribution,
        }
        return self._series("moe", "num_tokens", shape)

    def all_reduce(self, ranks: int) -> Series:
        """Return (message bytes, us) of vLLM's custom all-reduce in a CUDA graph."""
        shape = {"num_gpus": ranks, "allreduce_dtype": "bfloat16", "backend": "vllm_graph"}
        return self._series("custom_allreduce", "message_size", shape)

    def attention(self, model: ModelShape) -> AttentionRows:
        """Return the prefill (from an empty context) and decode rows of the model's attention shape."""
        shape = {
            "num_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "kv_cache_dtype": "bfloat16",
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
        path = self.folder / f"{self.prefix}_{table}_perf.parquet"
        arrays = read_parquet(path, columns, shape)
        latency = arrays["latency"]
        if not (np.isfinite(latency) & (latency > 0)).all():
            wanted = ", ".join(f"{name}={value}" for name, value in shape.items())
            raise InputError(str(path), "latency", f"not finite and positive in rows with {wanted}")
        return arrays


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
