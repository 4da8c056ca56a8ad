"""What a Service means on this node: the values that backends program.

All values are frozen and compared by content.  Addresses are canonical text (`10.0.0.1`, `fd00::1`), ports are integers
1 to 65535, CIDRs canonical text with a prefix length and no host bits.

Semantics: Kubernetes Service, EndpointSlice and KEP-2086, KEP-1669, KEP-2433, KEP-1860 as kube-proxy applies them.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal, NamedTuple

import msgspec

Family = Literal["IPv4", "IPv6"]
Protocol = Literal["TCP", "UDP", "SCTP"]
FAMILIES: tuple[Family, Family] = ("IPv4", "IPv6")


class ServicePortName(NamedTuple):
    """Identity of the unit of work: one port of one Service in one IP family.

    Printed as kube-proxy prints it, `ns/name:port` or `ns/name` for an unnamed port; protocol and family are not printed.
    """

    namespace: str
    name: str
    port: str
    protocol: Protocol
    family: Family

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}:{self.port}" if self.port else f"{self.namespace}/{self.name}"


class FrontendKind(Enum):
    """Where a frontend's address comes from."""

    CLUSTER_IP = "ClusterIP"
    EXTERNAL_IP = "ExternalIP"
    LOAD_BALANCER_IP = "LoadBalancerIP"
    NODE_PORT = "NodePort"


class PoolName(Enum):
    """Which of a Service port's two endpoint lists a client takes."""

    CLUSTER = "cluster"
    LOCAL = "local"


class WhenEmpty(Enum):
    """What a client gets while a pool has no endpoint: refused (no endpoint anywhere) or silence (some on other nodes)."""

    REJECT = "reject"
    DROP = "drop"


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One address and port that may answer.  `is_local`: its `nodeName` is this node.

    `node` is None where the slice names none: such an endpoint is never local, yet may be on this node.
    """

    address: str
    port: int
    is_local: bool = False
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    zone: str | None = None
    node: str | None = None
    weight: int = 1

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


class Pool(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Endpoints that share a frontend's traffic, sorted by the text `ip:port`; `when_empty` rules while there are none."""

    endpoints: tuple[Endpoint, ...] = ()
    when_empty: WhenEmpty = WhenEmpty.REJECT


class Route(msgspec.Struct, frozen=True, gc=False):
    """What one class of client gets at a frontend."""

    pool: PoolName
    masquerade: bool


class Routes(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A frontend's answer to each class of client; looked up in this order.

    `local_pod`: a pod of this node as `HostState.detect_local` tells (nobody, if that is None).
    `node`: the source address is of type LOCAL, the node itself.  `outside`: anyone else.
    A client that is itself the chosen endpoint (hairpin) is always masqueraded.
    """

    local_pod: Route
    node: Route
    outside: Route


class Frontend(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An address and port that clients dial.

    `address` is None for NodePort: it then stands for every address in `HostState.node_port_addresses`.
    `source_ranges`: None admits everyone; otherwise new connections from elsewhere are dropped before translation.
    """

    kind: FrontendKind
    address: str | None
    port: int
    protocol: Protocol
    routes: Routes
    source_ranges: tuple[str, ...] | None = None

    def __str__(self) -> str:
        host = "*" if self.address is None else f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}/{self.protocol.lower()}"


class ServiceState(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One Service port of one family, resolved for this node.

    `cluster` and `local` are None when no frontend routes to them.  `endpoints` holds every known endpoint, usable or not;
    the pools are selections of it.  `affinity_seconds`: ClientIP affinity with this sliding timeout, kept per Service port
    and client address over all frontends; None: no affinity.  `health_check_node_port`: serve the number of local ready
    endpoints over HTTP there.
    """

    name: ServicePortName
    frontends: tuple[Frontend, ...] = ()
    cluster: Pool | None = None
    local: Pool | None = None
    endpoints: tuple[Endpoint, ...] = ()
    affinity_seconds: int | None = None
    health_check_node_port: int | None = None

    def pool(self, name: PoolName) -> Pool | None:
        """The pool of that name, None when no frontend routes to it."""
        return self.cluster if name is PoolName.CLUSTER else self.local


class LocalPodsByCIDR(msgspec.Struct, frozen=True, tag="cidr"):
    """Sources inside `cidrs` are local pods (detectLocalMode ClusterCIDR, NodeCIDR); one CIDR per family at most."""

    cidrs: tuple[str, ...]


class LocalPodsByInterface(msgspec.Struct, frozen=True, tag="interface"):
    """Packets that came in by this interface are from local pods; `prefix`: its name only starts so.

    detectLocalMode BridgeInterface, InterfaceNamePrefix.
    """

    name: str
    prefix: bool = False


DetectLocal = LocalPodsByCIDR | LocalPodsByInterface


class NodePortAddresses(msgspec.Struct, frozen=True, kw_only=True):
    """Where node ports answer, for one family.

    `all_local`: on every address of the node but loopback ones; otherwise exactly on `addresses`.
    """

    all_local: bool = False
    addresses: tuple[str, ...] = ()


class HostState(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about this node that rules depend on, followed live.

    `node_addresses`: every address on an interface, loopback excluded.  `node_ips`: the node's primary address per
    family.  `detect_local`: how a local pod is told, None: nobody is one.  `service_cidrs`: unallocated addresses of
    these are dropped.  `external_ips`: `spec.externalIPs` are served at all (KEP-5707).
    """

    node_name: str
    families: tuple[Family, ...] = FAMILIES
    node_ips: tuple[str, ...] = ()
    node_addresses: tuple[str, ...] = ()
    node_ports_ipv4: NodePortAddresses = NodePortAddresses()
    node_ports_ipv6: NodePortAddresses = NodePortAddresses()
    service_cidrs: tuple[str, ...] = ()
    detect_local: DetectLocal | None = None
    masquerade_all: bool = False
    masquerade_bit: int = 14
    external_ips: bool = True
    zone: str | None = None

    def node_ports(self, family: Family) -> NodePortAddresses:
        """Where node ports answer in that family."""
        return self.node_ports_ipv4 if family == "IPv4" else self.node_ports_ipv6


def family_of(address: str) -> Family:
    """Family of a canonical address or CIDR."""
    return "IPv6" if ":" in address else "IPv4"
