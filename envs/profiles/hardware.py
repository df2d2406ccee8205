"""Shapes of models and the memory of GPUs: weights, bytes of KV cache per token, KV blocks that fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

BYTES = 2
"""Bytes of a bfloat16: weights, activations and KV cache."""

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Dimensions of a decoder with MoE layers throughout and grouped-query attention, as in its ``config.json``."""

    model: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    moe_intermediate: int
    vocabulary: int
    max_position_embeddings: int

    @property
    def qkv_width(self) -> int:
        """Columns of the fused query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts: gate, up and down projection each."""
        return self.layers * self.experts * 3 * self.hidden * self.moe_intermediate

    @property
    def other_parameters(self) -> int:
        """Parameters that expert parallelism replicates: embedding, lm_head, attention, routers (norms left out)."""
        attention = self.hidden * self.qkv_width + self.heads * self.head_dim * self.hidden
        return 2 * self.vocabulary * self.hidden + self.layers * (attention + self.hidden * self.experts)

    def shard(self, tensor: int) -> ModelShape:
        """Return the attention of one of ``tensor`` tensor-parallel GPUs: its share of the heads.

        >>> MODELS["qwen3-30b-a3b"].shard(2).kv_heads
        2
        """
        return replace(self, heads=self.heads // tensor, kv_heads=self.kv_heads // tensor)

    def weight_bytes(self, ranks: int = 1, tensor: int = 1) -> int:
        """Bytes of weights on one of ``ranks`` expert-parallel ranks, ``tensor`` of which share the other weights.

        >>> MODELS["qwen3-30b-a3b"].weight_bytes()
        61063823360
        """
        return BYTES * (self.other_parameters // tensor + self.expert_parameters // ranks)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache per token: keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as profiles call it.
    tables: prefix of the kernel table files measured on it; None: none here, those of ``H200`` are scaled.
        memory_bytes: what CUDA reports as total memory.
        bandwidth_bytes_per_s: HBM bandwidth of the data sheet.
        flops_per_s: dense bfloat16 rate of the data sheet.
        link_bytes_per_s: NVLink bandwidth of the data sheet, both directions together.
        max_num_batched_tokens: default of vLLM's API server on this GPU.
        utilization: default ``gpu_memory_utilization`` of the vLLM that the profile stands for.
    """

    name: str
    tables: str | None
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float
    max_num_batched_tokens: int
    utilization: float

    def roofline_s(self, moved: npt.NDArray[np.float64], flops: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the least time to move bytes through HBM and do floating point operations, seconds."""
        return np.maximum(moved / self.bandwidth_bytes_per_s, flops / self.flops_per_s)


MODELS = {
    "qwen3-30b-a3b": ModelShape(
        model="Qwen/Qwen3-30B-A3B",
        layers=48,
        hidden=2048,
        heads=32,
        kv_heads=4,
        head_dim=128,
        experts=128,
        top_k=8,
        moe_intermediate=768,
        vocabulary=151936,
        max_position_embeddings=40960,
    )
}

# Sold as 141 GB; CUDA reports 139.8 GiB of it.
H200 = Gpu("NVIDIA H200", "aic_h200_vllm0.24", int(139.8 * GIB), 4.8e12, 989e12, 900e9, 8192, 0.92)
H100 = Gpu("NVIDIA H100", None, int(79.1 * GIB), 3.35e12, 989e12, 900e9, 8192, 0.9)
A100 = Gpu("NVIDIA A100", None, int(79.15 * GIB), 2.039e12, 312e12, 600e9, 2048, 0.9)
"""H100 and A100 are the SXM modules of 80 GB."""

GPUS = {"h200": H200, "h100": H100, "a100": A100}

RESERVE_BYTES = 2 * GIB
"""CUDA context, workspaces of libraries, CUDA graphs: modelled."""


def kv_blocks(
    model: ModelShape,
    gpu: Gpu,
    *,
    ranks: int,
    block_size: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    utilization: float,
    tensor: int = 1,
) -> int:
    """Return the KV blocks that fit one GPU, as vLLM counts them (``num_gpu_blocks``).

    Formula::

        (utilization * memory - weights - activations - reserve) // (block_size * kv_bytes_per_token)

    with ``activations = 2 B * max_num_batched_tokens * top_k * (hidden + 3 * moe_intermediate)``, the buffers of the
    fused MoE kernel at a full budget (gate and up, their product, the outputs of the experts), plus
    ``2 * 4 B * max_num_seqs * vocabulary``, the logits and probabilities in float32. vLLM measures the activations in
    a profiling run; here they are modelled.

    Args:
        model: shape of the model.
        gpu: the GPU.
        ranks: expert-parallel ranks; the experts are divided among them, everything else is replicated.
        block_size: tokens per KV block.
        max_num_batched_tokens: token budget of a step.
        max_num_seqs: largest running batch.
        utilization: vLLM's ``gpu_memory_utilization``.
        tensor: GPUs of an engine, which divide attention, embeddings and the KV cache.
    """
    experts = BYTES * max_num_batched_tokens * model.top_k * (model.hidden + 3 * model.moe_intermediate)
    logits = 2 * 4 * max_num_seqs * model.vocabulary
    free = utilization * gpu.memory_bytes - model.weight_bytes(ranks, tensor) - experts - logits - RESERVE_BYTES
    return int(free // (block_size * model.shard(tensor).kv_bytes_per_token))
