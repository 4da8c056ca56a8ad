"""Short ways to write resolved Services, node facts and batches, for tests of backends."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from proxycore.api import (
    BackendContext,
    ChangeBatch,
    Endpoint,
    Family,
    Frontend,
    FrontendKind,
    HostChange,
    HostState,
    LocalPodsByCIDR,
    NodePortAddresses,
    Pool,
    PoolName,
    Protocol,
    Route,
    Routes,
    ServicePortName,
    ServiceState,
    WhenEmpty,
)
from proxycore.changes import change

CLUSTER = Route(PoolName.CLUSTER, False)
CLUSTER_MASQUERADED = Route(PoolName.CLUSTER, True)
LOCAL = Route(PoolName.LOCAL, False)
IN_CLUSTER = Routes(local_pod=CLUSTER, node=CLUSTER_MASQUERADED, outside=CLUSTER_MASQUERADED)
EXTERNAL_LOCAL = Routes(local_pod=CLUSTER, node=CLUSTER_MASQUERADED, outside=LOCAL)
NODE = "test-node"

Changes = Mapping[ServicePortName, ServiceState | None]
_generations = itertools.count(1)


def name_of(
    service: str = "web",
    port: str = "http",
    protocol: Protocol = "TCP",
    family: Family = "IPv4",
    namespace: str = "default",
) -> ServicePortName:
    return ServicePortName(namespace, service, port, protocol, family)


def endpoint(text: str, *, local: bool = False, node: str | None = "far", weight: int = 1) -> Endpoint:
    """`10.0.0.1:80` or `[fd00::1]:80`."""
    address, _, port = text.rpartition(":")
    return Endpoint(
        address=address.strip("[]"),
        port=int(port),
        is_local=local,
        node=NODE if local else node,
        weight=weight,
    )


def pool(*endpoints: str | Endpoint, when_empty: WhenEmpty = WhenEmpty.REJECT) -> Pool:
    made = (endpoint(item) if isinstance(item, str) else item for item in endpoints)
    return Pool(endpoints=tuple(sorted(made, key=str)), when_empty=when_empty)


def frontend(
    address: str | None,
    port: int = 80,
    *,
    kind: FrontendKind = FrontendKind.CLUSTER_IP,
    protocol: Protocol = "TCP",
    routes: Routes = IN_CLUSTER,
    source_ranges: Sequence[str] | None = None,
) -> Frontend:
    return Frontend(
        kind=kind,
        address=address,
        port=port,
        protocol=protocol,
        routes=routes,
        source_ranges=None if source_ranges is None else tuple(source_ranges),
    )


def node_port(port: int, *, protocol: Protocol = "TCP", routes: Routes = IN_CLUSTER) -> Frontend:
    return frontend(None, port, kind=FrontendKind.NODE_PORT, protocol=protocol, routes=routes)


def service(
    name: ServicePortName,
    *frontends: Frontend,
    cluster: Pool | Sequence[str] | None = (),
    local: Pool | Sequence[str] | None = None,
    affinity: int | None = None,
) -> ServiceState:
    pools = [
        given if given is None or isinstance(given, Pool) else pool(*given) for given in (cluster, local)
    ]
    everything = {str(e): e for given in pools if given is not None for e in given.endpoints}
    return ServiceState(
        name=name,
        frontends=frontends,
        cluster=pools[0],
        local=pools[1],
        endpoints=tuple(everything.values()),
        affinity_seconds=affinity,
    )


def numbered(
    number: int,
    count: int = 1,
    *,
    family: Family = "IPv4",
    affinity: int | None = None,
    first: int = 0,
    frontends: int = 1,
) -> ServiceState:
    """Service `s<number>`, with `count` endpoints of its own from the `first` on and that many frontends."""
    name = name_of(f"s{number}", family=family)
    if family == "IPv4":
        high, low = divmod(number, 250)
        made = [frontend(f"172.30.{high}.{low + 1}")]
        made += [
            frontend(f"192.0.{high + 2}.{low + 1}", 8000 + n, kind=FrontendKind.EXTERNAL_IP)
            for n in range(1, frontends)
        ]
        targets = [f"10.{1 + high}.{low}.{first + n + 1}:80" for n in range(count)]
    else:
        made = [frontend(f"fd00:172:30::{number + 1:x}")]
        made += [
            frontend(f"2001:db8:5::{number + 1:x}", 8000 + n, kind=FrontendKind.EXTERNAL_IP)
            for n in range(1, frontends)
        ]
        targets = [f"[fd00:10::{number:x}:{first + n + 1:x}]:80" for n in range(count)]
    return service(name, *made, cluster=targets, affinity=affinity)


def host(**facts: object) -> HostState:
    """The facts of a node of the lab; `facts` replace some."""
    values: dict[str, object] = {
        "node_name": NODE,
        "node_ips": ("192.168.0.2", "2001:db8::1"),
        "node_addresses": ("192.168.0.2", "2001:db8::1"),
        "node_ports_ipv4": NodePortAddresses(addresses=("192.168.0.2",)),
        "node_ports_ipv6": NodePortAddresses(addresses=("2001:db8::1",)),
        "service_cidrs": ("172.30.0.0/16", "fd00:172:30::/108"),
        "detect_local": LocalPodsByCIDR(("10.0.0.0/8", "fd00:10::/64")),
    }
    return HostState(**{**values, **facts})  # type: ignore[arg-type]


HOST = host()


def context(
    facts: HostState = HOST,
    families: tuple[Family, ...] = ("IPv4", "IPv6"),
    options: Mapping[str, object] | None = None,
) -> BackendContext:
    return BackendContext(host=facts, families=families, options=options or {})


def batch(
    *states: ServiceState,
    removed: Iterable[ServicePortName] = (),
    full: bool = False,
    facts: HostState | None = None,
) -> ChangeBatch:
    """What the engine would send; `facts` None: the node's facts did not change."""
    changes: dict[ServicePortName, ServiceState | None] = {state.name: state for state in states}
    changes |= dict.fromkeys(removed)
    return ChangeBatch(
        generation=next(_generations),
        changes=tuple(change(name, None, state) for name, state in changes.items()),
        host=None if facts is None else HostChange(before=None, after=facts),
        full=full,
    )


def full(*states: ServiceState, facts: HostState | None = HOST) -> ChangeBatch:
    """A full batch."""
    return batch(*states, full=True, facts=facts)
