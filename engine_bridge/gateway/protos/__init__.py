"""Envoy's messages, as far as the gateway speaks them; ``envoy.proto`` has their definition.

They are made from a compiled descriptor in a pool of their own: generated Python code would tie servegym to one range
of protobuf versions, and clash with whoever else registers Envoy's names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "servegym.envoy"


def _messages() -> dict[str, Any]:
    files = descriptor_pb2.FileDescriptorSet.FromString(Path(__file__).with_name("envoy.binpb").read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.AddSerializedFile(file.SerializeToString())
    names = [message.name for file in files.file for message in file.message_type]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in names}


_BY_NAME = _messages()

ProcessingRequest: Any = _BY_NAME["ProcessingRequest"]
ProcessingResponse: Any = _BY_NAME["ProcessingResponse"]
StreamAccessLogsMessage: Any = _BY_NAME["StreamAccessLogsMessage"]
StreamAccessLogsResponse: Any = _BY_NAME["StreamAccessLogsResponse"]
HealthCheckRequest: Any = _BY_NAME["HealthCheckRequest"]
HealthCheckResponse: Any = _BY_NAME["HealthCheckResponse"]
Struct: Any = _BY_NAME["Struct"]

BUFFERED = 2
"""Body mode: the whole request body in one message."""
FULL_DUPLEX_STREAMED = 4
"""Body mode: chunks both ways, the answer to the headers held back until the body is known."""
OVERWRITE = 2
"""Header append action: overwrite if it exists, else add."""
PERIODIC, END = 5, 6
"""Access log types: a request that still runs, and one that has ended."""
SERVING, NOT_SERVING = 1, 2
"""Health."""
