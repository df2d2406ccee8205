"""A small MoE model of random weights, as a folder that vLLM serves: mechanics without a download.

Qwen3-MoE with 4 layers, 16 experts of which 2 are chosen, hidden size 256: 7.2 million parameters. The weights are
random but real, so that each layer routes in its own way (vLLM's dummy weights are the same in all layers). The
tokenizer is byte-level, a token per byte.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

LAYERS, EXPERTS, TOP_K = 4, 16, 2
HIDDEN, HEADS, KV_HEADS, HEAD, EXPERT_HIDDEN = 256, 4, 2, 64, 128
END_TOKEN = "<|endoftext|>"
VOCABULARY = 257

_CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "


def write_tiny_moe(folder: Path, seed: int = 0) -> Path:
    """Write the model unless it is there already; another process that reads it never sees a half of it.

    Args:
        folder: its folder.
        seed: seed of the weights.
    """
    done = folder / "model.safetensors"
    if done.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("config.json", _config()),
        ("tokenizer.json", _tokenizer()),
        ("tokenizer_config.json", _tokenizer_config()),
        ("generation_config.json", {"eos_token_id": VOCABULARY - 1}),
    ):
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial = folder / f".{os.getpid()}.safetensors"
    save_file(_weights(seed), partial, {"format": "pt"})
    partial.replace(done)
    return folder


def _config() -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "moe_intermediate_size": EXPERT_HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "eos_token_id": VOCABULARY - 1,
        "bos_token_id": VOCABULARY - 1,
    }


def _tokenizer() -> dict[str, Any]:
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": VOCABULARY - 1,
                "content": END_TOKEN,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary | {END_TOKEN: VOCABULARY - 1}, "merges": []},
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TOKEN,
        "bos_token": END_TOKEN,
        "pad_token": END_TOKEN,
        "model_max_length": 8192,
        "chat_template": _CHAT_TEMPLATE,
    }


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols, extra = {byte: chr(byte) for byte in printable}, 0
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(256 + extra)
            extra += 1
    return [symbols[byte] for byte in range(256)]


def _weights(seed: int) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> npt.NDArray[np.float32]:
        return np.asarray(rng.standard_normal((rows, columns)) * scale / np.sqrt(columns), dtype=np.float32)

    tensors: dict[str, npt.NDArray[np.float32]] = {
        "model.embed_tokens.weight": rng.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {
            f"{prefix}input_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{prefix}post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{prefix}self_attn.q_proj.weight": matrix(HEADS * HEAD, HIDDEN),
            f"{prefix}self_attn.k_proj.weight": matrix(KV_HEADS * HEAD, HIDDEN),
            f"{prefix}self_attn.v_proj.weight": matrix(KV_HEADS * HEAD, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD),
            f"{prefix}self_attn.q_norm.weight": np.ones(HEAD, np.float32),
            f"{prefix}self_attn.k_norm.weight": np.ones(HEAD, np.float32),
            f"{prefix}mlp.gate.weight": matrix(EXPERTS, HIDDEN, 2.0),
        }
        for expert in range(EXPERTS):
            name = f"{prefix}mlp.experts.{expert}."
            tensors |= {
                f"{name}gate_proj.weight": matrix(EXPERT_HIDDEN, HIDDEN),
                f"{name}up_proj.weight": matrix(EXPERT_HIDDEN, HIDDEN),
                f"{name}down_proj.weight": matrix(HIDDEN, EXPERT_HIDDEN),
            }
    return tensors
