"""What passes between the data plane and the decision core. Times are ``time.monotonic()`` seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class IncomingRequest:
    """A request as the data plane hands it over.

    Attributes:
        request_id: the data plane's, which the access log repeats.
        path: such as ``/v1/completions``.
        headers: by lower-case name.
        body: the whole body, maybe empty.
        received_s: when the picker heard of it.
        subset: ``host:port`` of the engines that the data plane restricts the choice to; None for all.
    """

    request_id: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    received_s: float
    subset: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes, or what it is answered.

    Attributes:
        status: 200 to send it on; any other is the answer.
        endpoints: ``host:port`` in order of preference; those after the first are for retries.
        set_headers: for the engine.
        message: for the client, if it is not sent on.
        retry_after_s: for the client.
    """

    status: int
    endpoints: tuple[str, ...] = ()
    set_headers: Mapping[str, str] = field(default_factory=dict)
    message: str = ""
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """The first byte of a response body, heard of while the request still runs."""

    request_id: str
    endpoint: str
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request; figures that nobody told are None.

    Attributes:
        request_id: the data plane's.
        endpoint: ``host:port`` of the engine that served it; None if none did.
        status: HTTP status; 0 if none was sent.
        complete: the response came to its end; otherwise the client, the engine or the data plane cut it.
        client_left: the client ended it.
        attempts: engines that it was sent to, one after the other.
        ttft_s: from its arrival to the first byte of the response body.
        total_s: from its arrival to its end.
        prompt_tokens: as the engine counts.
        output_tokens: as the engine counts.
        path: that it asked for; empty if nobody told.
    """

    request_id: str
    endpoint: str | None
    status: int
    complete: bool
    client_left: bool = False
    attempts: int = 1
    ttft_s: float | None = None
    total_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    path: str = ""
