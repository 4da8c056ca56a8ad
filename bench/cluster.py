"""Objects of a large cluster, as an API server sends them, and the same as the node's resolved states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from proxycore.model import (
    Endpoint,
    Frontend,
    FrontendKind,
    HostState,
    LocalPodsByCIDR,
    NodePortAddresses,
    Pool,
    ServicePortName,
    ServiceState,
)
from proxycore.policy import internal_routes

NODE = "node-1"
NODES = 500
NAMESPACES = 50
ENDPOINTS = 10

HOST = HostState(
    node_name=NODE,
    families=("IPv4",),
    node_ports_ipv4=NodePortAddresses(addresses=("192.168.0.2",)),
    service_cidrs=("172.16.0.0/12",),
    detect_local=LocalPodsByCIDR(("10.0.0.0/8",)),
)
_ROUTES = internal_routes(local=False, detector=True, masquerade_all=False)


def cluster_ip(number: int) -> str:
    return f"172.{16 + number // 65536}.{number // 256 % 256}.{number % 256}"


def pod_ip(number: int) -> str:
    return f"10.{1 + number // 65536}.{number // 256 % 256}.{number % 256}"


def _uid(number: int) -> str:
    return f"3f2504e0-4f89-41d3-9a0c-{number:012x}"


def _fields(manager: str, kind: str, paths: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "manager": manager,
            "operation": "Update",
            "apiVersion": kind,
            "time": "2026-01-01T00:00:00Z",
            "fieldsType": "FieldsV1",
            "fieldsV1": paths,
        }
    ]


def service(number: int) -> dict[str, Any]:
    """One Service with one port."""
    return {
        "kind": "Service",
        "apiVersion": "v1",
        "metadata": {
            "name": f"svc-{number}",
            "namespace": f"ns-{number % NAMESPACES}",
            "uid": _uid(number),
            "resourceVersion": str(100000 + number),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app.kubernetes.io/name": f"app-{number}", "app.kubernetes.io/part-of": "shop"},
            "managedFields": _fields(
                "kubectl-client-side-apply",
                "v1",
                {
                    "f:metadata": {"f:labels": {".": {}, "f:app.kubernetes.io/name": {}}},
                    "f:spec": {"f:internalTrafficPolicy": {}, "f:ports": {".": {}}, "f:selector": {}},
                },
            ),
        },
        "spec": {
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
            "selector": {"app.kubernetes.io/name": f"app-{number}"},
            "clusterIP": cluster_ip(number),
            "clusterIPs": [cluster_ip(number)],
            "type": "ClusterIP",
            "sessionAffinity": "None",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
        },
        "status": {"loadBalancer": {}},
    }


def endpoint_slice(number: int, *, shift: int = 0, endpoints: int = ENDPOINTS) -> dict[str, Any]:
    """The slice of Service `number`; another `shift` replaces its last endpoint by another pod."""
    pods = [number * ENDPOINTS + i for i in range(endpoints)]
    if shift:
        pods[-1] += 1_000_000 + 7_919 * shift % 500_000
    name, namespace = f"svc-{number}", f"ns-{number % NAMESPACES}"
    return {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": {
            "name": f"{name}-x7k2p",
            "generateName": f"{name}-",
            "namespace": namespace,
            "uid": _uid(10_000_000 + number),
            "resourceVersion": str(200000 + number + shift),
            "generation": 1 + shift,
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {
                "app.kubernetes.io/name": f"app-{number}",
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                "kubernetes.io/service-name": name,
            },
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z"},
            "ownerReferences": [
                {
                    "apiVersion": "v1",
                    "kind": "Service",
                    "name": name,
                    "uid": _uid(number),
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
            "managedFields": _fields(
                "kube-controller-manager",
                "discovery.k8s.io/v1",
                {
                    "f:addressType": {},
                    "f:endpoints": {},
                    "f:metadata": {"f:labels": {".": {}}},
                    "f:ports": {},
                },
            ),
        },
        "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": [pod_ip(pod)],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "targetRef": {
                    "kind": "Pod",
                    "namespace": namespace,
                    "name": f"{name}-5d9c7b8f6d-{pod % 99991:05d}",
                    "uid": _uid(20_000_000 + pod),
                },
                "nodeName": f"node-{pod % NODES}",
                "zone": f"zone-{pod % 3}",
            }
            for pod in pods
        ],
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
    }


def to_bytes(item: dict[str, Any]) -> bytes:
    """As Go writes it: no spaces."""
    return json.dumps(item, separators=(",", ":")).encode()


def write_list(path: Path, services: int) -> None:
    """A file with everything in one List, as `kubectl get services,endpointslices -o json` prints it, compact."""
    with path.open("wb") as file:
        file.write(b'{"apiVersion":"v1","kind":"List","items":[')
        for number in range(services):
            file.write(b"," if number else b"")
            file.write(to_bytes(service(number)) + b"," + to_bytes(endpoint_slice(number)))
        file.write(b"]}")


def state(number: int, *, shift: int = 0, endpoints: int = ENDPOINTS) -> ServiceState:
    """What the node makes of Service `number`; another `shift` replaces its last endpoint."""
    name = ServicePortName(f"ns-{number % NAMESPACES}", f"svc-{number}", "http", "TCP", "IPv4")
    pods = [number * ENDPOINTS + i for i in range(endpoints)]
    if shift:
        pods[-1] += 1_000_000 + 7_919 * shift % 500_000
    found = tuple([Endpoint(address=pod_ip(pod), port=8080, node=f"node-{pod % NODES}") for pod in pods])
    frontend = Frontend(
        kind=FrontendKind.CLUSTER_IP, address=cluster_ip(number), port=80, protocol="TCP", routes=_ROUTES
    )
    return ServiceState(name=name, frontends=(frontend,), cluster=Pool(endpoints=found), endpoints=found)
