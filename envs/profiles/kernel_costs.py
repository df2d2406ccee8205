"""Step costs of an MoE model as sums of measured kernels over its layers; what no table holds is modelled here.

Measured, from the tables: the projections (QKV, output, router), the fused MoE layer, attention in prefill and
decode, and the all-reduce. Modelled: normalisation, rotary embedding, activation and top-k by memory bandwidth, a
router in float32 by the GPU's rate, the lm_head by the widest measured product, sampling by memory bandwidth, and the
host's share of a step; with :class:`.Serving` what an engine adds to kernels alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from servegym.envs.profiles.hardware import BYTES, PRECISIONS, Gpu, ModelShape, Precision
from servegym.envs.profiles.serving import REAL_DATA, Serving
from servegym.envs.profiles.tables import GRAPH_TOKENS, AttentionRows, FloatArray, KernelTables, Series

ELEMENTWISE_KERNELS = 5
"""Small kernels of a layer beside the measured ones: two add + RMSNorm, QK norm, rotary embedding, top-k softmax."""

ELEMENTWISE_FLOOR_US = 2.0
"""Duration of a small kernel with nothing to do, inside a CUDA graph."""

BANDWIDTH_SHARE = 0.8
"""Share of the HBM bandwidth that element-wise kernels reach, as aiconfigurator assumes."""

FLOAT32_SHARE = 0.8
"""Share of its float32 rate that a product reaches: modelled, as ``BANDWIDTH_SHARE``."""

HOST_US = 200.0
"""Scheduling, input preparation and launch that asynchronous scheduling does not hide, per step."""

SAMPLER_PASSES = 5
"""Passes over the logits of a sequence in float32: cast, temperature, softmax, noise, arg max."""

LM_HEAD_COLUMNS = 65536
"""The widest product in the tables; the lm_head, bound by memory bandwidth alike, is scaled from it."""

CUSTOM_ALL_REDUCE_BYTES = 8 << 20
"""The largest message of vLLM's custom all-reduce; larger ones go to NCCL."""

RING_SHARE = 0.8
"""Share of a link's bandwidth that NCCL's ring reaches with large messages."""


