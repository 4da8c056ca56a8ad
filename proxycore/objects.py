"""The parts of Kubernetes API objects that a proxy reads, with the API's names.

Unknown fields are skipped at decoding speed; a field of the wrong type makes the object undecodable.
Shapes: v1 Service, Node; discovery.k8s.io/v1 EndpointSlice; networking.k8s.io/v1 ServiceCIDR.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Kind = Literal["Service", "EndpointSlice", "Node", "ServiceCIDR"]

LABEL_SERVICE_NAME = "kubernetes.io/service-name"
LABEL_PROXY_NAME = "service.kubernetes.io/service-proxy-name"
LABEL_HEADLESS = "service.kubernetes.io/headless"
LABEL_ZONE = "topology.kubernetes.io/zone"
ANNOTATION_TRIGGER_TIME = "endpoints.kubernetes.io/last-change-trigger-time"


Name = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
"""Longer than any name that the API admits, short enough to be printed."""
Namespace = Annotated[str, msgspec.Meta(max_length=1024)]
PortNumber = Annotated[int, msgspec.Meta(ge=1, le=65535)]
PortNumberOrNone = Annotated[int, msgspec.Meta(ge=0, le=65535)]
"""0 says that there is none."""


class _Part(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True, gc=False):
    """A part of an object; immutable, holds no reference cycle."""


class Metadata(_Part, frozen=True):
    name: Name
    namespace: Namespace = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None


class ServicePort(_Part, frozen=True):
    port: PortNumber
    name: str | None = None
    protocol: Literal["TCP", "UDP", "SCTP"] | None = None
    node_port: PortNumberOrNone | None = None


class ClientIPConfig(_Part, frozen=True):
    timeout_seconds: Annotated[int, msgspec.Meta(ge=1, le=86400)] | None = None


class SessionAffinityConfig(_Part, frozen=True):
    client_ip: ClientIPConfig | None = msgspec.field(name="clientIP", default=None)


class ServiceSpec(_Part, frozen=True):
    type: str | None = None
    cluster_ip: str | None = msgspec.field(name="clusterIP", default=None)
    cluster_ips: tuple[str, ...] | None = msgspec.field(name="clusterIPs", default=None)
    ip_families: tuple[str, ...] | None = None
    ports: tuple[ServicePort, ...] | None = None
    external_ips: tuple[str, ...] | None = msgspec.field(name="externalIPs", default=None)
    load_balancer_source_ranges: tuple[str, ...] | None = None
    external_traffic_policy: str | None = None
    internal_traffic_policy: str | None = None
    health_check_node_port: PortNumberOrNone | None = None
    session_affinity: str | None = None
    session_affinity_config: SessionAffinityConfig | None = None


class LoadBalancerIngress(_Part, frozen=True):
    ip: str | None = None
    ip_mode: str | None = None


class LoadBalancerStatus(_Part, frozen=True):
    ingress: tuple[LoadBalancerIngress, ...] | None = None


class ServiceStatus(_Part, frozen=True):
    load_balancer: LoadBalancerStatus | None = None


class Service(_Part, frozen=True, tag_field="kind", tag="Service"):
    metadata: Metadata
    spec: ServiceSpec | None = None
    status: ServiceStatus | None = None


class Conditions(_Part, frozen=True):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Named(_Part, frozen=True):
    name: str


class Hints(_Part, frozen=True):
    for_zones: tuple[Named, ...] | None = None
    for_nodes: tuple[Named, ...] | None = None


class SliceEndpoint(_Part, frozen=True):
    addresses: tuple[str, ...] | None = None
    conditions: Conditions | None = None
    node_name: str | None = None
    zone: str | None = None
    hints: Hints | None = None


class SlicePort(_Part, frozen=True):
    name: str | None = None
    protocol: Literal["TCP", "UDP", "SCTP"] | None = None
    port: PortNumber | None = None


class EndpointSlice(_Part, frozen=True, tag_field="kind", tag="EndpointSlice"):
    metadata: Metadata
    address_type: str = ""
    endpoints: tuple[SliceEndpoint, ...] | None = None
    ports: tuple[SlicePort, ...] | None = None


class Taint(_Part, frozen=True):
    key: str
    effect: str | None = None


class NodeSpec(_Part, frozen=True):
    pod_cidr: str | None = msgspec.field(name="podCIDR", default=None)
    pod_cidrs: tuple[str, ...] | None = msgspec.field(name="podCIDRs", default=None)
    taints: tuple[Taint, ...] | None = None


class NodeAddress(_Part, frozen=True):
    type: str
    address: str


class NodeStatus(_Part, frozen=True):
    addresses: tuple[NodeAddress, ...] | None = None


class Node(_Part, frozen=True, tag_field="kind", tag="Node"):
    metadata: Metadata
    spec: NodeSpec | None = None
    status: NodeStatus | None = None


class ServiceCIDRSpec(_Part, frozen=True):
    cidrs: tuple[str, ...] | None = None


class ServiceCIDR(_Part, frozen=True, tag_field="kind", tag="ServiceCIDR"):
    metadata: Metadata
    spec: ServiceCIDRSpec | None = None


APIObject = Service | EndpointSlice | Node | ServiceCIDR

API_VERSIONS: dict[Kind, str] = {
    "Service": "v1",
    "Node": "v1",
    "EndpointSlice": "discovery.k8s.io/v1",
    "ServiceCIDR": "networking.k8s.io/v1",
}


def kind_of(item: APIObject) -> Kind:
    """The API's name for the object's kind."""
    return type(item).__name__  # type: ignore[return-value]


def is_ours(item: Service | EndpointSlice) -> bool:
    """Is the object for this proxy?  Only the presence of the two labels matters, never their value."""
    labels = item.metadata.labels
    return not labels or (LABEL_PROXY_NAME not in labels and LABEL_HEADLESS not in labels)
