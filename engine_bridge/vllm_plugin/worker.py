"""What our code in each worker of an engine does at the expert level: counts, traces, placement.

Start an engine with ``--worker-extension-cls servegym.engine_bridge.vllm_plugin.worker.ExpertExtension``; vLLM mixes
the class into its workers, and ``/collective_rpc`` (``VLLM_SERVER_DEV_MODE=1``, on loopback only) calls its methods
with strings. Counting copies the routed experts of a step to the host, which eager execution allows; under CUDA graphs
vLLM's own ``--enable-return-routed-experts`` is the way.

:mod:`servegym.engine_bridge.experts` is the other end.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt


class _Recorder:
    """Routed experts of the running step, summed up and maybe kept.

    Attributes:
        counts: tokens routed, shape (layers, experts).
        steps: engine steps counted.
        tokens: tokens counted.
        kept: per piece of a request: its id, first position, and experts, shape (tokens, layers, top_k).
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.counts = np.zeros((layers, experts), dtype=np.int64)
        self.steps = self.tokens = 0
        self.keeping = False
        self.kept: list[tuple[str, int, npt.NDArray[Any]]] = []
        self._step: list[npt.NDArray[Any] | None] = [None] * layers

    def capture(self, layer: int) -> Any:
        """Return what a layer's router calls with the ids that it chose, (tokens, top_k)."""

        def receive(ids: Any) -> None:
            self._step[layer] = ids.detach().to("cpu").numpy()

        return receive

    def begin(self) -> None:
        """Forget what an unfinished or a dummy step left."""
        self._step = [None] * len(self._step)

    def end(self, total: int, pieces: list[tuple[str, int, int]]) -> None:
        """Take in a step of ``total`` tokens: pieces of (request, first position, tokens) in order of the batch."""
        found = [ids for ids in self._step if ids is not None and len(ids) >= total]
        if not total or len(found) < len(self._step):
            return
        experts = np.stack([ids[:total] for ids in found], axis=1)
        for layer, counts in enumerate(self.counts):
            counts += np.bincount(experts[:, layer].ravel(), minlength=len(counts))
        self.steps += 1
        self.tokens += total
        if self.keeping:
            at = 0
            for request, start, length in pieces:
                self.kept.append((request, start, experts[at : at + length].astype(np.uint16)))
                at += length


