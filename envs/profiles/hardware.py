"""Shapes of models and the memory of GPUs: weights, bytes of KV cache per token, KV blocks that fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

BYTES = 2
"""Bytes of a bfloat16: weights, activations and KV cache."""

KV_BYTES = {"bfloat16": BYTES, "fp8": 1}
"""Bytes of a value in the KV cache, by its format in the tables."""

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Dimensions of a decoder with grouped-query attention, as in its ``config.json``.

    All layers are alike: MoE layers, or dense ones of width ``intermediate`` where ``experts`` is 0.
    ``float32_router``: the router computes in float32, without tensor cores. ``norm_across_heads``: queries and keys
    are normalised over all heads, for which tensor-parallel GPUs exchange the sums of squares.
    """

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
    intermediate: int = 0
    float32_router: bool = False
    norm_across_heads: bool = False

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
        layer = attention + self.hidden * self.experts + 3 * self.hidden * self.intermediate
        return 2 * self.vocabulary * self.hidden + self.layers * layer

    def shard(self, tensor: int) -> ModelShape:
        """Return the attention of one of ``tensor`` tensor-parallel GPUs: its share of the heads.

        A GPU keeps at least one key-value head: with fewer heads than GPUs they are replicated.

        >>> MODELS["qwen3-30b-a3b"].shard(2).kv_heads
        2
        """
        kv_heads = max(self.kv_heads // tensor, 1)
        return replace(self, heads=self.heads // tensor, kv_heads=kv_heads, intermediate=self.intermediate // tensor)

    def weight_bytes(self, ranks: int = 1, tensor: int = 1, precision: Precision | None = None) -> int:
        """Bytes of weights on one of ``ranks`` GPUs that divide the experts, ``tensor`` of which share the others.

        >>> MODELS["qwen3-30b-a3b"].weight_bytes()
        61063823360
        """
        precision = precision or PRECISIONS["bf16"]
        embeddings = 2 * self.vocabulary * self.hidden
        others = precision.gemm_bytes * (self.other_parameters - embeddings) + BYTES * embeddings
        return int(others / tensor + precision.moe_bytes * self.expert_parameters / ranks)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache per token: keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES


@dataclass(frozen=True, slots=True)
class Precision:
    """Number formats of a model's matrix products; activations, KV cache, router, lm_head and embedding are bfloat16.

    Attributes:
        gemm: ``gemm_dtype`` of the kernel tables.
        moe: ``moe_dtype`` of the kernel tables.
        gemm_bytes: bytes of a weight of attention and dense layers; the scales of a block are left out.
        moe_bytes: bytes of a weight of an expert.
    """

    gemm: str
    moe: str
    gemm_bytes: float
    moe_bytes: float


PRECISIONS = {
    "bf16": Precision("bfloat16", "bfloat16", 2, 2),
    "fp8": Precision("fp8", "fp8", 1, 1),
    "fp8_block": Precision("fp8_block", "fp8_block", 1, 1),
    "int4": Precision("bfloat16", "int4_wo", 2, 0.5),
    "mxfp4": Precision("bfloat16", "w4a16_mxfp4", 2, 0.5),
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as profiles call it.
        tables: prefix of the kernel table files measured on it; None: none here, those of ``H200`` are scaled.
        memory_bytes: what CUDA reports as total memory.
        bandwidth_bytes_per_s: HBM bandwidth of the data sheet.
        flops_per_s: dense bfloat16 rate of the data sheet.
        float32_flops_per_s: float32 rate of the data sheet, without tensor cores.
        link_bytes_per_s: NVLink bandwidth of the data sheet, both directions together.
        max_num_batched_tokens: default of vLLM's API server on this GPU.
        utilization: default ``gpu_memory_utilization`` of the vLLM that the profile stands for.
    """

    name: str
    tables: str | None
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: float
    float32_flops_per_s: float
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
    ),
    "qwen3-235b-a22b": ModelShape("Qwen/Qwen3-235B-A22B", 94, 4096, 64, 4, 128, 128, 8, 1536, 151936, 40960),
    # vllm/model_executor/models/minimax_m2.py: router in float32, MiniMaxText01RMSNormTP over all heads.
    "minimax-m2.5": ModelShape(
        "MiniMaxAI/MiniMax-M2.5",
        62,
        3072,
        48,
        8,
        128,
        256,
        8,
        1536,
        200064,
        196608,
        float32_router=True,
        norm_across_heads=True,
    ),
    "mixtral-8x7b": ModelShape("mistralai/Mixtral-8x7B-v0.1", 32, 4096, 32, 8, 128, 8, 2, 14336, 32000, 32768),
}
"""MoE models by the name that ``servegym profile build --model`` takes."""

# Sold as 141 GB; CUDA reports 139.8 GiB of it.
H200 = Gpu("NVIDIA H200", "aic_h200_vllm0.24", int(139.8 * GIB), 4.8e12, 989e12, 67e12, 900e9, 8192, 0.92)
H100 = Gpu("NVIDIA H100", None, int(79.1 * GIB), 3.35e12, 989e12, 67e12, 900e9, 8192, 0.9)
A100 = Gpu("NVIDIA A100", None, int(79.15 * GIB), 2.039e12, 312e12, 19.5e12, 600e9, 2048, 0.9)
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
    precision: Precision | None = None,
    kv: str = "bfloat16",
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
        precision: of the weights; default: bfloat16.
        kv: number format of the KV cache, a key of ``KV_BYTES``.
    """
    experts = BYTES * max_num_batched_tokens * model.top_k * (model.hidden + 3 * model.moe_intermediate)
    logits = 2 * 4 * max_num_seqs * model.vocabulary
    free = utilization * gpu.memory_bytes - model.weight_bytes(ranks, tensor, precision) - experts - logits
    free -= RESERVE_BYTES
    return int(free // (block_size * model.shard(tensor).kv_bytes_per_token * KV_BYTES[kv] // BYTES))
