"""Schedule traces of the real vLLM 0.32 scheduler, without a model: the truth that the engine kernel is held to.

    python vllm_schedule.py SPECS.json

runs in an environment that has vLLM (`requirements-vllm-cpu.txt`) and needs neither servegym nor a network. SPECS.json
holds one spec or a list of specs, as `servegym schedule-trace` takes them; `-` reads standard input. Each step is
printed as one JSON object a line, `{"step": 0, "scheduled": {"r0": 270}, "preempted": [], "free_blocks": 382}`; for a
list of specs each line also carries `"spec"`, the index in the list. A bad spec ends the program with exit code 2.

Spec
----
    max_num_seqs, max_num_batched_tokens, max_model_len, block_size: as in vLLM (which wants budget >= max_num_seqs)
    num_blocks: as vLLM's `KVCacheConfig.num_blocks`, so it counts the null block, which holds no tokens: an idle engine
        has `num_blocks - 1` free blocks
    policy: "fcfs" or "priority" (smaller value first);  prefix_caching: bool
    long_prefill_token_threshold: optional, 0 (no limit) by default
    async_scheduling: optional, false by default
    requests: [{id, arrival_step, prompt: [token ids], output_len, priority, output: optional [token ids]}]

Rules
-----
- Steps count from 0. A request joins before the step with its `arrival_step`; those of one step join in list order.
- `arrival_time` is `arrival_step`: under "priority" the waiting queue is ordered by (priority, arrival_step, id), ids
  compared as strings, and the victim of a preemption is the *first* running request with the largest
  (priority, arrival_step).
- `scheduled` lists tokens in the order in which requests were scheduled, `preempted` in the order of preemption;
  `free_blocks` is read after `schedule()` and before the step's results come back, so requests that finish in this step
  still hold their blocks. Evictable cached blocks count as free.
- Whoever has all tokens computed at the end of a step gets one sampled token: `output[i]` where given (as a later turn
  of the conversation needs it), else a token id that occurs nowhere else. End-of-sequence is ignored: a request ends
  after `output_len` tokens, or when prompt and output reach `max_model_len`.
- Steps with nothing to do are printed too; the last line is the step that finishes the last request.
- With `async_scheduling` vLLM's `AsyncScheduler` schedules as `EngineCore.step_with_batch_queue` lets it: what a step
  computes comes back after the next step is scheduled. The last line is the step scheduled before the last results.

Settings in force (defaults of vLLM 0.32)
-----------------------------------------
Chunked prefill on; `scheduler_reserve_full_isl` on (the whole sequence so far must fit into the free blocks before
a waiting request is admitted); `watermark` 0; `max_num_active_seqs` = `max_num_seqs`; `max_num_scheduled_tokens` =
`max_num_batched_tokens`; `long_prefill_token_threshold_adaptive` off; `prefill_schedule_interval` 1; sha256 block
hashes; one full-attention KV cache group whose hash block is the block; no speculative decoding, LoRA, connector,
encoder or pipeline. vLLM 0.32 has no limit on concurrent partial prefills.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read by huggingface_hub at import: the model is a local folder, nothing is to be looked up.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

# Remarks on unusual sizes, one per spec.
logging.getLogger("vllm").setLevel(logging.ERROR)

Spec = dict[str, Any]

ENGINE_FIELDS = {
    "max_num_seqs",
    "max_num_batched_tokens",
    "num_blocks",
    "block_size",
    "max_model_len",
    "policy",
    "prefix_caching",
    "requests",
}
REQUEST_FIELDS = {"id", "arrival_step", "prompt", "output_len", "priority"}

# Sampled tokens of request i without explicit `output` are FIRST_SAMPLED_TOKEN + i * TOKENS_PER_REQUEST + position.
FIRST_SAMPLED_TOKEN = 1 << 40
TOKENS_PER_REQUEST = 1 << 24

# The scheduler asks a model only for its kind and length limit; the sizes are arbitrary.
TINY_MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "max_position_embeddings": 1 << 30,
}


if "SERVEGYM_POLICY" in os.environ:  # a policy file: our schedulers in place of vLLM's own
    from servegym.engine_bridge.vllm_plugin.scheduler import PolicyAsyncScheduler as Ahead
    from servegym.engine_bridge.vllm_plugin.scheduler import PolicyScheduler as Base
else:
    Ahead, Base = AsyncScheduler, Scheduler


class _Recording:
    """Mixed in: a record of the order of preemptions (vLLM's own output holds an unordered set)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.preempted: list[str] = []

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.preempted.append(request.request_id)


class RecordingScheduler(_Recording, Base):
    """vLLM's scheduler."""


class RecordingAsyncScheduler(_Recording, Ahead):
    """vLLM's scheduler one step ahead."""


def make_model_config() -> ModelConfig:
    """A model configuration that needs no weights, tokenizer or network; built once, as it takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(TINY_MODEL))
        return ModelConfig(model=folder, skip_tokenizer_init=True, dtype="float32")


def check_spec(spec: Spec) -> None:
    """Raise `ValueError` for what vLLM's front end refuses and what would never finish: the scheduler trusts both."""
    missing = ENGINE_FIELDS - spec.keys()
    unknown = spec.keys() - ENGINE_FIELDS - {"long_prefill_token_threshold", "async_scheduling"}
    if missing or unknown:
        raise ValueError(f"missing fields {sorted(missing)}, unknown fields {sorted(unknown)}")
    ids = [request["id"] for request in spec["requests"]]
    if len(set(ids)) != len(ids):
        raise ValueError("request ids are not unique")
    for request in spec["requests"]:
        missing, unknown = REQUEST_FIELDS - request.keys(), request.keys() - REQUEST_FIELDS - {"output"}
        if missing or unknown:
            raise ValueError(f"request {request['id']}: missing {sorted(missing)}, unknown {sorted(unknown)}")
        prompt_len, output_len = len(request["prompt"]), request["output_len"]
        if not 1 <= prompt_len < spec["max_model_len"]:
            raise ValueError(f"request {request['id']}: prompt must have 1 to max_model_len - 1 tokens")
        if not 1 <= output_len < TOKENS_PER_REQUEST or len(request.get("output", range(output_len))) != output_len:
            raise ValueError(f"request {request['id']}: output_len must be positive and the length of output")
        # The last sampled token is never computed, so it needs no slot.
        stored_tokens = min(prompt_len + output_len, spec["max_model_len"]) - 1
        if -(-stored_tokens // spec["block_size"]) > spec["num_blocks"] - 1:
            raise ValueError(f"request {request['id']}: does not fit into the KV cache, even alone")


def make_scheduler(spec: Spec, model_config: ModelConfig) -> RecordingScheduler | RecordingAsyncScheduler:
    """The scheduler of one engine, with one full-attention KV cache group."""
    model_config.max_model_len = spec["max_model_len"]
    vllm_config = VllmConfig(
        model_config=model_config,
        scheduler_config=SchedulerConfig(
            max_num_seqs=spec["max_num_seqs"],
            max_num_batched_tokens=spec["max_num_batched_tokens"],
            max_model_len=spec["max_model_len"],
            long_prefill_token_threshold=spec.get("long_prefill_token_threshold", 0),
            policy=spec["policy"],
            is_encoder_decoder=False,
            async_scheduling=False,
        ),
        cache_config=CacheConfig(block_size=spec["block_size"], enable_prefix_caching=spec["prefix_caching"]),
    )
    # A platform may override what it was given; then this would be another engine than the one asked for.
    if (
        vllm_config.cache_config.enable_prefix_caching != spec["prefix_caching"]
        or vllm_config.scheduler_config.async_scheduling
        or not vllm_config.scheduler_config.enable_chunked_prefill
        or vllm_config.model_config.max_model_len != spec["max_model_len"]
    ):
        raise RuntimeError("vLLM changed the configuration")
    ahead = spec.get("async_scheduling", False)
    vllm_config.scheduler_config.async_scheduling = ahead  # after the checks: vLLM's platform for the CPU resets it
    vllm_config.cache_config.num_gpu_blocks = spec["num_blocks"]
    register_all_kvcache_specs(vllm_config)
    attention = FullAttentionSpec(block_size=spec["block_size"], num_kv_heads=1, head_size=1, dtype=torch.float32)
    return (RecordingAsyncScheduler if ahead else RecordingScheduler)(
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(
            num_blocks=spec["num_blocks"],
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], attention)],
        ),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=spec["block_size"],
    )


