"""What became of requests, from Envoy's gRPC access log: who served them, when the first byte came, how they ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from servegym.engine_bridge.gateway.envoy_config import METADATA
from servegym.engine_bridge.gateway.messages import Outcome, Progress
from servegym.engine_bridge.gateway.picker import DecisionCore
from servegym.engine_bridge.gateway.protos import PERIODIC, StreamAccessLogsMessage, StreamAccessLogsResponse

SERVICE = "envoy.service.accesslog.v3.AccessLogService"


class AccessLog:
    """The gRPC service that Envoy writes its access log to.

    Args:
        core: hears of it.
    """

    def __init__(self, core: DecisionCore) -> None:
        self._core = core

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the service for a server."""
        stream = grpc.stream_unary_rpc_method_handler(
            self._stream, StreamAccessLogsMessage.FromString, StreamAccessLogsResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"StreamAccessLogs": stream})

    async def _stream(self, messages: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async for message in messages:
            for entry in message.http_logs.log_entry:
                if entry.common_properties.access_log_type == PERIODIC:
                    progress = read_progress(entry)
                    if progress is not None:
                        self._core.progressed(progress)
                else:
                    self._core.finished(read_outcome(entry))
        return StreamAccessLogsResponse()


def read_progress(entry: Any) -> Progress | None:
    """Return the news of a request that still runs; None before its first byte."""
    first, endpoint = _first_s(entry), _endpoint(entry)
    if first is None or endpoint is None:
        return None
    return Progress(entry.request.request_id, endpoint, first)


def read_outcome(entry: Any) -> Outcome:
    """Return a request's end."""
    common = entry.common_properties
    flags = common.response_flags
    usage = common.metadata.filter_metadata[METADATA].fields if METADATA in common.metadata.filter_metadata else {}
    left = flags.downstream_connection_termination or flags.downstream_remote_reset
    if left and "completion_tokens" in usage:
        left = False  # usage is the last that an engine says; many clients hang up once they have it
    cut = (
        flags.upstream_remote_reset
        or flags.upstream_connection_termination
        or flags.upstream_connection_failure
        or flags.upstream_protocol_error
        or flags.upstream_retry_limit_exceeded
        or flags.stream_idle_timeout
        or flags.no_healthy_upstream
    )
    status = entry.response.response_code.value

    def count(name: str) -> int | None:
        return int(usage[name].number_value) if name in usage else None

    return Outcome(
        request_id=entry.request.request_id,
        endpoint=_endpoint(entry),
        status=status,
        complete=not (left or cut) and status > 0,
        client_left=left,
        attempts=max(common.upstream_request_attempt_count, 1),
        ttft_s=_first_s(entry),
        total_s=common.duration.seconds + common.duration.nanos * 1e-9,
        prompt_tokens=count("prompt_tokens"),
        output_tokens=count("completion_tokens"),
        path=entry.request.path,
    )


def _first_s(entry: Any) -> float | None:
    """Seconds to the first byte of the response body; vLLM answers the headers long before the first token."""
    text = entry.common_properties.custom_tags.get("first", "-")
    try:
        return float(text) * 1e-6
    except ValueError:
        return None


def _endpoint(entry: Any) -> str | None:
    socket = entry.common_properties.upstream_remote_address.socket_address
    if not socket.address:
        return None
    host = f"[{socket.address}]" if ":" in socket.address else socket.address
    return f"{host}:{socket.port_value}"
