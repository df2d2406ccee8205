"""The Endpoint Picker: Envoy's external processor, as the Gateway API Inference Extension uses it (proposal 004, v1).

A stream is one request. The first message says how bodies come: whole (``BUFFERED``, as our own Envoy sends them; the
response never comes here) or in chunks both ways (``FULL_DUPLEX_STREAMED``, as llm-d, Istio and Envoy Gateway ask for;
then the answer to the headers is held back until the body is known, and each chunk is echoed). One server does both.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

import grpc
import grpc.aio

from servegym.engine_bridge.gateway.config import DESTINATION
from servegym.engine_bridge.gateway.messages import Decision, IncomingRequest, Outcome, Progress
from servegym.engine_bridge.gateway.protos import (
    FULL_DUPLEX_STREAMED,
    NOT_SERVING,
    OVERWRITE,
    SERVING,
    HealthCheckRequest,
    HealthCheckResponse,
    ProcessingRequest,
    ProcessingResponse,
)

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
_SUBSET = ("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset")
_SERVED = "x-gateway-destination-endpoint-served"
_CHUNK = 62_000  # gateways take at most 64 kB in a message


class DecisionCore(Protocol):
    """What decides about requests."""

    async def decide(self, request: IncomingRequest) -> Decision:
        """Say where a request goes; never raises."""

    def progressed(self, progress: Progress) -> None:
        """Hear of a first token."""

    def finished(self, outcome: Outcome) -> None:
        """Hear of a request's end."""


