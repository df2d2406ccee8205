"""Limits of an engine on a GPU, as vLLM would set them: token budget, batch, KV blocks."""

from __future__ import annotations

from servegym.envs.profiles.hardware import Gpu, ModelShape, Precision, kv_blocks
from servegym.envs.profiles.profile import EngineLimits

BLOCK_SIZE = 16
MAX_NUM_SEQS = 256


def engine_limits(
    model: ModelShape,
    gpu: Gpu,
    *,
    ranks: int,
    tensor: int = 1,
    precision: Precision | None = None,
    kv: str = "bfloat16",
) -> EngineLimits:
    """Return the limits of one engine; ``num_blocks`` can come out too small to use. Arguments as ``kv_blocks``."""
    return EngineLimits(
        block_size=BLOCK_SIZE,
        num_blocks=max(
            1,
            kv_blocks(
                model,
                gpu,
                ranks=ranks,
                block_size=BLOCK_SIZE,
                max_num_batched_tokens=gpu.max_num_batched_tokens,
                max_num_seqs=MAX_NUM_SEQS,
                utilization=gpu.utilization,
                tensor=tensor,
                precision=precision,
                kv=kv,
            ),
        ),
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=gpu.max_num_batched_tokens,
        max_model_len=model.max_position_embeddings,
    )
