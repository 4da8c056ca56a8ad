"""A peer whose packets are lost: nothing ends the connection but our own probes."""

from __future__ import annotations

import socket
import threading

import pytest

from proxycore.apiclient import client as apiclient
from proxycore.sources import reflector
from proxycore.testing.apiserver import FakeAPIServer
from proxycore.testing.apitls import Authority
from proxycore.testing.netns import Namespace, veth

from .conftest import PATIENCE_SECONDS, Collected
from .kubernetes_run import live, ports, service, source_of, stale

pytestmark = pytest.mark.root


@pytest.mark.parametrize("busy", [False, True])
def test_a_dead_peer_is_noticed_long_before_the_watch_would_end(tmp_path, monkeypatch, busy):
    monkeypatch.setattr(apiclient, "KEEPALIVE", (1, 1, 2))
    monkeypatch.setattr(apiclient, "USER_TIMEOUT_MILLISECONDS", 2500)
    monkeypatch.setattr(apiclient, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(reflector, "CONNECT_SECONDS", 0.5)
    with Namespace("node") as here, Namespace("api") as there:
        veth(here, "to-api", "02:00:00:00:00:01", there, "to-node", "02:00:00:00:00:02")
        here.ip(["address", "add", "192.0.2.1/24", "dev", "to-api"])
        there.ip(["address", "add", "192.0.2.2/24", "dev", "to-node"])
        listener = there.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind(("192.0.2.2", 6443))
        listener.listen(16)
        authority = Authority(tmp_path)
        with FakeAPIServer(listener=listener, bind="192.0.2.2", authority=authority) as server:
            server.apply(service("web"))
            path = server.kubeconfig(tmp_path / "kubeconfig")
            source = source_of(server, master="", kubeconfig=path)
            sink = Collected()
            # Threads that it starts are in the namespace as well.
            thread = threading.Thread(target=lambda: here.call(lambda: source.run(sink)), daemon=True)
            thread.start()
            try:
                sink.until(live)
                there.ip(["route", "add", "blackhole", "192.0.2.1/32"])
                if busy:
                    server.apply(service("web", port=81))
                sink.until(stale)
                assert "no connection within" in sink.health.reason
                there.ip(["route", "delete", "blackhole", "192.0.2.1/32"])
                server.apply(service("web", port=82))
                sink.until(lambda s: live(s) and ports(s) == {"web": 82})
            finally:
                source.stop()
                thread.join(PATIENCE_SECONDS)
                assert not thread.is_alive()
