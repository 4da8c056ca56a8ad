"""A fake API server, the source that follows it, and objects to put into it."""

from __future__ import annotations

import threading
from contextlib import contextmanager

from proxycore.apiclient import connect
from proxycore.source import APIServer
from proxycore.sources.kubernetes import KubernetesSource

from .conftest import PATIENCE_SECONDS, Collected

NODE = "n1"


def service(name, address="10.0.0.1", port=80, namespace="default", **labels):
    return {
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"clusterIP": address, "ports": [{"port": port, "protocol": "TCP"}]},
    }


def endpoint_slice(name, service_name, *addresses, namespace="default"):
    return {
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"kubernetes.io/service-name": service_name},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}} for address in addresses],
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
    }


def node(name=NODE, zone="a"):
    return {"kind": "Node", "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}}}


def service_cidr(name="kubernetes", cidr="10.0.0.0/16"):
    return {"kind": "ServiceCIDR", "metadata": {"name": name}, "spec": {"cidrs": [cidr]}}


def source_of(server, **settings):
    settings = {"qps": 0.0, "master": server.url, **settings}
    return KubernetesSource(connect(APIServer(**settings), user_agent="test/1", environment={}), NODE)


@contextmanager
def running(source, sink=None):
    """Run a source; its sink.  It is stopped, and must end, in the end."""
    sink = sink or Collected()
    thread = threading.Thread(target=source.run, args=(sink,), daemon=True)
    thread.start()
    try:
        yield sink
    finally:
        source.stop()
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


@contextmanager
def followed(server, **settings):
    with running(source_of(server, **settings)) as sink:
        yield sink


def live(sink):
    return sink.synced and sink.health is not None and sink.health.state == "live"


def stale(sink):
    return sink.health is not None and sink.health.state == "stale"


def ports(sink):
    """Name and port of every Service."""
    return {key[2]: item.spec.ports[0].port for key, item in sink.objects.items() if key[0] == "Service"}


def count(sink, kind):
    return sum(type(event) is kind for event in sink.events)