@dataclass(frozen=True)
class KernelCosts:
    """Costs of one model on one GPU, in microseconds, all layers together.

    Attributes:
        model: shape of the model.
        gpu: the GPU.
        tables: its kernel tables.
        ranks: expert-parallel ranks: experts are divided, the rest is replicated between engines.
        tensor: GPUs of one engine, among the ranks: they divide attention, projections and lm_head.
        precision: number formats of the weights.
        moe_tensor: GPUs that divide each expert, in the place of expert parallelism.
        serving: what a serving engine adds; None: the kernels alone.
    """

    model: ModelShape
    gpu: Gpu
    tables: KernelTables
    ranks: int = 1
    tensor: int = 1
    precision: Precision = PRECISIONS["bf16"]
    moe_tensor: int = 1
    serving: Serving | None = None

    @property
    def group(self) -> int:
        """GPUs that share the layers after attention."""
        return max(self.ranks * self.moe_tensor, self.tensor)

    @property
    def engines(self) -> int:
        """Engines of that group, each with its own batch."""
        return self.group // self.tensor

    @cached_property
    def _shard(self) -> ModelShape:
        return self.model.shard(self.tensor)

    @cached_property
    def projections(self) -> Series:
        """(tokens, us) of QKV, output and router projection of all layers, at the tables' own row counts."""
        model, dtype = self._shard, self.precision.gemm
        tokens, qkv = self._product(model.qkv_width, model.hidden, dtype)
        products = [self._product(model.hidden, model.heads * model.head_dim, dtype)]
        if model.experts:
            products.append(self._router)
        if model.intermediate:
            products.append(self._product(2 * model.intermediate, model.hidden, dtype))
            products.append(self._product(model.hidden, model.intermediate, dtype))
        total = qkv.copy()
        for product in products:
            total += np.interp(tokens, *product)
        return tokens, model.layers * total

    def _product(self, columns: int, depth: int, dtype: str = "bfloat16") -> Series:
        """Return (tokens, us) of a product; beyond the CUDA graphs, where it is bound by compute, with real data."""
        tokens, us = self.tables.gemm(columns, depth, dtype)
        if self.serving is None or dtype == "fp8_block":
            return tokens, us
        return tokens, np.where(tokens > GRAPH_TOKENS, REAL_DATA * us, us)

    @property
    def _router(self) -> Series:
        """(tokens, us) of the router; in float32 it takes its operations over the rate, where that is longer."""
        model = self.model
        tokens, us = self._product(model.experts, model.hidden)
        if not model.float32_router:
            return tokens, us
        rate = FLOAT32_SHARE * self.gpu.float32_flops_per_s * 1e-6
        return tokens, np.maximum(us, 2 * tokens * model.experts * model.hidden / rate)

    def elementwise(self, tokens: FloatArray) -> FloatArray:
        """Return the modelled cost of norms, rotary embedding, top-k, and the activation of dense layers.

        An add + RMSNorm reads and writes the hidden state and the residual, QK norm and rotary embedding read and write
        queries and keys. The activation reads gate and up projection and writes their product; in ``fp8`` it writes
        that format, as does one more kernel after attention. A kernel takes its floor plus bytes over bandwidth.
        """
        model = self._shard
        kernels, bytes_per_token = ELEMENTWISE_KERNELS, BYTES * 2 * 4 * model.hidden
        bytes_per_token += BYTES * 2 * 2 * (model.heads + model.kv_heads) * model.head_dim
        if model.intermediate:
            written = 1 if self.precision.gemm == "fp8" else BYTES
            kernels += 1
            bytes_per_token += (2 * BYTES + written) * model.intermediate
            if self.precision.gemm == "fp8":
                kernels += 1
                bytes_per_token += (BYTES + written) * model.heads * model.head_dim
        return model.layers * (kernels * ELEMENTWISE_FLOOR_US + bytes_per_token / self._bytes_per_us * tokens)

    def launch_wait(self, tokens: FloatArray, busy_us: FloatArray) -> FloatArray:
        """Return how long the GPU waits for the host in a step of MoE layers outside CUDA graphs.

        Args:
            tokens: of the step.
            busy_us: what its kernels take, same shape.
        """
        if self.serving is None or not self.model.experts:
            return np.zeros_like(busy_us)
        wait = np.maximum(self.model.layers * self.serving.launch_us - busy_us, 0.0)
        return np.asarray(np.where(tokens > GRAPH_TOKENS, wait, 0.0))

    @cached_property
    def _moe_balanced(self) -> Series:
        return self.tables.moe(self.model, self.ranks, "balanced", self.precision.moe, self.moe_tensor)

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
        balanced = self.model.layers * (cost - np.interp(full, *self._moe_balanced))
        if self.serving is None or self.serving.skew is None:
            return np.asarray(balanced)
        return np.asarray(np.maximum(balanced, np.interp(tokens, *self.moe_measured(self.serving.skew))))

    def moe_measured(self, distribution: str) -> Series:
        """Return the table's own (tokens, us) of all layers under a load distribution."""
        tokens, us = self.tables.moe(self.model, self.ranks, distribution, self.precision.moe, self.moe_tensor)
        return tokens, self.model.layers * us

    def communication(self, tokens: FloatArray) -> FloatArray:
        """Return the cost of dispatch and combine, one all-gather and one reduce-scatter of the hidden states a layer.

        Together they move what one all-reduce moves, which is measured. The message holds the tokens of all ranks,
        taken to be as many as this rank's each. The measured kernel is vLLM's custom all-reduce at every size; vLLM
        itself turns to NCCL for messages of many MiB, so the cost of a large prefill is an upper bound. Tensor parallel
        GPUs add one all-reduce a layer, after the output projection; the one after the experts is part of the combine.
        A norm across heads adds one of two float32 a token, and the kernel that applies it.
        """
        if self.group == 1:
            return np.zeros_like(tokens)
        own = BYTES * self.model.hidden * tokens
        us = self._all_reduce(self.engines * own, self.group)
        if self.tensor > 1:
            us = us + self._all_reduce(own, self.tensor)
            if self.model.norm_across_heads:
                us = us + self._all_reduce(8 * tokens, self.tensor) + ELEMENTWISE_FLOOR_US
        return np.asarray(self.model.layers * us)

    def _all_reduce(self, message: FloatArray, gpus: int) -> FloatArray:
        """Return us of an all-reduce of some bytes.

        vLLM leaves large messages to NCCL, whose ring sends ``2 (n - 1) / n`` of the message out of each GPU, at
        ``RING_SHARE`` of a link's one direction: modelled, since the tables hold the custom kernel alone.
        """
        table, us = self.tables.all_reduce(gpus)
        measured = np.interp(message, table, us)
        if self.serving is None:
            return np.asarray(measured)
        sent = 2 * (gpus - 1) / gpus * message
        ring = us.min() + sent / (RING_SHARE * self.gpu.link_bytes_per_s / 2 * 1e-6)
        return np.asarray(np.where(message > CUSTOM_ALL_REDUCE_BYTES, np.minimum(measured, ring), measured))

    @cached_property
    def attention(self) -> AttentionRows:
        """Attention of one layer, as measured; multiply by the layers."""
        return self.tables.attention(self._shard, self.serving.kv if self.serving else "bfloat16")

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
