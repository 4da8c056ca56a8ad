"""What a source says once, for commands that end."""

from __future__ import annotations

import pytest

from proxycore.api import Applied, Event, Health, Sink, SourceError, Synced, Trouble
from proxycore.config import Config
from proxycore.model import FrontendKind
from proxycore.objects import Metadata, Node, NodeAddress, NodeStatus, Service, ServicePort, ServiceSpec
from proxycore.offline import collect, load_states

NODE = Node(
    metadata=Metadata(name="node-1"),
    status=NodeStatus(
        addresses=(
            NodeAddress(type="InternalIP", address="192.0.2.7"),
            NodeAddress(type="Hostname", address="node-1"),
        )
    ),
)


class Script:
    """A source that delivers what it is given, and goes on until it is stopped."""

    def __init__(self, *puts: list[Event]) -> None:
        self.puts = list(puts)
        self.stopped = False

    def run(self, sink: Sink) -> None:
        for events in self.puts:
            if self.stopped:
                return
            sink.put(events)

    def stop(self) -> None:
        self.stopped = True


def test_everything_up_to_synced_is_taken_and_the_source_is_stopped() -> None:
    source = Script([Applied(NODE)], [Synced(), Health("live")], [Applied(NODE)])
    assert collect(source) == [Applied(NODE)]
    assert source.stopped


def test_a_source_that_misses_its_objects_is_not_waited_for() -> None:
    source = Script([Health("stale", "the folder is not there")], [Synced()])
    with pytest.raises(SourceError, match="the folder is not there"):
        collect(source)


def test_a_source_that_ends_early_is_an_error() -> None:
    with pytest.raises(SourceError, match="has not delivered everything"):
        collect(Script([Applied(NODE)]))


def test_trouble_that_was_mended_is_none() -> None:
    source = Script(
        [Trouble("a.yaml:3", "bad"), Trouble("b.yaml", "bad"), Trouble("a.yaml:3", "")], [Synced()]
    )
    assert load_states(source, Config(), "node-1").troubles == ("b.yaml: bad",)


def test_elsewhere_the_node_object_stands_for_the_interfaces() -> None:
    offline = load_states(Script([Applied(NODE), Synced()]), Config(), "node-1")
    assert offline.context.host.node_addresses == ("192.0.2.7",)
    assert offline.batch.full
    here = load_states(Script([Applied(NODE), Synced()]), Config(), "node-1", addresses=())
    assert here.context.host.node_addresses == ()
    assert here.context.host.node_ips == ("192.0.2.7",)


def test_what_is_decided_is_what_run_would_decide() -> None:
    service = Service(
        metadata=Metadata(name="web", namespace="default"),
        spec=ServiceSpec(
            type="NodePort",
            cluster_ip="10.96.0.1",
            ports=(
                ServicePort(name="a", port=80, node_port=30080),
                ServicePort(name="b", port=81, node_port=30081),
            ),
        ),
    )
    config = Config(healthz_bind_address="[::]:30080", metrics_bind_address="", takeover="leave")
    offline = load_states(Script([Applied(NODE), Applied(service), Synced()]), config, "node-1")
    node_ports = {
        frontend.port
        for item in offline.batch.changes
        for frontend in item.after.frontends
        if frontend.kind is FrontendKind.NODE_PORT
    }
    assert node_ports == {30081}
    assert any("30080/TCP is ignored" in reason for reason in offline.ignored)
    assert offline.context.takeover == "leave"
