"""The Endpoint Picker protocol, message by message; and our subset of Envoy's API against the whole of it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from servegym.engine_bridge.gateway import protos
from servegym.engine_bridge.gateway.access_log import read_outcome, read_progress
from servegym.engine_bridge.gateway.messages import Decision, IncomingRequest, Outcome, Progress
from servegym.engine_bridge.gateway.picker import _Stream

DESTINATION = "x-gateway-destination-endpoint"


class Core:
    """Notes what it hears, and answers as told."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision
        self.requests: list[IncomingRequest] = []
        self.progress: list[Progress] = []
        self.outcomes: list[Outcome] = []

    async def decide(self, request: IncomingRequest) -> Decision:
        self.requests.append(request)
        return self.decision

    def progressed(self, progress: Progress) -> None:
        self.progress.append(progress)

    def finished(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


def headers(duplex: bool, end: bool = False, **values: str) -> Any:
    message = protos.ProcessingRequest()
    for key, value in {":path": "/v1/completions", "x-request-id": "r1", **values}.items():
        header = message.request_headers.headers.headers.add()
        header.key, header.raw_value = key, value.encode()
    message.request_headers.end_of_stream = end
    mode = protos.FULL_DUPLEX_STREAMED if duplex else protos.BUFFERED
    message.protocol_config.request_body_mode = mode
    return message


def body(data: bytes, end: bool = True) -> Any:
    message = protos.ProcessingRequest()
    message.request_body.body, message.request_body.end_of_stream = data, end
    return message


def talk(core: Core, *messages: Any) -> list[Any]:
    """Return all answers of a stream, which closes after the last message."""

    async def main() -> list[Any]:
        stream = _Stream(core)
        answers = [answer for message in messages for answer in await stream.take(message)]
        stream.close()
        return answers

    return asyncio.run(main())


def routed(response: Any) -> dict[str, str]:
    return {o.header.key: o.header.raw_value.decode() for o in response.header_mutation.set_headers}


GO = Decision(200, ("10.0.0.1:80", "10.0.0.2:80"), {"x-vllm-priority": "7"})


def test_buffered_the_body_is_answered_with_header_and_metadata() -> None:
    core = Core(GO)
    first, second = talk(core, headers(False), body(b'{"prompt": "a"}'))
    assert first.WhichOneof("response") == "request_headers"
    assert routed(second.request_body.response) == {
        DESTINATION: "10.0.0.1:80,10.0.0.2:80",
        "x-vllm-priority": "7",
    }
    assert second.request_body.response.clear_route_cache
    metadata = second.dynamic_metadata.fields["envoy.lb"].struct_value.fields[DESTINATION]
    assert metadata.string_value == "10.0.0.1:80,10.0.0.2:80"
    assert core.requests[0].body == b'{"prompt": "a"}'
    assert not core.outcomes  # the access log tells those


def test_duplex_the_answer_to_the_headers_waits_for_the_body_which_comes_back_in_chunks() -> None:
    core = Core(GO)
    data = os.urandom(150_000)
    answers = talk(core, headers(True), body(data[:70_000], end=False), body(data[70_000:]))
    assert answers[0].WhichOneof("response") == "request_headers"
    assert DESTINATION in routed(answers[0].request_headers.response)
    chunks = [a.request_body.response.body_mutation.streamed_response for a in answers[1:]]
    assert b"".join(chunk.body for chunk in chunks) == data == core.requests[0].body
    assert max(len(chunk.body) for chunk in chunks) <= 64_000
    assert [chunk.end_of_stream for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    # The stream ended without a response.
    assert [outcome.complete for outcome in core.outcomes] == [False]


def test_duplex_the_response_is_echoed_and_told() -> None:
    core = Core(GO)
    head = protos.ProcessingRequest()
    status = head.response_headers.headers.headers.add()
    status.key, status.raw_value = ":status", b"200"
    served = head.metadata_context.filter_metadata["envoy.lb"].fields["x-gateway-destination-endpoint-served"]
    served.string_value = "10.0.0.2:80"
    pieces = []
    for data, end in ((b"one", False), (b"two", True)):
        piece = protos.ProcessingRequest()
        piece.response_body.body, piece.response_body.end_of_stream = data, end
        pieces.append(piece)
    answers = talk(core, headers(True), body(b"{}"), head, *pieces)
    echoed = [a.response_body.response.body_mutation.streamed_response for a in answers[-2:]]
    assert [(chunk.body, chunk.end_of_stream) for chunk in echoed] == [(b"one", False), (b"two", True)]
    assert [progress.endpoint for progress in core.progress] == ["10.0.0.2:80"]
    outcome = core.outcomes[0]
    assert (outcome.endpoint, outcome.status, outcome.complete) == ("10.0.0.2:80", 200, True)
    assert len(core.outcomes) == 1


@pytest.mark.parametrize("duplex", [False, True])
def test_a_request_without_a_body_is_decided_at_its_headers(duplex: bool) -> None:
    core = Core(GO)
    (answer,) = talk(core, headers(duplex, end=True, **{":path": "/v1/models"}))
    assert DESTINATION in routed(answer.request_headers.response)


@pytest.mark.parametrize("duplex", [False, True])
def test_a_refusal_is_an_immediate_response(duplex: bool) -> None:
    core = Core(Decision(429, message="full", retry_after_s=2.0))
    answers = talk(core, headers(duplex), body(b"{}"))
    immediate = answers[-1].immediate_response
    assert immediate.status.code == 429
    assert {o.header.key: o.header.raw_value for o in immediate.headers.set_headers}["retry-after"] == b"2"
    assert json.loads(immediate.body)["error"]["message"] == "full"
    assert not core.outcomes


@pytest.mark.parametrize("listed", [False, True])
def test_the_subset_hint_is_heeded(listed: bool) -> None:
    core = Core(GO)
    message = headers(False, end=True)
    hint = message.metadata_context.filter_metadata["envoy.lb.subset_hint"]
    field = hint.fields["x-gateway-destination-endpoint-subset"]
    if listed:
        for endpoint in ("10.0.0.2:80", "10.0.0.3:80"):
            field.list_value.values.add().string_value = endpoint
    else:
        field.string_value = "10.0.0.2:80, 10.0.0.3:80"
    talk(core, message)
    assert core.requests[0].subset == ("10.0.0.2:80", "10.0.0.3:80")


def _entry(first: str, tokens: int | None = 9, **flags: bool) -> Any:
    message = protos.StreamAccessLogsMessage()
    entry = message.http_logs.log_entry.add()
    entry.request.request_id = "r1"
    entry.response.response_code.value = 200
    common = entry.common_properties
    common.upstream_remote_address.socket_address.address = "10.0.0.1"
    common.upstream_remote_address.socket_address.port_value = 80
    common.custom_tags["first"] = first
    common.duration.seconds, common.duration.nanos = 1, 500_000_000
    common.upstream_request_attempt_count = 2
    for name in flags:
        setattr(common.response_flags, name, True)
    if tokens is not None:
        common.metadata.filter_metadata["servegym"].fields["completion_tokens"].number_value = tokens
    return entry


def test_outcomes_are_read_from_the_access_log() -> None:
    assert read_outcome(_entry("36000")) == Outcome(
        "r1", "10.0.0.1:80", 200, True, False, 2, ttft_s=0.036, total_s=1.5, prompt_tokens=None, output_tokens=9
    )
    left = read_outcome(_entry("-", tokens=None, downstream_connection_termination=True))
    assert (left.complete, left.client_left, left.ttft_s) == (False, True, None)
    # Usage is the last that an engine says: who hangs up then has it all.
    whole = read_outcome(_entry("5", downstream_connection_termination=True))
    assert (whole.complete, whole.client_left, whole.output_tokens) == (True, False, 9)
    cut = read_outcome(_entry("5", upstream_connection_termination=True))
    assert (cut.complete, cut.client_left) == (False, False)
    assert read_progress(_entry("-")) is None
    assert read_progress(_entry("2000")) == Progress("r1", "10.0.0.1:80", 0.002)


COMPARE = """
import sys
sys.path.insert(0, sys.argv[1])
from google.protobuf import descriptor_pb2, descriptor_pool
import envoy.service.ext_proc.v3.external_processor_pb2, envoy.service.accesslog.v3.als_pb2
import envoy.config.core.v3.base_pb2, envoy.type.v3.http_status_pb2
from google.protobuf import struct_pb2, duration_pb2, wrappers_pb2

OURS = descriptor_pb2.FileDescriptorSet.FromString(open(sys.argv[2], 'rb').read()).file[0]
PACKAGES = ('envoy.service.ext_proc.v3', 'envoy.config.core.v3', 'envoy.type.v3', 'envoy.data.accesslog.v3',
            'envoy.service.accesslog.v3', 'google.protobuf', 'envoy.extensions.filters.http.ext_proc.v3')
pool = descriptor_pool.Default()
compared = 0

def theirs(name):
    for package in PACKAGES:
        try:
            return pool.FindMessageTypeByName(f'{package}.{name}')
        except KeyError:
            pass

def walk(message, name):
    global compared
    other = theirs(name)
    if other is None:
        assert name.startswith('HealthCheck'), name
        return
    for field in message.field:
        same = other.fields_by_name[field.name]
        assert same.number == field.number, (name, field.name)
        wire = {14: 5}.get(same.type, same.type)  # an enum is an int32 on the wire
        assert wire == field.type, (name, field.name, same.type, field.type)
        if field.type == 11 and not field.type_name.endswith('Entry'):
            assert same.message_type.name == field.type_name.rpartition('.')[2], (name, field.name)
        compared += 1
    for nested in message.nested_type:
        if not nested.options.map_entry:
            walk(nested, f'{name}.{nested.name}')

for message in OURS.message_type:
    walk(message, message.name)
print(compared)
"""


def test_our_messages_are_envoys() -> None:
    folder = os.environ.get("SERVEGYM_XDS_PROTOS")
    if folder is None:
        pytest.skip("set SERVEGYM_XDS_PROTOS to a folder with xds-protos (pip install --target FOLDER xds-protos)")
    ours = Path(protos.__file__).with_name("envoy.binpb")
    done = subprocess.run(
        [sys.executable, "-S", "-c", COMPARE, folder, str(ours)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 70


def test_the_descriptor_is_that_of_the_definition(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="needs grpcio-tools (extra dev)")
    source = Path(protos.__file__).with_name("envoy.proto")
    out = tmp_path / "envoy.binpb"
    command = [sys.executable, "-m", "grpc_tools.protoc", "--include_imports", "-I", str(source.parent)]
    subprocess.run([*command, f"--descriptor_set_out={out}", str(source)], check=True)
    assert out.read_bytes() == source.with_suffix(".binpb").read_bytes()