class Picker:
    """The gRPC service.

    Args:
        core: decides.

    Attributes:
        serving: what health checks are told.
        streams: conversations that are open; one lasts as long as its response where the gateway streams both ways.
    """

    def __init__(self, core: DecisionCore) -> None:
        self._core = core
        self.serving = False
        self.streams = 0

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """Return the services for a server: the picker under Envoy's name, and health."""
        process = grpc.stream_stream_rpc_method_handler(
            self._process, ProcessingRequest.FromString, ProcessingResponse.SerializeToString
        )
        check = grpc.unary_unary_rpc_method_handler(
            self._check, HealthCheckRequest.FromString, HealthCheckResponse.SerializeToString
        )
        return [
            grpc.method_handlers_generic_handler(SERVICE, {"Process": process}),
            grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check}),
        ]

    async def _check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        known = request.service in ("", "liveness", "readiness", SERVICE)
        if not known:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service}")
        alive = self.serving or request.service == "liveness"
        return HealthCheckResponse(status=SERVING if alive else NOT_SERVING)

    async def _process(
        self, messages: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        stream = _Stream(self._core)
        self.streams += 1
        try:
            async for message in messages:
                for answer in await stream.take(message):
                    yield answer
                    if answer.WhichOneof("response") == "immediate_response":
                        return
        finally:
            self.streams -= 1
            stream.close()


class _Stream:
    """One request's conversation."""

    def __init__(self, core: DecisionCore) -> None:
        self._core = core
        self._received_s = time.monotonic()
        self._duplex = False
        self._headers: dict[str, str] = {}
        self._subset: tuple[str, ...] | None = None
        self._body = bytearray()
        self._request_id = ""
        self._decision: Decision | None = None
        # Of the response, in duplex mode.
        self._endpoint: str | None = None
        self._status = 0
        self._first_s: float | None = None
        self._ended = False

    async def take(self, message: Any) -> list[Any]:
        """Return the answers to a message, none while more must come first."""
        kind = message.WhichOneof("request")
        if kind == "request_headers":
            return await self._request_headers(message)
        if kind == "request_body":
            self._body += message.request_body.body
            if self._duplex and not message.request_body.end_of_stream:
                return []
            return await self._decide()
        if kind == "response_headers":
            return [self._response_headers(message)]
        if kind == "response_body":
            return [self._response_body(message.response_body)]
        answer = ProcessingResponse()
        getattr(answer, kind or "request_trailers").SetInParent()
        if kind == "request_trailers" and self._decision is None:
            return [*await self._decide(), answer]
        if kind == "response_trailers":
            self._end(complete=True)
        return [answer]

    def close(self) -> None:
        """Note that the stream is over; a response that has not come to its end was cut."""
        if self._duplex and self._decision is not None and self._decision.status == 200:
            self._end(complete=False)

    async def _request_headers(self, message: Any) -> list[Any]:
        for header in message.request_headers.headers.headers:
            value = header.raw_value.decode("utf-8", "replace") if header.raw_value else header.value
            self._headers[header.key.lower()] = value
        self._duplex = message.protocol_config.request_body_mode == FULL_DUPLEX_STREAMED
        self._request_id = self._headers.get("x-request-id") or f"stream-{id(self):x}-{self._received_s:.6f}"
        hint = message.metadata_context.filter_metadata
        if _SUBSET[0] in hint and _SUBSET[1] in hint[_SUBSET[0]].fields:
            self._subset = tuple(_texts(hint[_SUBSET[0]].fields[_SUBSET[1]]))
        if message.request_headers.end_of_stream:
            return await self._decide(headers_only=True)
        if self._duplex:
            return []
        answer = ProcessingResponse()
        answer.request_headers.SetInParent()
        return [answer]

    async def _decide(self, headers_only: bool = False) -> list[Any]:
        path = self._headers.get(":path", "")
        if self._decision is None:
            request = IncomingRequest(
                self._request_id, path, self._headers, bytes(self._body), self._received_s, self._subset
            )
            self._decision = await self._core.decide(request)
        if self._decision.status != 200:
            return [_immediate(self._decision)]
        if self._duplex and not headers_only:
            head = ProcessingResponse()
            _route(head, head.request_headers.response, self._decision)
            return [head, *_chunks(bytes(self._body))]
        answer = ProcessingResponse()
        _route(answer, (answer.request_headers if headers_only else answer.request_body).response, self._decision)
        return [answer]

    def _response_headers(self, message: Any) -> Any:
        for header in message.response_headers.headers.headers:
            if header.key == ":status":
                self._status = int(header.raw_value or header.value)
        served = message.metadata_context.filter_metadata
        if "envoy.lb" in served and _SERVED in served["envoy.lb"].fields:
            self._endpoint = served["envoy.lb"].fields[_SERVED].string_value
        if message.response_headers.end_of_stream:
            self._end(complete=True)
        answer = ProcessingResponse()
        answer.response_headers.SetInParent()
        return answer

    def _response_body(self, body: Any) -> Any:
        if self._first_s is None and body.body:
            self._first_s = time.monotonic()
            endpoint = self._endpoint or (self._decision.endpoints[0] if self._decision else "")
            self._core.progressed(Progress(self._request_id, endpoint, self._first_s - self._received_s))
        answer = ProcessingResponse()
        if self._duplex:
            streamed = answer.response_body.response.body_mutation.streamed_response
            streamed.body, streamed.end_of_stream = body.body, body.end_of_stream
        else:
            answer.response_body.SetInParent()
        if body.end_of_stream:
            self._end(complete=True)
        return answer

    def _end(self, complete: bool) -> None:
        if self._ended:
            return
        self._ended = True
        first = None if self._first_s is None else self._first_s - self._received_s
        endpoint = self._endpoint or (self._decision.endpoints[0] if self._decision else None)
        total = time.monotonic() - self._received_s
        # Who cut a stream cannot be told here; a client that leaves is the common case, and no fault of the engine.
        left = not complete and self._status < 500
        self._core.finished(
            Outcome(self._request_id, endpoint, self._status, complete, left, ttft_s=first, total_s=total)
        )


def _route(answer: Any, response: Any, decision: Decision) -> None:
    """Write a decision into an answer, as header and as metadata."""
    destination = ",".join(decision.endpoints)
    for key, value in {DESTINATION: destination, **decision.set_headers}.items():
        option = response.header_mutation.set_headers.add()
        option.header.key, option.header.raw_value, option.append_action = key, value.encode(), OVERWRITE
    response.clear_route_cache = True
    answer.dynamic_metadata.fields["envoy.lb"].struct_value.fields[DESTINATION].string_value = destination


def _immediate(decision: Decision) -> Any:
    answer = ProcessingResponse()
    immediate = answer.immediate_response
    immediate.status.code = decision.status
    kind = "invalid_request_error" if decision.status < 429 else "overloaded_error"
    immediate.body = json.dumps(
        {"error": {"message": decision.message, "type": kind, "code": decision.status}}
    ).encode()
    headers = {"content-type": "application/json", "x-llm-d-request-dropped-reason": decision.message}
    if decision.retry_after_s is not None:
        headers["retry-after"] = str(max(round(decision.retry_after_s), 1))
    for key, value in headers.items():
        option = immediate.headers.set_headers.add()
        option.header.key, option.header.raw_value, option.append_action = key, value.encode(), OVERWRITE
    immediate.details = "servegym"
    return answer


def _chunks(body: bytes) -> Iterator[Any]:
    for start in range(0, max(len(body), 1), _CHUNK):
        answer = ProcessingResponse()
        streamed = answer.request_body.response.body_mutation.streamed_response
        streamed.body = body[start : start + _CHUNK]
        streamed.end_of_stream = start + _CHUNK >= len(body)
        yield answer


def _texts(value: Any) -> list[str]:
    """Return the engines of a subset hint, a list or a text with commas."""
    if value.WhichOneof("kind") == "list_value":
        return [one.string_value for one in value.list_value.values]
    return [text.strip() for text in value.string_value.split(",") if text.strip()]
