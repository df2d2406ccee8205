"""Envoy's configuration: the listener, the way to the picker, and the engines.

The choices that matter, each found by measurement (all names are Envoy's):

- Only request headers and bodies go to the picker; response tokens never leave Envoy.
- ``override_host`` takes the picker's list in order and skips engines that are not in the endpoint file; it does not
  look at health marks, so the picker owns health and rewrites that file.
- A request is sent to another engine only before the first byte of its response, and as often as there are other
  engines; the textbook retry budget of 20 % would drop requests where one of two engines dies.
- No limit on total time; the circuit breakers are out of the way, since admission is the picker's.
- If the picker is dead or late, Envoy goes on by least requests.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from servegym.engine_bridge.gateway.config import DESTINATION, PRIORITY, DeployConfig, split_address

ENGINES, PICKER, METADATA = "engines", "picker", "servegym"
_MANY = 65536
_TYPE = "type.googleapis.com/envoy."


def _typed(name: str, **fields: Any) -> dict[str, Any]:
    return {"@type": f"{_TYPE}{name}"} | fields


def _address(address: str) -> dict[str, Any]:
    host, port = split_address(address)
    return {"socket_address": {"address": host, "port_value": port}}


def _seconds(value: float) -> str:
    return f"{value:.3f}s"


def _endpoint(address: str) -> dict[str, Any]:
    return {"endpoint": {"address": _address(address)}}


def endpoints_file(endpoints: Sequence[str]) -> dict[str, Any]:
    """Return the content of the endpoint file: the engines that may be sent to, ``host:port``."""
    assignment = _typed(
        "config.endpoint.v3.ClusterLoadAssignment",
        cluster_name=ENGINES,
        endpoints=[{"lb_endpoints": [_endpoint(endpoint) for endpoint in endpoints]}],
    )
    return {"resources": [assignment]}


def envoy_config(config: DeployConfig, folder: Path, picker: str, engines: int, admin: str) -> dict[str, Any]:
    """Return the whole configuration.

    Args:
        config: the deployment.
        folder: where ``endpoints.json`` is, and where Envoy's files may go.
        picker: address of the picker's gRPC server.
        engines: how many there are.
        admin: address for Envoy's admin page.
    """
    return {
        "node": {"id": "servegym", "cluster": "servegym"},
        "admin": {"address": _address(admin)},
        "static_resources": {
            "listeners": [_listener(config, engines)],
            "clusters": [_engine_cluster(folder), _picker_cluster(picker)],
        },
    }


def _listener(config: DeployConfig, engines: int) -> dict[str, Any]:
    chain: dict[str, Any] = {"filters": [{"name": "http", "typed_config": _connection_manager(config, engines)}]}
    if config.tls is not None:
        files = {
            "certificate_chain": {"filename": str(config.tls.certificate.resolve())},
            "private_key": {"filename": str(config.tls.key.resolve())},
        }
        chain["transport_socket"] = {
            "name": "tls",
            "typed_config": _typed(
                "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                common_tls_context={"tls_certificates": [files], "alpn_protocols": ["h2", "http/1.1"]},
            ),
        }
    return {
        "name": "front",
        "address": _address(config.listen),
        "per_connection_buffer_limit_bytes": config.limits.body_mib * 2**20,
        "filter_chains": [chain],
    }


def _connection_manager(config: DeployConfig, engines: int) -> dict[str, Any]:
    retries = {
        "retry_on": "connect-failure,refused-stream,reset,gateway-error",
        "num_retries": min(engines - 1, 3),
        "retry_host_predicate": [
            {
                "name": "previous_hosts",
                "typed_config": _typed("extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"),
            }
        ],
        "host_selection_retry_max_attempts": 5,
        "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.25s"},
    }
    route: dict[str, Any] = {"cluster": ENGINES, "timeout": "0s"}
    if engines > 1:
        route["retry_policy"] = retries
    # A client that sets these would choose its own engine, or go before everybody else.
    stripped = [{"remove": header} for header in (DESTINATION, PRIORITY, "x-data-parallel-rank")]
    return _typed(
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="front",
        codec_type="AUTO",
        generate_request_id=True,
        # The join of decision and outcome; a client's own id would not be unique.
        preserve_external_request_id=False,
        always_set_request_id_in_response=True,
        use_remote_address=True,
        request_headers_timeout="10s",
        stream_idle_timeout=_seconds(config.idle_timeout_s),
        drain_timeout=_seconds(max(config.drain_s, 0.001)),
        early_header_mutation_extensions=[
            {
                "name": "strip",
                "typed_config": _typed(
                    "extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation", mutations=stripped
                ),
            }
        ],
        route_config={
            "name": "engines",
            "virtual_hosts": [
                {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": route}]}
            ],
        },
        http_filters=_filters(config),
        access_log=[_access_log()],
        access_log_options={"access_log_flush_interval": _seconds(config.progress_ms / 1000)},
    )


def _filters(config: DeployConfig) -> list[dict[str, Any]]:
    filters = []
    if config.api_key_file is not None:
        keys = [line.strip() for line in config.api_key_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        filters.append(
            {
                "name": "api_key_auth",
                "typed_config": _typed(
                    "extensions.filters.http.api_key_auth.v3.ApiKeyAuth",
                    credentials=[{"client": f"client-{number}", "key": key} for number, key in enumerate(keys)],
                    key_sources=[{"header": "Authorization"}],
                ),
            }
        )
    filters.append(
        {
            "name": "picker",
            "typed_config": _typed(
                "extensions.filters.http.ext_proc.v3.ExternalProcessor",
                grpc_service={"envoy_grpc": {"cluster_name": PICKER}},
                # Beyond the picker's own deadline, which ends in a heuristic's decision.
                message_timeout=_seconds(config.deadline_ms / 1000 * 2 + 0.1),
                failure_mode_allow=True,
                processing_mode={
                    "request_header_mode": "SEND",
                    "request_body_mode": "BUFFERED",
                    "response_header_mode": "SKIP",
                    "response_body_mode": "NONE",
                    "request_trailer_mode": "SKIP",
                    "response_trailer_mode": "SKIP",
                },
                metadata_options={"receiving_namespaces": {"untyped": ["envoy.lb"]}},
                mutation_rules={"allow_all_routing": True},
            ),
        }
    )
    if config.token_counts:
        filters.append({"name": "sse_to_metadata", "typed_config": _usage_reader()})
    filters.append({"name": "router", "typed_config": _typed("extensions.filters.http.router.v3.Router")})
    return filters


def _usage_reader() -> dict[str, Any]:
    rules = [
        {
            "rule": {
                "selectors": [{"key": "usage"}, {"key": name}],
                "on_present": {"metadata_namespace": METADATA, "key": name, "type": "NUMBER"},
            }
        }
        for name in ("prompt_tokens", "completion_tokens")
    ]
    parser = {
        "name": "envoy.content_parsers.json",
        "typed_config": _typed("extensions.content_parsers.json.v3.JsonContentParser", rules=rules),
    }
    return _typed("extensions.filters.http.sse_to_metadata.v3.SseToMetadata", response_rules={"content_parser": parser})


def _access_log() -> dict[str, Any]:
    first = "%COMMON_DURATION(DS_RX_BEG:US_RX_BODY_BEG:us)%"
    return {
        "name": "picker",
        "filter": {"log_type_filter": {"types": ["DownstreamPeriodic", "DownstreamEnd"]}},
        "typed_config": _typed(
            "extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
            common_config={
                "log_name": "servegym",
                "transport_api_version": "V3",
                "grpc_service": {"envoy_grpc": {"cluster_name": PICKER}},
                "buffer_flush_interval": "0.1s",
                "buffer_size_bytes": 16384,
                "custom_tags": [{"tag": "first", "value": first}],
            },
        ),
    }


def _engine_cluster(folder: Path) -> dict[str, Any]:
    metadata = {"key": "envoy.lb", "path": [{"key": DESTINATION}]}
    balancing = _typed(
        "extensions.load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=[{"metadata": metadata}, {"header": DESTINATION}],
        fallback_policy={
            "policies": [
                {
                    "typed_extension_config": {
                        "name": "least_request",
                        "typed_config": _typed(
                            "extensions.load_balancing_policies.least_request.v3.LeastRequest", choice_count=2
                        ),
                    }
                }
            ]
        },
    )
    return {
        "name": ENGINES,
        "type": "EDS",
        "connect_timeout": "1s",
        "eds_cluster_config": {
            "eds_config": {
                "resource_api_version": "V3",
                "path_config_source": {
                    "path": str(folder / "endpoints.json"),
                    "watched_directory": {"path": str(folder)},
                },
            }
        },
        "load_balancing_policy": {
            "policies": [{"typed_extension_config": {"name": "override_host", "typed_config": balancing}}]
        },
        "ignore_health_on_host_removal": True,
        # For the balancer that decides when the picker does not.
        "health_checks": [
            {
                "timeout": "1s",
                "interval": "1s",
                "no_traffic_interval": "1s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                "http_health_check": {"path": "/health"},
            }
        ],
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": _MANY,
                    "max_pending_requests": _MANY,
                    "max_requests": _MANY,
                    "max_retries": _MANY,
                }
            ]
        },
    }


def _picker_cluster(address: str) -> dict[str, Any]:
    return {
        "name": PICKER,
        "type": "STATIC",
        "connect_timeout": "0.25s",
        "load_assignment": {"cluster_name": PICKER, "endpoints": [{"lb_endpoints": [_endpoint(address)]}]},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": _typed(
                "extensions.upstreams.http.v3.HttpProtocolOptions", explicit_http_config={"http2_protocol_options": {}}
            )
        },
        "circuit_breakers": {
            "thresholds": [{"max_connections": _MANY, "max_pending_requests": _MANY, "max_requests": _MANY}]
        },
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that a reader sees whole or not at all; Envoy notices the rename."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)
