"""Random schedule specs for the comparison of the engine kernel with vLLM's scheduler.

`random_spec(seed)` gives one spec of `servegym schedule-trace` (the format is in `vllm_schedule.py`), the same for the
same seed. `python specs.py FIRST COUNT` prints a JSON list of them.

What varies, each on its own, so that every pair meets within some hundreds of seeds:

- policy and prefix caching; block sizes 1, 4 and 16; `max_num_seqs` from 1 up; budgets down to `max_num_seqs`;
- KV cache: barely room for the largest request (preemption), some room, room for all;
- prompts: fresh, over an alphabet so small that blocks coincide, with a common template, equal to an earlier one, an
  earlier request's prompt + output + a new turn; lengths at and beside multiples of the block, several budgets long;
- outputs of one token; outputs cut off by `max_model_len`; explicit and default output tokens;
- arrivals: one burst, several bursts, spread out, with idle gaps; list order other than arrival order;
- ids whose string order is not the arrival order; few distinct priorities, so that ties are common;
- `long_prefill_token_threshold`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

LARGE_EVERY = 25
"""One spec in so many is large: some hundreds of requests."""

CONTENDED_EVERY = 10
"""One in so many, under priority, has several prompts in progress in a tight cache: preemption of what this very step
scheduled already, and the return of its tokens to the budget."""


def random_spec(seed: int) -> dict[str, Any]:
    """Return the spec of a seed: plain JSON values, each request fits into the KV cache alone."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    large = seed % LARGE_EVERY == LARGE_EVERY - 1
    contended = seed % CONTENDED_EVERY == 1 and not large
    block_size = int(rng.choice([1, 4, 16]))
    max_num_seqs = int(rng.choice([32, 64]) if large else rng.choice([1, 2, 4, 8, 32], p=[0.1, 0.2, 0.3, 0.3, 0.1]))
    if contended:
        max_num_seqs = int(rng.integers(4, 9))
    budget = max_num_seqs + int(rng.choice([0, 1, 7, 40, 200], p=[0.05, 0.1, 0.25, 0.3, 0.3]))
    threshold = int(rng.choice([1, 5, 16, 50])) if contended or rng.random() < 0.3 else 0
    if contended or (threshold and rng.random() < 0.5):
        # Several prompts in progress that compete for the budget.
        budget = max_num_seqs + 2 * threshold
    if large:
        budget += 300
    # Fewer requests for fewer slots, so that most specs take some hundreds of steps at most.
    num_requests = int(rng.integers(150, 300) if large else rng.integers(5, min(60, 10 * max_num_seqs + 5) + 1))
    requests = _requests(rng, num_requests, block_size, budget, contended)
    lengths = [len(request["prompt"]) + request["output_len"] for request in requests]
    longest_prompt = max(len(request["prompt"]) for request in requests)
    max_model_len = max(lengths) + int(rng.integers(0, 50))
    if rng.random() < 0.2:
        max_model_len = longest_prompt + int(rng.integers(1, 6))
    blocks = [-(-(min(length, max_model_len) - 1) // block_size) for length in lengths]
    # Blocks as a multiple of the largest request's; a large spec in too small a cache runs for thousands of steps.
    rooms = [6.0, 12.0, 1000.0] if large else [1.2, 1.5, 2.0] if contended else [1.0, 1.2, 1.5, 2.0, 3.0, 6.0, 1000.0]
    room = float(rng.choice(rooms))
    spec = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": budget,
        # One more than what holds tokens: vLLM's null block.
        "num_blocks": 1 + min(int(max(blocks) * room), sum(blocks)),
        "block_size": block_size,
        "max_model_len": max_model_len,
        "policy": ("fcfs", "priority")[seed % 2],
        "prefix_caching": seed // 2 % 4 != 0,
        "requests": requests,
    }
    if threshold:
        spec["long_prefill_token_threshold"] = min(threshold, max_model_len)
    return spec


def _requests(
    rng: np.random.Generator, num_requests: int, block_size: int, budget: int, contended: bool
) -> list[dict[str, Any]]:
    ids, arrivals = _ids(rng, num_requests), _arrivals(rng, num_requests)
    vocabulary = int(rng.choice([2, 50_000], p=[0.15, 0.85]))
    sharing = float(rng.choice([0.0, 0.4, 0.8]))
    longest = min(4 * budget if contended else int(rng.choice([2 * block_size, 30, 60, 4 * budget])), 400)
    levels = 5 if contended else int(rng.choice([1, 2, 5]))
    templates = [_tokens(rng, vocabulary, _length(rng, block_size, longest)) for _ in range(3)]
    requests: list[dict[str, Any]] = []
    for index in range(num_requests):
        prompt = _tokens(rng, vocabulary, _length(rng, block_size, longest))
        if rng.random() < sharing:
            prompt = _shared_prompt(rng, prompt, templates, requests)
        output_len = 1 if rng.random() < 0.15 else int(rng.integers(1, 17))
        request = {
            "id": ids[index],
            "arrival_step": arrivals[index],
            "prompt": prompt[:400],
            "output_len": output_len,
            "priority": int(rng.integers(-1, levels - 1)),
        }
        if rng.random() < 0.5:
            request["output"] = _tokens(rng, vocabulary, output_len)
        requests.append(request)
    if rng.random() < 0.3:
        rng.shuffle(requests)
    return requests


def _shared_prompt(
    rng: np.random.Generator, prompt: list[int], templates: list[list[int]], earlier: list[dict[str, Any]]
) -> list[int]:
    """A prompt that starts as another one: a template, a copy, or the next turn of an earlier conversation."""
    kind = rng.choice(["template", "copy", "turn"]) if earlier else "template"
    if kind == "template":
        return templates[int(rng.integers(len(templates)))] + prompt
    # A recent one, so that its blocks are likely to be cached still, or to be in use.
    other = earlier[-1 - int(rng.integers(min(6, len(earlier))))]
    shared: list[int] = other["prompt"]
    return shared.copy() if kind == "copy" else shared + other.get("output", []) + prompt


def _length(rng: np.random.Generator, block_size: int, longest: int) -> int:
    """A prompt length up to `longest`, often a multiple of the block or one off."""
    length = int(rng.integers(1, longest + 1))
    if rng.random() < 0.4:
        length = -(-length // block_size) * block_size + int(rng.integers(-1, 2))
    return max(length, 1)


def _tokens(rng: np.random.Generator, vocabulary: int, length: int) -> list[int]:
    return [int(token) for token in rng.integers(0, vocabulary, length)]


def _arrivals(rng: np.random.Generator, num_requests: int) -> list[int]:
    """Non-decreasing arrival steps."""
    mean_gap = float(rng.choice([0.0, 0.3, 1.0, 3.0]))
    gaps = rng.poisson(mean_gap, num_requests)
    if rng.random() < 0.3:
        gaps[rng.random(num_requests) < 0.1] += int(rng.integers(5, 40))
    return [int(step) for step in np.cumsum(gaps)]


def _ids(rng: np.random.Generator, num_requests: int) -> list[str]:
    """Distinct ids: counted ("r10" < "r2"), counted down, or in random order."""
    kind = rng.choice(["up", "down", "random"])
    numbers = list(range(num_requests))
    if kind == "down":
        numbers.reverse()
    elif kind == "random":
        numbers = [int(number) for number in rng.permutation(num_requests)]
    return [f"r{number}" for number in numbers]


if __name__ == "__main__":
    first, count = (int(argument) for argument in sys.argv[1:])
    json.dump([random_spec(seed) for seed in range(first, first + count)], sys.stdout)
