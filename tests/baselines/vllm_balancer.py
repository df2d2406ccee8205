"""Choices of the real vLLM's data-parallel load balancer, without engines.

    python vllm_balancer.py < EVENTS.json

runs in an environment that has vLLM. EVENTS.json is `{"engines": N, "events": [...]}` with the events `["request"]`,
`["finish", k]` (the k-th request) and `["snapshot", [[waiting, running, kv_usage], ...]]`. Prints the chosen engines as
one JSON list.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from types import SimpleNamespace

from vllm.v1.engine.core_client import DPLBAsyncMPClient


def main() -> None:
    spec = json.load(sys.stdin)
    client = DPLBAsyncMPClient.__new__(DPLBAsyncMPClient)  # without its sockets and processes
    client._finalizer = lambda: None
    client.client_count, client.client_index = 1, 0
    client.core_engines = list(range(spec["engines"]))
    client.lb_engines = [[0, 0, 0.0] for _ in client.core_engines]
    client.reqs_in_flight, client.engine_inflight = {}, Counter()
    client.eng_start_index = 0
    chosen: list[int] = []
    for kind, *argument in spec["events"]:
        if kind == "request":
            request = SimpleNamespace(request_id=str(len(chosen)), data_parallel_rank=None, pooling_params=None)
            chosen.append(client.get_core_engine_for_request(request))
        elif kind == "finish":
            client.engine_inflight[client.reqs_in_flight.pop(str(argument[0]))] -= 1
        else:
            client.lb_engines = argument[0]
    print(json.dumps(chosen))


if __name__ == "__main__":
    main()
