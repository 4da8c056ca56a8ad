"""Servers over facts that a test changes, and a client for them."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxycore.metrics.exposition import Registry
from proxycore.servers import Servers
from proxycore.status import Facts, NodeStatus, Status

PATIENCE = 20.0
NUMBERS = itertools.count()
WELL = Status(
    synced=True,
    started=True,
    applied_total=1,
    families=("IPv4", "IPv6"),
    last_success=1_700_000_000.0,
    node=NodeStatus(eligible=True, why=""),
)


class Answered:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    def json(self):
        return json.loads(self.body)


class Proxy:
    """Servers, their facts and their addresses."""

    PATIENCE = PATIENCE
    WELL = WELL

    def __init__(self) -> None:
        self.status = WELL
        self.more: dict[str, object] = {}
        self.mode = "nftables"
        self.configz: object = {"kubeproxy.config.k8s.io": {"mode": "nftables"}, "proxycore.io": {}}
        self.registry = Registry()
        self.servers = Servers(
            self.facts, self.registry, mode=lambda: self.mode, configz=lambda: self.configz
        )
        self.health = f"{self.free_address()}:10256"
        self.metrics = f"{self.free_address()}:10249"

    def facts(self) -> Facts:
        return Facts(now=time.time(), monotonic=time.monotonic(), status=self.status, **self.more)

    def now(self, **status) -> None:
        self.status = msgspec.structs.replace(WELL, **status)

    def serve(self, hard_fail: bool = False) -> None:
        self.servers.serve(self.health, self.metrics, hard_fail)

    def series(self, path: str = "/metrics") -> dict[tuple, float]:
        text = self.ask(self.metrics, path).body.decode()
        return {
            (s.name, *sorted(s.labels.items())): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }

    @staticmethod
    def ask(address: str, path: str, method: str = "GET") -> Answered:
        client = http.client.HTTPConnection(address, timeout=PATIENCE)
        try:
            client.request(method, path)
            return Answered(client.getresponse())
        finally:
            client.close()

    def is_open(self, address: str) -> bool:
        try:
            self.ask(address, "/livez")
        except ConnectionRefusedError:
            return False
        return True

    @staticmethod
    def free_address() -> str:
        """An address of loopback that nobody else has: not this process before, not one beside it."""
        high, low = divmod(os.getpid(), 250)
        return f"127.{1 + high % 250}.{1 + low}.{1 + next(NUMBERS) % 250}"

    @staticmethod
    def free_port(host: str = "127.0.0.1") -> int:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.bind((host, 0))
            return probe.getsockname()[1]

    @staticmethod
    def wait_until(condition: Callable[[], object]) -> None:
        until = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < until, "waited in vain"
            time.sleep(0.01)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy()
    yield made
    made.servers.close()
