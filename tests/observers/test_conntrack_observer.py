"""The conntrack observer on real flows: sockets, translation rules and the kernel's table in a namespace."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry

from proxycore.backend import ApplyResult, BackendInfo, Failure
from proxycore.changes import UNKNOWN, ChangeBatch, HostChange, change
from proxycore.errors import ConfigError, KernelError
from proxycore.kernel.conntrack import Conntrack
from proxycore.kernel.flow import Flow
from proxycore.model import (
    Endpoint,
    Frontend,
    FrontendKind,
    HostState,
    NodePortAddresses,
    PoolName,
    Route,
    Routes,
    ServicePortName,
    ServiceState,
)
from proxycore.observer import ObserverContext
from proxycore.observers import conntrack
from proxycore.observers.conntrack import ConntrackObserver
from proxycore.testing.netns import Namespace

PATIENCE = 20.0
ROUTES = Routes(**{who: Route(PoolName.CLUSTER, False) for who in ("local_pod", "node", "outside")})
HOST = HostState(
    node_name="here",
    node_addresses=("192.0.2.1", "fd00::2:1"),
    node_ports_ipv4=NodePortAddresses(all_local=True),
    node_ports_ipv6=NodePortAddresses(all_local=True),
)
V4 = ("10.96.0.10", "10.0.0.1", "10.0.0.2", "192.0.2.1", "10.0.0.99")
V6 = ("fd00:96::10", "fd00::1", "fd00::2", "fd00::2:1", "fd00::99")
NODE_PORT = 30053


def state(family: str, *endpoints: str, node_port: bool = True) -> ServiceState:
    vip = (V4 if family == "IPv4" else V6)[0]
    frontends = [
        Frontend(kind=FrontendKind.CLUSTER_IP, address=vip, port=53, protocol="UDP", routes=ROUTES),
        Frontend(kind=FrontendKind.NODE_PORT, address=None, port=NODE_PORT, protocol="UDP", routes=ROUTES),
    ]
    return ServiceState(
        name=ServicePortName("kube-system", "dns", "dns", "UDP", family),
        frontends=tuple(frontends[: 2 if node_port else 1]),
        endpoints=tuple(Endpoint(address=address, port=53) for address in endpoints),
    )


class Node:
    """A namespace in which the Service's frontends are translated to one endpoint, and an observer watches."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.generation = 0
        self.threads: list[threading.Thread] = []
        self.sockets: list[socket.socket] = []
        namespace.ip(
            *(["address", "add", a, "dev", "lo"] for a in V4[1:]), ["route", "add", "default", "dev", "lo"]
        )
        namespace.run(["ip", "-6", "route", "add", "default", "dev", "lo"])
        for address in V6[1:]:
            namespace.run(["ip", "address", "add", f"{address}/128", "dev", "lo", "nodad"])
        for address in (V4[1], V4[2], V6[1], V6[2]):
            self._serve(address)
        self.translate(None, None)

    def _serve(self, address: str) -> None:
        server = self._socket(address, 53)

        def echo() -> None:
            while True:
                try:
                    _, client = server.recvfrom(100)
                except OSError:
                    return
                if client is None:
                    return
                server.sendto(address.encode(), client)

        thread = threading.Thread(target=echo, daemon=True)
        thread.start()
        self.threads.append(thread)

    def _socket(self, address: str, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        made = self.namespace.socket(family, socket.SOCK_DGRAM)
        made.bind((address, port))
        self.sockets.append(made)
        return made

    def close(self) -> None:
        for opened in self.sockets:
            # Wakes the thread that waits in it.
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(10)
        for opened in self.sockets:
            opened.close()

    def translate(self, v4: str | None, v6: str | None) -> None:
        """Stand in for a backend: new flows of the frontends go to these endpoints."""
        rules = ["table inet t {", "}", "flush table inet t", "table inet t {"]
        # Alone, a chain without rules would not make the kernel track anything.
        rules += ["chain track { type filter hook output priority 0", "ct state new accept", "}"]
        rules += ["chain output { type nat hook output priority -100"]
        if v4:
            rules += [f"ip daddr {V4[0]} udp dport 53 dnat ip to {v4}:53"]
            rules += [f"ip daddr {V4[3]} udp dport {NODE_PORT} dnat ip to {v4}:53"]
            rules += [f"ip daddr {V4[0]} tcp dport 53 dnat ip to {v4}:53"]
        if v6:
            rules += [f"ip6 daddr {V6[0]} udp dport 53 dnat ip6 to [{v6}]:53"]
        rules += ["}", "}"]
        self.namespace.run(["nft", "-f", "-"], stdin="\n".join(rules) + "\n")

    def client(self, port: int, family: str = "IPv4") -> Callable[[str, int], str]:
        """A sender with a fixed port: sends to an address and returns who answered."""
        opened = self._socket((V4 if family == "IPv4" else V6)[4], port)
        opened.settimeout(PATIENCE)

        def ask(address: str, to_port: int) -> str:
            opened.sendto(b"?", (address, to_port))
            return opened.recvfrom(100)[0].decode()

        return ask

    def send(self, port: int, *destinations: tuple[str, int]) -> None:
        """Send without waiting for anyone."""
        family = "IPv6" if ":" in destinations[0][0] else "IPv4"
        opened = self._socket((V4 if family == "IPv4" else V6)[4], port)
        for destination in destinations:
            opened.sendto(b"!", destination)
        opened.close()
        self.sockets.remove(opened)

    def flows(self, family: str = "IPv4") -> list[Flow]:
        with self.namespace.call(Conntrack) as table:
            return table.udp_flows(family)

    def observe(self, **options: object) -> ConntrackObserver:
        observer = conntrack.plugin()
        info = BackendInfo(name="test", summary="", api="0.1", capabilities=frozenset())
        context = ObserverContext(host=HOST, backend=info, healthy=lambda: True, options=options)
        self.namespace.call(lambda: observer.proxycore_observer_start(context))
        return observer

    def applied(self, observer: ConntrackObserver, *states: ServiceState | ServicePortName, **more) -> None:
        self.generation += 1
        changes = tuple(
            change(s, UNKNOWN, None) if isinstance(s, ServicePortName) else change(s.name, UNKNOWN, s)
            for s in states
        )
        full = more.pop("full", False)
        host = HostChange(before=None, after=HOST) if full else None
        batch = ChangeBatch(generation=self.generation, changes=changes, full=full, host=host)
        observer.proxycore_observer_applied(batch, ApplyResult(generation=self.generation, **more))
        assert observer.wait_done(PATIENCE)


@pytest.fixture
def node() -> Iterator[Node]:
    with Namespace("observer") as namespace:
        made = Node(namespace)
        yield made
        made.close()


@pytest.fixture
def observer(node: Node) -> Iterator[ConntrackObserver]:
    made = node.observe(periodSeconds=0)
    yield made
    made.proxycore_observer_stop()


@pytest.mark.root
@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_a_sender_with_a_fixed_port_follows_its_service(node: Node, observer: ConntrackObserver, family: str):
    vip, first, second, *_ = V4 if family == "IPv4" else V6
    node.translate(V4[1], V6[1])
    node.applied(observer, state(family, first), full=True)
    ask = node.client(4001, family)
    assert ask(vip, 53) == first
    node.translate(V4[2], V6[2])
    assert ask(vip, 53) == first, "without cleaning the flow would stay"
    node.applied(observer, state(family, second))
    assert ask(vip, 53) == second


@pytest.mark.root
def test_node_port_flows_follow_and_others_to_the_same_port_stay(node: Node, observer: ConntrackObserver):
    node.translate(V4[1], None)
    node.applied(observer, state("IPv4", V4[1]), full=True)
    ask = node.client(4001)
    assert ask("192.0.2.1", NODE_PORT) == V4[1]
    node.send(4002, ("8.8.8.8", NODE_PORT), ("8.8.8.8", 53), ("10.0.0.1", 53))
    others = {flow for flow in node.flows() if flow.source_port == 4002}
    assert len(others) == 3
    node.translate(V4[2], None)
    node.applied(observer, state("IPv4", V4[2]))
    assert {(flow[:8], flow.id) for flow in node.flows()} == {(flow[:8], flow.id) for flow in others}
    assert ask("192.0.2.1", NODE_PORT) == V4[2]


@pytest.mark.root
def test_a_restart_drops_nothing_that_is_right(node: Node, observer: ConntrackObserver):
    node.translate(V4[1], None)
    right = node.client(4001)
    assert right(V4[0], 53) == V4[1]
    node.translate(V4[2], None)
    wrong = node.client(4002)
    assert wrong(V4[0], 53) == V4[2]
    kept = [
        (flow[:8], flow.id)
        for flow in node.flows()
        if flow.reply_source_port == 53 and flow.source_port == 4001
    ]
    node.translate(V4[1], None)
    node.applied(observer, state("IPv4", V4[1]), full=True)
    assert [(flow[:8], flow.id) for flow in node.flows()] == kept
    assert observer.deleted_total == 1
    assert wrong(V4[0], 53) == V4[1]


@pytest.mark.root
def test_scaled_to_zero_and_back_blackholes_nobody(node: Node, observer: ConntrackObserver):
    node.translate(V4[1], None)
    node.applied(observer, state("IPv4", V4[1]), full=True)
    ask = node.client(4001)
    assert ask(V4[0], 53) == V4[1]
    node.translate(None, None)
    node.applied(observer, state("IPv4"))
    assert node.flows() == []
    # Nobody refuses here, so the packet makes a flow that is not translated and would stay so for ever.
    node.send(4003, (V4[0], 53))
    assert [flow.reply_source for flow in node.flows()] == [socket.inet_aton(V4[0])]
    node.translate(V4[2], None)
    node.applied(observer, state("IPv4", V4[2]))
    assert node.flows() == []
    assert ask(V4[0], 53) == V4[2]


@pytest.mark.root
def test_flows_from_before_the_service_was_made_go(node: Node, observer: ConntrackObserver):
    node.applied(observer, full=True)
    node.send(4003, (V4[0], 53), ("8.8.4.4", 53))
    node.translate(V4[1], None)
    node.applied(observer, state("IPv4", V4[1]))
    assert [flow.destination for flow in node.flows()] == [socket.inet_aton("8.8.4.4")]


@pytest.mark.root
def test_a_deleted_service_leaves_no_flows(node: Node, observer: ConntrackObserver):
    node.translate(V4[1], None)
    node.applied(observer, state("IPv4", V4[1]), full=True)
    ask = node.client(4001)
    assert (ask(V4[0], 53), ask("192.0.2.1", NODE_PORT)) == (V4[1], V4[1])
    node.translate(None, None)
    node.applied(observer, state("IPv4").name)
    assert node.flows() == []


@pytest.mark.root
def test_a_service_that_failed_keeps_its_flows(node: Node, observer: ConntrackObserver):
    node.translate(V4[1], None)
    node.applied(observer, state("IPv4", V4[1]), full=True)
    ask = node.client(4001)
    ask(V4[0], 53)
    before = node.flows()
    name = state("IPv4").name
    node.applied(observer, state("IPv4", V4[2]), failed=(Failure(name=name, why="refused"),))
    node.applied(observer, state("IPv4", V4[2]), unknown=(name,))
    assert [flow.id for flow in node.flows()] == [flow.id for flow in before]
    node.translate(V4[2], None)
    node.applied(observer, state("IPv4", V4[2]))
    assert node.flows() == []


@pytest.mark.root
def test_tcp_is_never_touched(node: Node, observer: ConntrackObserver):
    node.translate(V4[1], None)
    node.applied(observer, state("IPv4", V4[1]), full=True)
    with node.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind((V4[1], 53))
        server.listen()
        with node.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(PATIENCE)
            client.connect((V4[0], 53))
            node.translate(V4[2], None)
            node.applied(observer, state("IPv4", V4[2]))
            accepted, _ = server.accept()
            with accepted:
                accepted.sendall(b"still here")
                assert client.recv(100) == b"still here"


@pytest.mark.root
def test_added_endpoints_cost_no_look(node: Node, observer: ConntrackObserver):
    node.applied(observer, state("IPv4", V4[1]), full=True)
    looks = observer.looks_total
    node.applied(observer, state("IPv4", V4[1], V4[2]))
    assert observer.looks_total == looks
    node.applied(observer, state("IPv4", V4[2]))
    assert observer.looks_total == looks + 1


@pytest.mark.root
def test_it_looks_from_time_to_time(node: Node):
    observer = node.observe(periodSeconds=0.05)
    try:
        node.applied(observer, state("IPv4", V4[1]), full=True)
        # Somebody else's doing; no batch tells about it.
        node.translate(V4[2], None)
        node.send(4001, (V4[0], 53))
        patience = threading.Event()
        for _ in range(400):
            if not node.flows():
                break
            patience.wait(0.05)
        assert node.flows() == []
    finally:
        observer.proxycore_observer_stop()


@pytest.mark.root
def test_a_failure_is_told_and_the_look_repeated(node: Node, monkeypatch: pytest.MonkeyPatch, caplog):
    tries: list[int] = []

    def refusing() -> Conntrack:
        tries.append(1)
        if len(tries) <= 2:
            raise KernelError("no table today", errno=1)
        return Conntrack()

    monkeypatch.setattr(conntrack, "Conntrack", refusing)
    monkeypatch.setattr(conntrack, "_RETRY_SECONDS", (0.01, 0.02))
    observer = node.observe(periodSeconds=0)
    try:
        node.translate(V4[1], None)
        node.send(4001, (V4[0], 53))
        node.applied(observer, state("IPv4", V4[2]), full=True)
        assert node.flows() == []
        assert observer.failures_total == 2
        assert "not cleaned, trying again" in caplog.text
    finally:
        observer.proxycore_observer_stop()


class Table:
    """Stands in for the kernel's table: one flow, and whoever reads it waits until it may go on."""

    FLOW = Flow(
        source=socket.inet_aton(V4[4]),
        source_port=4001,
        destination=socket.inet_aton(V4[0]),
        destination_port=53,
        reply_source=socket.inet_aton(V4[1]),
        reply_source_port=53,
        reply_destination=socket.inet_aton(V4[4]),
        reply_destination_port=4001,
        status=0,
        zone=0,
        reply_zone=0,
        id=1,
    )

    def __init__(self) -> None:
        self.read, self.go_on = threading.Event(), threading.Event()
        self.dumps = 0
        self.deleted: list[Flow] = []

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def udp_flows(self, family: str) -> list[Flow]:
        self.dumps += 1
        self.read.set()
        assert self.go_on.wait(PATIENCE)
        return [self.FLOW]

    def delete(self, flows: list[Flow]) -> int:
        self.deleted += flows
        return len(flows)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    made = Table()
    monkeypatch.setattr(conntrack, "Conntrack", lambda: made)
    return made


@pytest.fixture
def watcher(table: Table) -> Iterator[ConntrackObserver]:
    """An observer of a table that is not the kernel's."""
    made = conntrack.plugin()
    info = BackendInfo(name="test", summary="", api="0.1", capabilities=frozenset())
    options = {"periodSeconds": 0}
    made.proxycore_observer_start(
        ObserverContext(host=HOST, backend=info, healthy=lambda: True, options=options)
    )
    yield made
    table.go_on.set()
    made.proxycore_observer_stop()


def tell(observer: ConntrackObserver, generation: int, *endpoints: str) -> None:
    """A batch after which the Service has these endpoints."""
    new = state("IPv4", *endpoints)
    batch = ChangeBatch(generation=generation, changes=(change(new.name, UNKNOWN, new),))
    observer.proxycore_observer_applied(batch, ApplyResult(generation=generation))


def test_batches_that_come_during_a_look_cost_one_more(table: Table, watcher: ConntrackObserver):
    tell(watcher, 1, V4[1])
    assert table.read.wait(PATIENCE)
    for number in range(2, 100):
        tell(watcher, number, V4[1 + number % 2])
    table.go_on.set()
    assert watcher.wait_done(PATIENCE)
    assert table.dumps == 2


def test_metrics_are_registered_where_somebody_serves_them(table: Table):
    registry = CollectorRegistry()
    info = BackendInfo(name="test", summary="", api="0.1", capabilities=frozenset())
    observer = conntrack.plugin()
    observer.proxycore_observer_start(
        ObserverContext(
            host=HOST,
            backend=info,
            healthy=lambda: True,
            options={"periodSeconds": 0},
            registry=registry,
        )
    )

    def value(name: str, family: str) -> float | None:
        return registry.get_sample_value(f"kubeproxy_conntrack_reconciler_{name}", {"ip_family": family})

    assert value("deleted_entries_total", "IPv4") == 0
    assert value("sync_duration_seconds_count", "IPv4") == 0
    table.go_on.set()
    tell(observer, 1, V4[1])
    assert observer.wait_done(PATIENCE)
    tell(observer, 2, V4[2])
    assert observer.wait_done(PATIENCE)
    assert len(table.deleted) == value("deleted_entries_total", "IPv4") == 1
    assert value("sync_duration_seconds_count", "IPv4") == observer.looks_total
    assert value("deleted_entries_total", "IPv6") == value("sync_duration_seconds_count", "IPv6") == 0
    observer.proxycore_observer_stop()
    assert list(registry.collect()) == []


def test_after_a_look_it_rests(table: Table, watcher: ConntrackObserver, monkeypatch: pytest.MonkeyPatch):
    costs: list[float] = []
    monkeypatch.setattr(conntrack, "rest_seconds", lambda cost: costs.append(cost) or 3600.0)
    table.go_on.set()
    tell(watcher, 1, V4[1])
    assert watcher.wait_done(PATIENCE), "the first look comes at once"
    tell(watcher, 2, V4[2])
    assert not watcher.wait_done(0.2)
    assert table.dumps == len(costs) == 1
    assert costs[0] > 0


def test_looking_takes_a_fifth_of_the_time_at_most():
    assert conntrack.rest_seconds(0.0) == 0.0
    assert conntrack.rest_seconds(0.5) == 2.0
    assert conntrack.rest_seconds(1000.0) == conntrack.MAX_REST_SECONDS


def test_batches_are_taken_in_while_flows_are_judged(
    table: Table, watcher: ConntrackObserver, monkeypatch: pytest.MonkeyPatch
):
    judging, told = threading.Event(), threading.Event()
    waited: list[bool] = []
    judge = conntrack.stale

    def slowly(flows, index):
        judging.set()
        if not waited:
            waited.append(told.wait(PATIENCE))
        return judge(flows, index)

    table.go_on.set()
    tell(watcher, 1, V4[1])
    assert watcher.wait_done(PATIENCE)
    monkeypatch.setattr(conntrack, "stale", slowly)
    tell(watcher, 2, V4[2])
    assert judging.wait(PATIENCE)
    tell(watcher, 3, V4[1])
    told.set()
    assert watcher.wait_done(PATIENCE)
    assert waited == [True]
    assert table.deleted == [], "the endpoint is back: its flow stays"


def test_a_backend_without_conntrack_needs_no_observer():
    observer = ConntrackObserver()
    info = BackendInfo(name="user-space", summary="", api="0.1", capabilities=frozenset(), conntrack=False)
    observer.proxycore_observer_start(ObserverContext(host=HOST, backend=info, healthy=lambda: True))
    batch = ChangeBatch(generation=1, changes=(change(state("IPv4").name, None, state("IPv4")),), full=True)
    observer.proxycore_observer_applied(batch, ApplyResult(generation=1))
    assert observer.wait_done(0)
    observer.proxycore_observer_stop()


@pytest.mark.parametrize("value", [-1, "often", True, float("inf")])
def test_a_senseless_period_is_refused(value: object):
    info = BackendInfo(name="test", summary="", api="0.1", capabilities=frozenset())
    context = ObserverContext(host=HOST, backend=info, healthy=lambda: True, options={"periodSeconds": value})
    with pytest.raises(ConfigError, match="periodSeconds"):
        ConntrackObserver().proxycore_observer_start(context)
