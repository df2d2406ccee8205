"""The manifests: what refers to each other fits, what we read ourselves is valid, and Kubernetes' own schemas agree.

The schema of core resources comes from the package ``kubernetes-validate``, which CI installs. InferencePool and what
we use of Gateway API are written down here after their API references (v1).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from servegym.baselines.policy_spec import PolicySpec
from servegym.configuration import load_config, validate
from servegym.engine_bridge.cluster.config import ClusterFile
from servegym.engine_bridge.cluster.launcher import SCHEDULER
from servegym.engine_bridge.gateway.config import DeployConfig
from servegym.engine_bridge.vllm_plugin import protocol

FOLDER = Path(__file__).parents[1] / "configs" / "kubernetes"
BASE = FOLDER / "base"


def _resources() -> list[dict[str, Any]]:
    found = []
    for folder in (BASE, FOLDER / "istio"):
        for name in yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]:
            if not (folder / name).is_dir():
                found += list(yaml.safe_load_all((folder / name).read_text(encoding="utf-8")))
    return found


def _one(kind: str, name: str) -> dict[str, Any]:
    return next(one for one in _resources() if (one["kind"], one["metadata"]["name"]) == (kind, name))


def _pod(deployment: str) -> dict[str, Any]:
    template: dict[str, Any] = _one("Deployment", deployment)["spec"]["template"]
    return template


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PortNumber(Strict):
    number: int = Field(ge=1, le=65535)


class MatchLabels(Strict):
    matchLabels: dict[str, str] = Field(min_length=1)  # noqa: N815


class PickerReference(Strict):
    group: str = ""
    kind: str = "Service"
    name: str = Field(min_length=1, max_length=253)
    port: PortNumber  # must be there where the kind is Service
    failureMode: Literal["FailOpen", "FailClose"] = "FailClose"  # noqa: N815


class PoolSpec(Strict):
    """``spec`` of inference.networking.k8s.io/v1 InferencePool."""

    selector: MatchLabels
    targetPorts: list[PortNumber] = Field(min_length=1, max_length=8)  # noqa: N815
    endpointPickerRef: PickerReference  # noqa: N815


def test_the_pool_leads_from_the_route_to_the_engines_and_to_the_picker() -> None:
    pool = _one("InferencePool", "engines")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    spec = PoolSpec.model_validate(pool["spec"])
    engines, picker = _pod("engines"), _pod("picker")
    assert spec.selector.matchLabels.items() <= engines["metadata"]["labels"].items()
    (engine_port,) = engines["spec"]["containers"][0]["ports"]
    assert [port.number for port in spec.targetPorts] == [engine_port["containerPort"]]
    route = _one("HTTPRoute", "engines")["spec"]
    (reference,) = route["rules"][0]["backendRefs"]
    assert reference == {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "engines"}
    assert route["parentRefs"] == [{"name": _one("Gateway", "inference")["metadata"]["name"]}]
    service = _one("Service", spec.endpointPickerRef.name)["spec"]
    assert service["selector"].items() <= picker["metadata"]["labels"].items()
    assert [port["port"] for port in service["ports"]] == [spec.endpointPickerRef.port.number]
    assert _one("DestinationRule", "picker")["spec"]["host"] == "picker"


def test_the_picker_finds_the_engines_and_listens_where_it_is_asked() -> None:
    deploy = load_config(DeployConfig, BASE / "deploy.yaml", "deploy")
    cluster = load_config(ClusterFile, BASE / "cluster.yaml", "clusters")
    engines = _one("Service", "engines")["spec"]
    assert engines["clusterIP"] == "None"  # a name with the addresses of all pods
    assert engines["selector"].items() <= _pod("engines")["metadata"]["labels"].items()
    assert cluster.discover == f"http://engines:{engines['ports'][0]['port']}"
    pod = _pod("picker")["spec"]
    container = pod["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert (deploy.picker, deploy.metrics) == (f"0.0.0.0:{ports['grpc']}", f"0.0.0.0:{ports['metrics']}")
    assert pod["terminationGracePeriodSeconds"] > deploy.drain_s
    written = pod["initContainers"][0]["args"]
    assert deploy.picker_tls is not None
    assert {str(deploy.picker_tls.key), str(deploy.picker_tls.certificate)} <= set(written)
    PolicySpec.parse(container["args"][2])


def test_the_engines_run_our_scheduler_with_a_policy_that_it_takes() -> None:
    container = _pod("engines")["spec"]["containers"][0]
    assert f"--scheduler-cls={SCHEDULER}" in container["args"]
    given = {one["name"]: one.get("value") for one in container["env"]}
    assert given[protocol.POLICY_VARIABLE] == "/etc/servegym/policy.json"
    assert {protocol.STATE_VARIABLE, protocol.RATE_VARIABLE} <= given.keys()
    version, policy = protocol.read_policy(BASE / "policy.json")
    assert (version, policy.name) == (1, "spf_aging")
    deploy = load_config(DeployConfig, BASE / "deploy.yaml", "deploy")
    assert f"--max-num-seqs={deploy.engine.max_num_seqs}" in container["args"]
    assert f"--max-num-batched-tokens={deploy.engine.max_num_batched_tokens}" in container["args"]
    assert float(str(given[protocol.RATE_VARIABLE])) == deploy.engine.prefill_tokens_per_s


def test_a_typing_error_in_the_pool_is_found() -> None:
    spec = _one("InferencePool", "engines")["spec"]
    with pytest.raises(ValueError, match="extensionRef"):
        PoolSpec.model_validate(spec | {"extensionRef": spec["endpointPickerRef"]})


@pytest.mark.parametrize("deployment", ["engines", "picker"])
def test_what_is_mounted_is_there(deployment: str) -> None:
    pod = _pod(deployment)["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounts = {
        mount["name"] for one in pod["containers"] + pod.get("initContainers", []) for mount in one["volumeMounts"]
    }
    assert mounts == volumes
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text(encoding="utf-8"))
    generated = {one["name"]: one["files"] for one in kustomization["configMapGenerator"]}
    for volume in pod["volumes"]:
        if "configMap" in volume and not volume["configMap"].get("optional"):
            assert all((BASE / name).is_file() for name in generated[volume["configMap"]["name"]])


def test_kubernetes_takes_the_core_resources() -> None:
    checker = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    core = [one for one in _resources() if one["apiVersion"] in ("v1", "apps/v1")]
    assert {one["kind"] for one in core} == {"Namespace", "Deployment", "Service"}
    for one in core:
        checker.validate(one, "1.33", strict=True)
    broken = json.loads(json.dumps(core[-1]))
    broken["spec"]["selectors"] = {}
    with pytest.raises(checker.ValidationError):
        checker.validate(broken, "1.33", strict=True)


def test_kustomize_builds_them() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    built = subprocess.run(["kubectl", "kustomize", FOLDER / "istio"], capture_output=True, text=True, check=True)
    resources = list(yaml.safe_load_all(built.stdout))
    maps = {one["metadata"]["name"]: one["data"] for one in resources if one["kind"] == "ConfigMap"}
    assert "order" in maps  # by this very name the engines mount it
    (picker,) = (content for name, content in maps.items() if name.startswith("picker-"))
    validate(DeployConfig, yaml.safe_load(picker["deploy.yaml"]), "deploy.yaml")
    assert {one["metadata"].get("namespace") for one in resources if one["kind"] != "Namespace"} == {"servegym"}
