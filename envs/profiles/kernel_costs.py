"""Step costs of an MoE model as sums of measured kernels over its layers; what no table holds is modelled here.

Measured, from the tables: the projections (QKV, output, router), the fused MoE layer, attention in prefill and
decode, and the all-reduce. Modelled: normalisation, rotary embedding and top-k by memory bandwidth, the lm_head by the
widest measured product, sampling by memory bandwidth, and the host's share of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from servegym.envs.profiles.hardware import BYTES, Gpu, ModelShape
from servegym.envs.profiles.tables import AttentionRows, FloatArray, KernelTables, Series

ELEMENTWISE_KERNELS = 5
"""Small kernels of a layer beside the measured ones: two add + RMSNorm, QK norm, rotary embedding, top-k softmax."""

ELEMENTWISE_FLOOR_US = 2.0
"""Duration of a small kernel with nothing to do, inside a CUDA graph."""

BANDWIDTH_SHARE = 0.8
"""Share of the HBM bandwidth that element-wise kernels reach, as aiconfigurator assumes."""

HOST_US = 200.0
"""Scheduling, input preparation and launch that asynchronous scheduling does not hide, per step."""

SAMPLER_PASSES = 5
"""Passes over the logits of a sequence in float32: cast, temperature, softmax, noise, arg max."""

LM_HEAD_COLUMNS = 65536
"""The widest product in the tables; the lm_head, bound by memory bandwidth alike, is scaled from it."""


@dataclass(frozen=True)
class KernelCosts:
    """Costs of one model on one GPU, in microseconds, all layers together.

    Attributes:
        model: shape of the model.
        gpu: the GPU.
        tables: its kernel tables.
        ranks: expert-parallel ranks: experts are divided, the rest is replicated between engines.
        tensor: GPUs of one engine, among the ranks: they divide attention, projections and lm_head.
    """

    model: ModelShape
    gpu: Gpu
    tables: KernelTables
    ranks: int = 1
    tensor: int = 1

    @property
    def engines(self) -> int:
        """Engines of the expert-parallel group, each with its own batch."""
        return self.ranks // self.tensor

    @cached_property
    def _shard(self) -> ModelShape:
        return self.model.shard(self.tensor)

    @cached_property
    def projections(self) -> Series:
        """(tokens, us) of QKV, output and router projection of all layers, at the tables' own row counts."""
        model = self._shard
        tokens, qkv = self.tables.gemm(model.qkv_width, model.hidden)
        total = qkv.copy()
        for columns, depth in ((model.hidden, model.heads * model.head_dim), (model.experts, model.hidden)):
            total += np.interp(tokens, *self.tables.gemm(columns, depth))
        return tokens, model.layers * total

    def elementwise(self, tokens: FloatArray) -> FloatArray:
        """Return the modelled cost of norms, rotary embedding and top-k.

        An add + RMSNorm reads and writes the hidden state and the residual, QK norm and rotary embedding read and write
        queries and keys; a kernel takes its floor plus its bytes over the bandwidth.
        """
        model = self._shard
        norms = 2 * 4 * model.hidden
        rotary = 2 * 2 * (model.heads + model.kv_heads) * model.head_dim
        us_per_token = BYTES * (norms + rotary) / self._bytes_per_us
        return model.layers * (ELEMENTWISE_KERNELS * ELEMENTWISE_FLOOR_US + us_per_token * tokens)

    @cached_property
    def _moe_balanced(self) -> Series:
        return self.tables.moe(self.model, self.ranks, "balanced")

    def moe(self, tokens: FloatArray) -> FloatArray:
        """Return the MoE cost of the mean rank when every expert is equally likely.

        The table's ``balanced`` rows deal tokens out so that no expert is shared before all are in use: ``T`` tokens
        activate ``min(E, k T)`` experts, whose weights are most of the cost of a small batch. Random tokens activate
        ``A(T) = E (1 - (1 - k / E)**T)`` in expectation, as many as ``A / k`` dealt tokens do. So the cost is the
        table's at ``A(T) / k`` tokens plus what the table adds beyond ``E / k`` tokens, where all experts are in use.

        Args:
            tokens: tokens over all ranks.
        """
        full = self.model.experts / self.model.top_k
        dealt = full * (1 - (1 - 1 / full) ** tokens)
        cost = np.interp(dealt, *self._moe_balanced) + np.interp(np.maximum(tokens, full), *self._moe_balanced)
        return np.asarray(self.model.layers * (cost - np.interp(full, *self._moe_balanced)))

    def moe_measured(self, distribution: str) -> Series:
        """Return the table's own (tokens, us) of all layers under a load distribution."""
        tokens, us = self.tables.moe(self.model, self.ranks, distribution)
        return tokens, self.model.layers * us

    def communication(self, tokens: FloatArray) -> FloatArray:
        """Return the cost of dispatch and combine, one all-gather and one reduce-scatter of the hidden states a layer.

        Together they move what one all-reduce moves, which is measured. The message holds the tokens of all ranks,
        taken to be as many as this rank's each. The measured kernel is vLLM's custom all-reduce at every size; vLLM
        itself turns to NCCL for messages of many MiB, so the cost of a large prefill is an upper bound. Tensor parallel
        GPUs add one all-reduce a layer, after the output projection; the one after the experts is part of the combine.
        """
        if self.ranks == 1:
            return np.zeros_like(tokens)
        own = BYTES * self.model.hidden * tokens
        us = np.interp(self.engines * own, *self.tables.all_reduce(self.ranks))
        if self.tensor > 1:
            us = us + np.interp(own, *self.tables.all_reduce(self.tensor))
        return np.asarray(self.model.layers * us)

    @cached_property
    def attention(self) -> AttentionRows:
        """Attention of one layer, as measured; multiply by the layers."""
        return self.tables.attention(self._shard)

    @cached_property
    def lm_head(self) -> Series:
        """(sequences, us) of the lm_head, scaled in proportion to its columns."""
        rows, us = self.tables.gemm(LM_HEAD_COLUMNS, self.model.hidden)
        return rows, us * self.model.vocabulary / self.tensor / LM_HEAD_COLUMNS

    @property
    def sampler_us_per_sequence(self) -> float:
        """Modelled cost of sampling one token: passes over float32 logits at the bandwidth."""
        return SAMPLER_PASSES * 4 * self.model.vocabulary / self._bytes_per_us

    @property
    def _bytes_per_us(self) -> float:
        return BANDWIDTH_SHARE * self.gpu.bandwidth_bytes_per_s * 1e-6
