"""Which addresses are open, and what happens if they cannot be."""

from __future__ import annotations

import http.client
import logging
import socket
import threading

import pytest

from proxycore import httpserver, servers
from proxycore.errors import ConfigError, KernelError
from proxycore.httpserver import Address
from proxycore.metrics.exposition import Registry
from proxycore.servers import Servers, parse_address
from proxycore.status import ServerStatus

# -- addresses -----------------------------------------------------------------------------------------------------


def test_an_address_that_is_taken_is_told_once_and_served_when_free(proxy, monkeypatch, caplog):
    monkeypatch.setattr(servers, "TICK_SECONDS", 0.02)
    host, port = proxy.health.split(":")
    tries: list[object] = []
    real = proxy.servers._open
    monkeypatch.setattr(proxy.servers, "_open", lambda: tries.append(refused := real()) or refused)
    with socket.socket() as squatter:
        squatter.bind((host, int(port)))
        squatter.listen()
        proxy.serve()
        taken, fine = proxy.servers.status()
        assert taken == ServerStatus(address=proxy.health, problem="Address already in use")
        assert fine == ServerStatus(address=proxy.metrics)
        assert proxy.ask(proxy.metrics, "/livez").status == 200
        proxy.wait_until(lambda: len(tries) >= 3)
    proxy.wait_until(lambda: not any(status.problem for status in proxy.servers.status()))
    assert proxy.ask(proxy.health, "/livez").status == 200
    told = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert [(r.fields["field"], r.fields["address"]) for r in told] == [("healthzBindAddress", proxy.health)]


def test_hard_fail_says_which_address_and_why(proxy):
    host, port = proxy.metrics.split(":")
    with socket.socket() as squatter:
        squatter.bind((host, int(port)))
        squatter.listen()
        with pytest.raises(KernelError, match=r"metricsBindAddress: .* Address already in use") as raised:
            proxy.serve(hard_fail=True)
        assert proxy.metrics in str(raised.value)
        assert proxy.ask(proxy.health, "/livez").status == 200, "the other one is open"


def test_only_what_changed_is_bound_anew(proxy):
    proxy.serve()
    client = http.client.HTTPConnection(proxy.health, timeout=proxy.PATIENCE)
    client.request("GET", "/livez")
    client.getresponse().read()
    kept = client.sock
    old = proxy.metrics
    proxy.metrics = f"{proxy.free_address()}:10249"
    proxy.serve()
    assert not proxy.is_open(old)
    assert proxy.ask(proxy.metrics, "/proxyMode").status == 200
    client.request("GET", "/livez")
    assert client.getresponse().read()
    assert client.sock is kept, "the connection went on"
    client.close()
    assert [status.address for status in proxy.servers.status()] == [proxy.health, proxy.metrics]


def test_addresses_may_be_switched_off_and_change_places(proxy):
    proxy.serve()
    proxy.servers.serve(None, proxy.health, False)
    assert proxy.ask(proxy.health, "/proxyMode").status == 200
    assert not proxy.is_open(proxy.metrics)
    proxy.servers.serve(None, None, False)
    assert not proxy.is_open(proxy.health)
    assert proxy.servers.status() == ()


def test_loopback_of_ipv6(proxy):
    proxy.health = f"[::1]:{proxy.free_port('::1')}"
    proxy.serve(hard_fail=True)
    assert proxy.ask(proxy.health, "/livez").status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_an_address_that_stands_for_all_stands_for_both_families(proxy, host: str):
    port = proxy.free_port()
    proxy.health = f"{host}:{port}"
    proxy.serve(hard_fail=True)
    assert proxy.ask(f"127.0.0.1:{port}", "/livez").status == 200
    assert proxy.ask(f"[::1]:{port}", "/livez").status == 200


def test_without_ipv6_it_is_ipv4(proxy, monkeypatch):
    opened = httpserver._open

    def no_ipv6(family, *args, **more):
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return opened(family, *args, **more)

    monkeypatch.setattr(httpserver, "_open", no_ipv6)
    port = proxy.free_port()
    proxy.health = f"0.0.0.0:{port}"
    proxy.serve(hard_fail=True)
    assert proxy.ask(f"127.0.0.1:{port}", "/livez").status == 200


def test_one_address_cannot_be_both(proxy):
    proxy.serve()
    with pytest.raises(ConfigError, match="is the address of healthzBindAddress already"):
        proxy.servers.serve(proxy.health, proxy.health, False)
    assert proxy.ask(proxy.metrics, "/livez").status == 200, "nothing was touched"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "::1:80",
        "[1.2.3.4]:80",
        "localhost:80",
        "127.0.0.1:٣",
    ],
)
def test_what_is_no_address_is_refused_before_anything_is_touched(proxy, text: str):
    proxy.serve()
    with pytest.raises(ConfigError, match="healthzBindAddress"):
        proxy.servers.serve(text, None, False)
    assert proxy.ask(proxy.metrics, "/livez").status == 200


def test_addresses():
    assert parse_address("10.0.0.1:80", "x") == Address("10.0.0.1", 80)
    assert parse_address("[FD00::1]:80", "x") == Address("fd00::1", 80)
    assert parse_address("0.0.0.0:80", "x") == parse_address("[::]:80", "x") == Address("*", 80)


def test_close_ends_everything_and_twice_does_no_harm(proxy):
    before = set(threading.enumerate())
    proxy.serve()
    proxy.servers.close()
    proxy.servers.close()
    assert not proxy.is_open(proxy.health)
    assert proxy.servers.status() == ()
    assert set(threading.enumerate()) - before == set()
    proxy.servers.serve(proxy.health, None, True)
    assert not proxy.is_open(proxy.health), "closed is closed"


def test_nothing_is_started_before_it_serves():
    before = set(threading.enumerate())
    made = Servers(lambda: None, Registry(), mode=str, configz=dict)
    assert set(threading.enumerate()) == before
    made.close()
