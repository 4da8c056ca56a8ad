"""The contract between engine and backend: what goes in at start, what comes back from each call."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal

import msgspec

from .model import Family, HostState, ServicePortName

API_VERSION = "0.1"
"""Version of this contract; a backend names the range it was written for in `backend.toml`."""


class Capability(Enum):
    """What a backend can do.  Scenarios of the conformance kit are keyed by these; what is not claimed is unsupported."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"
    TCP = "tcp"
    UDP = "udp"
    SCTP = "sctp"
    CLUSTER_IP = "cluster-ip"
    EXTERNAL_IP = "external-ip"
    LOAD_BALANCER_IP = "load-balancer-ip"
    NODE_PORT = "node-port"
    LOCALHOST_NODE_PORT = "localhost-node-port"
    SOURCE_RANGES = "source-ranges"
    SESSION_AFFINITY = "session-affinity"
    ROUTE_BY_CLIENT = "route-by-client"
    MASQUERADE = "masquerade"
    HAIRPIN = "hairpin"
    REJECT = "reject"
    DROP = "drop"
    UNDEFINED_PORTS = "undefined-ports"
    SERVICE_CIDR_DROP = "service-cidr-drop"
    ATOMIC = "atomic"
    COUNTERS = "counters"
    VERIFY = "verify"


class BackendInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Static facts, the same as in `<package>/backend.toml`."""

    name: str
    summary: str
    api: str
    capabilities: frozenset[Capability]
    conntrack: bool = True
    """The kernel tracks its connections: the conntrack observer is of use."""
    needs: tuple[str, ...] = ()
    """What the host must have, in words: `kernel 5.13`, `CAP_NET_ADMIN`."""
    adopts: tuple[Literal["nftables", "iptables", "ipvs"], ...] = ()
    """Parts of kube-proxy's state, by its mode, that this backend goes on with as its own: the core leaves them to it."""


class BackendContext(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a backend may know at start besides batches.  `options` are its own settings, by name."""

    host: HostState
    families: tuple[Family, ...]
    options: Mapping[str, Any] = {}
    takeover: Literal["auto", "refuse", "leave"] = "auto"


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """Can this host carry the backend?  `problems` empty means yes.

    `warnings`: what works but will surprise (another proxy's rules).  `facts` are for people (versions, features).
    """

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    facts: Mapping[str, str] = {}


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """What start() found.

    `adopted`: state of a previous run was taken over, one line about it; None: nothing was there.  `holds`: what of the parts
    that BackendInfo.adopts names it goes on with, where that is decided at the start: names of iptables' tools, such as
    `iptables-nft`.  `loopback_node_ports`: it serves node ports on loopback addresses, and what guards these against other
    hosts is in force with the first full batch.
    """

    adopted: str | None = None
    holds: tuple[str, ...] = ()
    loopback_node_ports: bool = False


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One Service port that could not be brought into force, and why, in a sentence."""

    name: ServicePortName
    why: str


class ApplyResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a batch.

    `applied`: all of it is in force but the exceptions: `failed` (its last state stays), `unsupported` (needs what the
    backend lacks; nothing of it is in force), `unknown` (may be half done; the next change has `before=UNKNOWN`).
    `rejected`: nothing was done.  `culprits` names the Services at fault, if known; the engine resubmits without them.
    None: unknown, it searches for them by halving.  Empty: nobody's fault (a lock that another process holds), it tries the
    same again after a pause.  `message` says why, for people.  `operations` counts kernel operations.
    `pause_seconds`: the kernel had so much work that the next batch should wait so long, while changes gather.
    """

    generation: int
    outcome: Literal["applied", "rejected"] = "applied"
    failed: tuple[Failure, ...] = ()
    unsupported: tuple[Failure, ...] = ()
    unknown: tuple[ServicePortName, ...] = ()
    culprits: tuple[Failure, ...] | None = None
    message: str = ""
    operations: int = 0
    pause_seconds: float = 0.0


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel operation of a plan: what it does (`add`, `delete`, `replace`), to what, in native syntax."""

    verb: Literal["add", "delete", "replace"]
    native: str
    service: str | None = None


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """The kernel differs from what was programmed.  `service` is None where no single Service owns the object."""

    service: ServicePortName | None
    what: str


INVALID_DROPPED = "ct_state_invalid_dropped_packets"
"""Packets dropped because connection tracking calls them invalid."""
LOCALHOST_NODE_PORTS_ACCEPTED = "localhost_nodeports_accepted_packets"
"""New connections to node ports on loopback addresses."""


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """Result of verify().  `checked` is False when a cheap test proved that nothing was touched since the last call.

    `repaired`: the backend has put the drift right itself; otherwise the engine sends a full batch.  `figures`: counts of the
    node as a whole since its start, by names such as INVALID_DROPPED; empty: none are kept.
    """

    checked: bool
    drift: tuple[Drift, ...] = ()
    repaired: bool = False
    figures: Mapping[str, int] = {}


class KernelObject(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel object that belongs to a Service port, for inspect(): its kind, its place, its native text."""

    kind: str
    place: str
    native: str


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """Traffic of one Service port since the backend started: new connections, and per endpoint where it can tell."""

    name: ServicePortName
    connections: int
    by_frontend: Mapping[str, int] = {}
    by_endpoint: Mapping[str, int] = {}


class Cleanup(msgspec.Struct, frozen=True, kw_only=True):
    """What cleanup() removed, a line an object; empty when there was nothing."""

    removed: tuple[str, ...] = ()