def computed(scheduler: Scheduler, output: SchedulerOutput) -> set[str]:
    """The requests of a step that has just been scheduled whose tokens are all computed by it."""
    return {name for name in output.num_scheduled_tokens if not scheduler.requests[name].is_prefill_chunk}


def sample(
    scheduler: Scheduler, output: SchedulerOutput, done: set[str], tokens: dict[str, list[int]]
) -> ModelRunnerOutput:
    """What a model runner returns: one token for each request whose tokens are all computed, none for the others."""
    request_ids = list(output.num_scheduled_tokens)
    sampled = [
        [tokens[name][scheduler.requests[name].num_output_tokens]] if name in done else [] for name in request_ids
    ]
    return ModelRunnerOutput(
        req_ids=request_ids,
        req_id_to_index={request_id: index for index, request_id in enumerate(request_ids)},
        sampled_token_ids=sampled,
    )


def trace(spec: Spec, model_config: ModelConfig) -> Iterator[dict[str, Any]]:
    """Yield what each step of one engine schedules, preempts and leaves free, until the last request is finished."""
    check_spec(spec)
    scheduler = make_scheduler(spec, model_config)
    # vLLM gives requests no hasher when prefix caching is off.
    hasher = get_request_block_hasher(spec["block_size"], sha256) if spec["prefix_caching"] else None
    arrivals, tokens = [], {}
    for index, request in enumerate(spec["requests"]):
        first = FIRST_SAMPLED_TOKEN + index * TOKENS_PER_REQUEST
        tokens[request["id"]] = request.get("output") or list(range(first, first + request["output_len"]))
        arrivals.append(
            Request(
                request_id=request["id"],
                prompt_token_ids=request["prompt"],
                sampling_params=SamplingParams(max_tokens=request["output_len"], ignore_eos=True),
                pooling_params=None,
                arrival_time=float(request["arrival_step"]),
                priority=request["priority"],
                block_hasher=hasher,
            )
        )
    arrivals.sort(key=lambda request: request.arrival_time)  # stable: list order within a step
    arrivals.reverse()
    step = 0
    running: deque[tuple[SchedulerOutput, set[str]]] = deque()
    while arrivals or scheduler.get_num_unfinished_requests():
        while arrivals and arrivals[-1].arrival_time <= step:
            scheduler.add_request(arrivals.pop())
        scheduler.preempted.clear()
        output = scheduler.schedule()
        yield {
            "step": step,
            "scheduled": dict(output.num_scheduled_tokens),
            "preempted": list(scheduler.preempted),
            "free_blocks": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        }
        running.append((output, computed(scheduler, output)))
        idle = not any(output.num_scheduled_tokens for output, _ in running) and not scheduler.preempted
        if idle and not arrivals and scheduler.get_num_unfinished_requests():
            raise RuntimeError(f"step {step}: the scheduler is stuck")
        if len(running) > spec.get("async_scheduling", False):
            output, done = running.popleft()
            scheduler.update_from_output(output, sample(scheduler, output, done, tokens))
        step += 1


def main(path: str) -> int:
    """Print the traces of all specs in a file."""
    specs = json.loads(sys.stdin.read() if path == "-" else Path(path).read_text())
    init_none_hash(sha256)
    model_config = make_model_config()
    for index, spec in enumerate(specs if isinstance(specs, list) else [specs]):
        label = {"spec": index} if isinstance(specs, list) else {}
        try:
            for line in trace(spec, model_config):
                print(json.dumps(line | label))
        except ValueError as error:
            print(f"{path}: spec {index}: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {Path(sys.argv[0]).name} SPECS.json")
    sys.exit(main(sys.argv[1]))
