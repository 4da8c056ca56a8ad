"""A node of a cluster: the lab, an API server within its reach, and `proxyctl run` with both."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from proxycore.testing.apiserver import FakeAPIServer
from proxycore.testing.lab import CLIENT_ADDRESSES, NODE_NAME, Lab

SECONDS = 30.0
"""Only how long a failing test may hang."""
SERVER_PORT = 6443
VIP = "172.30.0.10"
ENDPOINTS = ("10.180.0.1", "10.180.0.2", "10.180.0.3")
PORT = 8080
DIAL_SECONDS = 2.0
"""A SYN that was lost is sent again after a second."""


def wait_until(condition: Callable[[], Any], what: str = "", seconds: float = SECONDS) -> Any:
    """The first true value of the condition."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def service(name: str = "web", vip: str = VIP, **spec: Any) -> dict[str, Any]:
    return {
        "kind": "Service",
        "apiVersion": "v1",
        "metadata": {"name": name, "namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": vip,
            "clusterIPs": [vip],
            "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": PORT}],
            **spec,
        },
        "status": {"loadBalancer": {}},
    }


def endpoint_slice(*addresses: str, name: str = "web", **metadata: Any) -> dict[str, Any]:
    return {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": {
            "name": f"{name}-1",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": name},
            **metadata,
        },
        "addressType": "IPv4",
        "endpoints": [
            {"addresses": [address], "nodeName": NODE_NAME, "conditions": {"ready": True}}
            for address in addresses
        ],
        "ports": [{"name": "http", "port": PORT, "protocol": "TCP"}],
    }


def node(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {"name": NODE_NAME, **changes.pop("metadata", {})},
        "spec": {"podCIDRs": ["10.180.0.0/24"], **changes},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.2"}]},
    }


class Dialer:
    """Opens one connection after the other, as a pod, and asks who answers."""

    def __init__(self, lab: Lab, address: str = VIP, port: int = 80) -> None:
        self.answers: list[str] = []
        self.failures: list[str] = []
        self._lab = lab
        self._target = (address, port)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Dialer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(SECONDS)

    def _run(self) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            answer = dial(self._lab, *self._target)
            if answer.startswith("!"):
                self.failures.append(f"{answer} after {time.monotonic() - began:.2f} s")
            else:
                self.answers.append(answer)

    def more(self, count: int = 20) -> None:
        """Wait for so many more answers."""
        wanted = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= wanted, f"{count} more answers; failed: {self.failures[-3:]}")


def dial(lab: Lab, address: str = VIP, port: int = 80, seconds: float = DIAL_SECONDS) -> str:
    """The address that answered; `!` and the reason if none did."""
    with closing(lab.client("pod", "tcp", CLIENT_ADDRESSES["pod"][0])) as made:
        made.settimeout(seconds)
        try:
            made.connect((address, port))
            return ask(made)
        except OSError as error:
            return f"!{error or type(error).__name__}"


def ask(connection: socket.socket) -> str:
    """Who is at the other end of an open connection."""
    connection.sendall(b"who are you?\n")
    answer = b""
    while not answer.endswith(b"\n"):
        data = connection.recv(4096)
        if not data:
            raise OSError("closed")
        answer += data
    return str(json.loads(answer)["at"]).rpartition(":")[0]


class Answer(dict[str, Any]):
    """A JSON answer, with the status of the response."""

    status = 0
    text = ""

    def check(self, name: str) -> Any:
        """One of the checks in the body."""
        return self["checks"][name]