def _answering(method: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Turn an exception into an answer: raised in one of several workers, it would leave their queues out of step."""

    @functools.wraps(method)
    def answered(*arguments: str) -> dict[str, Any]:
        try:
            return method(*arguments)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    return answered


class ExpertExtension:
    """Mixed into vLLM's worker; method names carry our name so that they meet none of its own."""

    model_runner: Any
    vllm_config: Any
    _servegym: _Recorder

    @_answering
    def servegym_start(self, keep: str = "0") -> dict[str, Any]:
        """Begin to count from zero.

        Args:
            keep: "1" to keep the experts of each token, for a trace.
        """
        layers = self._servegym_layers()
        experts = int(self.vllm_config.model_config.get_num_experts())
        first = not hasattr(self, "_servegym")
        self._servegym = _Recorder(len(layers), experts)
        self._servegym.keeping = keep == "1"
        for index, layer in enumerate(layers):
            layer.router.set_capture_fn(self._servegym.capture(index))
        if first:
            self._servegym_wrap()
        return {"layers": len(layers), "experts": experts}

    @_answering
    def servegym_counts(self) -> dict[str, Any]:
        """Return steps, tokens, and tokens by layer and expert, since the start."""
        if not hasattr(self, "_servegym"):
            raise RuntimeError("nothing was counted; call servegym_start first")
        found = self._servegym
        return {"steps": found.steps, "tokens": found.tokens, "counts": found.counts.tolist()}

    @_answering
    def servegym_save(self, path: str) -> dict[str, Any]:
        """Write the kept trace as ``.npz`` (arrays ``expert_ids``, ``sequence_start``, ``experts``) and forget it.

        A request's tokens stand together in order of position; one that was preempted keeps its last computation.
        """
        found, self._servegym.kept = self._servegym.kept, []
        by_request: dict[str, list[tuple[int, npt.NDArray[Any]]]] = {}
        for request, start, experts in found:
            by_request.setdefault(request, []).append((start, experts))
        sequences = [_in_order(pieces) for pieces in by_request.values()]
        if not sequences:
            return {"sequences": 0, "tokens": 0}
        experts = np.concatenate(sequences)
        count = self._servegym.counts.shape[1]
        np.savez_compressed(
            path,
            expert_ids=experts.astype(np.uint8 if count <= 256 else np.uint16),
            sequence_start=np.cumsum([0, *(len(sequence) for sequence in sequences)]),
            experts=np.array(count),
        )
        return {"sequences": len(sequences), "tokens": len(experts)}

    @_answering
    def servegym_place(self, layer: str, ranks: str) -> dict[str, Any]:
        """Move the experts of a layer to other expert-parallel ranks; all ranks call it at once.

        Every rank gathers the layer's weights and keeps its own. With tensor parallelism the call is ordered with the
        engine's steps; with data parallelism pause the engine first.

        Args:
            layer: index among the MoE layers.
            ranks: JSON list, the rank of each logical expert, equally many experts each.
        """
        import torch
        from vllm.distributed.parallel_state import get_ep_group

        begun, group = time.perf_counter(), get_ep_group()
        wanted: list[int] = json.loads(ranks)
        module = self._servegym_layers()[int(layer)].routed_experts
        local = module.expert_map
        size = len(wanted) // group.world_size
        if local is None or sorted(wanted) != sorted(list(range(group.world_size)) * size):
            raise ValueError(f"{size} experts on each of {group.world_size} expert-parallel ranks needed")
        held = sorted((int(e) for e in (local >= 0).nonzero().flatten()), key=lambda e: int(local[e]))
        holders: list[list[int]] = [[] for _ in range(group.world_size)]
        torch.distributed.all_gather_object(holders, held, group=group.cpu_group)
        mine = [expert for expert, rank in enumerate(wanted) if rank == group.rank_in_group]
        with torch.no_grad():
            for weights in module.parameters():
                if weights.dim() < 3:
                    continue
                parts = [torch.empty_like(weights) for _ in holders]
                torch.distributed.all_gather(parts, weights.contiguous(), group=group.device_group)
                whole = {e: parts[rank][i] for rank, experts in enumerate(holders) for i, e in enumerate(experts)}
                weights.copy_(torch.stack([whole[expert] for expert in mine]))
            local.fill_(-1)
            for index, expert in enumerate(mine):
                local[expert] = index
        moved = len(set(mine) - set(held))
        return {"rank": group.rank_in_group, "moved": moved, "seconds": time.perf_counter() - begun}

    @_answering
    def servegym_placement(self) -> dict[str, Any]:
        """Return which logical experts this rank holds, by layer."""
        held = []
        for layer in self._servegym_layers():
            local = layer.routed_experts.expert_map
            held.append(None if local is None else [int(e) for e in (local >= 0).nonzero().flatten()])
        return {"held": held}

    def _servegym_layers(self) -> list[Any]:
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        found = [module for module in self.model_runner.get_model().modules() if isinstance(module, MoERunner)]
        return sorted(found, key=lambda module: module.layer_id)

    def _servegym_wrap(self) -> None:
        """See each step from outside: which requests, which positions."""
        runner = self.model_runner
        execute = runner.execute_model

        def counted(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            starts = {request.req_id: request.num_computed_tokens for request in scheduled.scheduled_new_reqs}
            cached = scheduled.scheduled_cached_reqs
            starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            self._servegym.begin()
            result = execute(scheduled, *args, **kwargs)
            tokens = scheduled.num_scheduled_tokens
            pieces = [(r, starts.get(r, 0), tokens[r]) for r in runner.input_batch.req_ids if tokens.get(r)]
            self._servegym.end(scheduled.total_num_scheduled_tokens, pieces)
            return result

        runner.execute_model = counted


def _in_order(pieces: list[tuple[int, npt.NDArray[Any]]]) -> npt.NDArray[Any]:
    """Put pieces of a request together by position; what was computed again replaces what was there."""
    end = max(start + len(experts) for start, experts in pieces)
    first = min(start for start, _ in pieces)
    whole = np.zeros((end - first, *pieces[0][1].shape[1:]), dtype=np.uint16)
    known = np.zeros(end - first, dtype=bool)
    for start, experts in pieces:
        at = slice(start - first, start - first + len(experts))
        whole[at], known[at] = experts, True
    return whole[known]
