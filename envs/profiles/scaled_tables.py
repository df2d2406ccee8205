"""Kernel tables of a GPU that was not measured: another GPU's, scaled kernel by kernel with a roofline.

A measured latency ``t`` becomes ``f + (t - f) * r`` with ``f`` the launch floor, which no hardware ratio changes, and
``r`` the ratio of the two GPUs' roofline times of that very shape::

    roofline = max(bytes / HBM bandwidth, floating point operations / dense bfloat16 rate)

so that a kernel bound by memory scales by bandwidth, one bound by compute by the rate, and one that changes its regime
by both. The kernel reaches the same share of the roofline on either GPU: an assumption, as is that the newer GPU's
kernels (FlashAttention 3) have equals on an older one. An all-reduce keeps its latency and scales the rest by the
bandwidth of the links.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from servegym.envs.profiles.hardware import BYTES, KV_BYTES, Gpu, ModelShape
from servegym.envs.profiles.tables import AttentionRows, FloatArray, KernelTables, Series

LAUNCH_FLOOR_US = 2.0
"""Part of every kernel's latency that no faster memory shortens, inside a CUDA graph."""


@dataclass(frozen=True, slots=True)
class ScaledTables(KernelTables):
    """Tables of ``measured`` as ``target`` would have them, in bfloat16.

    Attributes:
        measured: the GPU of the files.
        target: the GPU that is modelled.
    """

    measured: Gpu
    target: Gpu

    def gemm(self, columns: int, depth: int, dtype: str = "bfloat16") -> Series:
        """Return (rows, us) of a matrix product, scaled."""
        rows, us = KernelTables.gemm(self, columns, depth, dtype)
        moved = BYTES * (rows * depth + depth * columns + rows * columns)
        return rows, self._scale(us, moved, 2 * rows * depth * columns)

    def moe(self, model: ModelShape, ranks: int, distribution: str, dtype: str = "bfloat16", tensor: int = 1) -> Series:
        """Return (tokens over all ranks, us of the heaviest rank) of one MoE layer, scaled.

        The bytes are the weights of the experts that dealt tokens activate on a rank, and the tokens in and out.
        """
        tokens, us = KernelTables.moe(self, model, ranks, distribution, dtype, tensor)
        routed = model.top_k * tokens / ranks
        weights = 3 * model.hidden * model.moe_intermediate / tensor
        active = np.minimum(model.experts / ranks, routed)
        return tokens, self._scale(us, BYTES * (active * weights + 2 * routed * model.hidden), 2 * routed * weights)

    def all_reduce(self, ranks: int) -> Series:
        """Return (message bytes, us) of an all-reduce: the smallest message's latency is kept."""
        message, us = KernelTables.all_reduce(self, ranks)
        ratio = self.measured.link_bytes_per_s / self.target.link_bytes_per_s
        return message, us.min() + (us - us.min()) * ratio

    def attention(self, model: ModelShape, kv: str = "bfloat16") -> AttentionRows:
        """Return prefill and decode attention, scaled."""
        rows = KernelTables.attention(self, model, kv)
        cache = model.kv_bytes_per_token / model.layers * KV_BYTES[kv] / BYTES
        width = BYTES * 2 * model.heads * model.head_dim
        moved = cache * (rows.context + np.where(rows.pairs > 0, rows.tokens, 0)) + width * rows.tokens
        us = self._scale(rows.us, moved, 4 * model.heads * model.head_dim * (rows.pairs + rows.context))
        return AttentionRows(rows.sequences, rows.tokens, rows.pairs, rows.context, us)

    def _scale(self, us: FloatArray, moved: FloatArray, flops: FloatArray) -> FloatArray:
        floor = np.minimum(us, LAUNCH_FLOOR_US)
        return floor + (us - floor) * self.target.roofline_s(moved, flops) / self.measured.roofline_s(moved, flops)