class Cluster:
    """The lab, an API server on the node's loopback, and one run of the proxy after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lab = Lab([PORT])
        self.server = FakeAPIServer(port=SERVER_PORT)
        self.state = folder / "state"
        self.config = folder / "config.yaml"
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        self.command: tuple[str, ...] = (sys.executable, "-m", "proxycore")
        self.start_server()
        self.kubeconfig = self.server.kubeconfig(
            folder / "kubeconfig", server=f"http://127.0.0.1:{SERVER_PORT}"
        )
        self.configure()
        self.server.apply(node())
        self.server.apply(service())
        self.server.apply(endpoint_slice(*ENDPOINTS))

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.server.stop()
        self.lab.close()

    # -- the API server --

    def start_server(self) -> None:
        listener = self.lab.node.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", SERVER_PORT))
        listener.listen(64)
        self.server.start(listener)

    def stop_server(self) -> None:
        self.server.stop()

    # -- the proxy --

    def configure(self, kube_proxy: str = "", own: str = "") -> None:
        """Write the configuration, in one step; lines are added to the two documents."""
        text = (
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n"
            f"detectLocalMode: NodeCIDR\nclientConnection:\n  kubeconfig: {self.kubeconfig}\n{kube_proxy}"
            "\n---\napiVersion: proxycore.io/v1alpha1\nkind: ProxycoreConfiguration\n"
            f"lastKnownGood:\n  file: {self.state}\n{own}\n"
        )
        temporary = self.config.with_suffix(".new")
        temporary.write_text(text)
        temporary.rename(self.config)

    def start(self, *arguments: str, command: tuple[str, ...] = ("run",)) -> None:
        argv = [*self.command, *command, "--config", str(self.config)]
        argv += ["--hostname-override", NODE_NAME, *arguments]
        environment = {**os.environ, "PYTHONWARNINGS": "error", **self.environment}
        with self.log.open("ab") as log:
            self.process = self.lab.node.popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def ready(self) -> None:
        """Wait until the node serves what the API server says."""
        wait_until(lambda: self.get("/readyz").status == 200, "ready")

    def run(self, *arguments: str) -> None:
        self.start(*arguments)
        self.ready()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(SECONDS) == 0

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_said(self, text: str) -> None:
        wait_until(lambda: text in self.said(), f"the log says {text!r}")

    # -- what it tells --

    def fetch(self, path: str, port: int = 10256) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body; raises OSError while nobody listens."""

        def go() -> tuple[int, Mapping[str, str], bytes]:
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
                connection.request("GET", path)
                response = connection.getresponse()
                return response.status, dict(response.getheaders()), response.read()

        return self.lab.node.call(go)

    def get(self, path: str, port: int = 10256) -> Answer:
        """A JSON answer; status 0 while nobody listens."""
        answer = Answer()
        with suppress(OSError, http.client.HTTPException):
            answer.status, _, body = self.fetch(path, port)
            answer.text = body.decode()
            with suppress(ValueError):
                answer.update(json.loads(body))
        return answer

    def check(self, name: str, endpoint: str = "/readyz", port: int = 10249) -> Any:
        """One check as it is now, with the objects that it is about; None while nobody listens."""
        answer = self.get(endpoint, port)
        return answer.check(name) if answer else None

    def red(
        self,
        name: str,
        endpoint: str = "/readyz",
        said: str = "",
        seconds: float = SECONDS,
        port: int = 10249,
    ) -> Any:
        """Wait until a check is not healthy, and says so; the check."""

        def found() -> Any:
            check = self.check(name, endpoint, port)
            return check if check and not check["healthy"] and said in str(check) else None

        try:
            return wait_until(found, f"{name} is red and says {said!r}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.check(name, endpoint, port)}") from None

    def green(self, name: str, endpoint: str = "/readyz") -> None:
        wait_until(lambda: (check := self.check(name, endpoint)) and check["healthy"], f"{name} is green")

    def metric(self, name: str, **labels: str) -> float | None:
        """The value of a series; None if there is none."""
        from prometheus_client.parser import text_string_to_metric_families

        _, _, body = self.fetch("/metrics", 10249)
        for family in text_string_to_metric_families(body.decode()):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return None

    # -- traffic --

    def dial(self, address: str = VIP, port: int = 80) -> str:
        """Who answers a pod there; `!` and the reason if nobody does."""
        return dial(self.lab, address, port)

    def stream(self, address: str = VIP) -> socket.socket:
        """An open connection."""
        made = self.lab.client("pod", "tcp", CLIENT_ADDRESSES["pod"][0])
        made.settimeout(SECONDS)
        made.connect((address, 80))
        return made


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        yield made
    finally:
        made.close()
