"""What goes wrong turns the right check red, and /livez only where a restart is the cure."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import pytest

from .conftest import VIP, Cluster, endpoint_slice, node, service, wait_until

pytestmark = pytest.mark.root

PERIOD_SECONDS = 1.0
PROMPT_SECONDS = 15.0
"""Two periods, and what a busy machine takes."""
SABOTEUR = Path(__file__).with_name("saboteur.py")


class Node:
    """A cluster whose proxy can be sabotaged."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.orders = folder / "orders"
        cluster.command = (sys.executable, str(SABOTEUR))
        cluster.environment["SABOTAGE"] = str(self.orders)
        cluster.configure(f"nftables:\n  syncPeriod: {PERIOD_SECONDS:g}s\n", "apiServer:\n  staleAfter: 1s\n")

    def break_(self, *words: str) -> None:
        self.orders.write_text(" ".join(words))

    def mend(self) -> None:
        self.orders.unlink(missing_ok=True)

    def red(self, check: str, endpoint: str, *, said: str = "", port: int = 10249) -> None:
        """The check turns red, and turns this endpoint red where it gates it."""
        found = self.cluster.red(check, endpoint, said, PROMPT_SECONDS, port)
        if endpoint.strip("/") in found["gates"]:
            assert self.cluster.get(endpoint).status == 503

    def green(self, check: str, endpoint: str = "/readyz") -> None:
        self.cluster.green(check, endpoint)

    def assert_alive(self) -> None:
        """Nobody restarts it."""
        assert self.cluster.get("/livez").status == 200


@pytest.fixture
def sick(cluster: Cluster, tmp_path: Path) -> Node:
    return Node(cluster, tmp_path)


def test_an_engine_that_hangs(sick: Node) -> None:
    sick.cluster.run()
    sick.break_("engine-hangs")
    sick.cluster.lab.node.ip(["addr", "add", "192.168.0.77/24", "dev", "eth0"])
    sick.red("engine", "/livez")
    sick.mend()
    sick.green("engine", "/livez")


def test_a_backend_that_hangs(sick: Node) -> None:
    sick.cluster.run()
    sick.break_("backend-hangs")
    sick.cluster.server.apply(endpoint_slice("10.180.0.9"))
    sick.red("backend", "/livez", said="apply of nft")
    sick.mend()
    sick.green("backend", "/livez")


def test_a_kernel_that_refuses_everything(sick: Node) -> None:
    sick.cluster.run()
    sick.break_("kernel-refuses")
    for number in range(1, 5):
        # One that is refused alone would be set aside.
        sick.cluster.server.apply(service(f"more-{number}", f"172.30.0.{100 + number}"))
    sick.cluster.server.apply(endpoint_slice("10.180.0.9"))
    sick.red("pending", "/readyz", said="Operation not permitted")
    assert sick.cluster.get("/healthz").status == 503
    sick.assert_alive()
    sick.mend()
    sick.green("pending")
    assert sick.cluster.dial() == "10.180.0.9"


def test_a_kernel_that_refuses_from_the_start(sick: Node) -> None:
    sick.break_("kernel-refuses")
    sick.cluster.start()
    sick.red("programmed", "/readyz")
    sick.assert_alive()
    sick.mend()
    sick.green("programmed")


def test_a_service_that_is_refused(sick: Node) -> None:
    sick.cluster.run()
    sick.break_("service-refused")
    sick.cluster.server.apply(service("unlucky", "172.30.0.66"))
    sick.red("quarantined", "/readyz", said="it is bad luck")
    # Others are served, however long it lasts.
    time.sleep(4 * PERIOD_SECONDS)
    assert sick.cluster.check("quarantined")["healthy"] is False
    assert sick.cluster.get("/readyz").status == 200
    assert sick.cluster.get("/healthz").status == 200
    sick.assert_alive()
    sick.mend()
    sick.green("quarantined")


def test_an_api_server_that_is_not_there_at_the_start(sick: Node) -> None:
    sick.cluster.stop_server()
    sick.cluster.start()
    sick.red("source", "/readyz", said="refused")
    sick.red("programmed", "/healthz")
    sick.assert_alive()
    sick.cluster.start_server()
    sick.cluster.ready()


def test_an_api_server_that_goes(sick: Node) -> None:
    sick.cluster.run()
    sick.cluster.stop_server()
    sick.red("source", "/readyz", said="stale")
    sick.assert_alive()
    assert sick.cluster.get("/healthz").status == 200
    assert sick.cluster.dial().startswith("10.180.0.")
    sick.cluster.start_server()
    sick.green("source")


def test_an_api_server_that_says_nothing_any_more(sick: Node) -> None:
    sick.cluster.run()
    sick.cluster.server.black_hole()
    sick.cluster.server.cut_watches(reset=True)
    sick.red("source", "/readyz")
    sick.assert_alive()


def test_credentials_that_are_refused(sick: Node) -> None:
    sick.cluster.run()
    sick.cluster.server.tokens = set()
    sick.cluster.server.cut_watches()
    sick.red("source", "/readyz", said="401")
    sick.assert_alive()
    sick.cluster.server.tokens = None
    sick.green("source")


def test_a_right_that_is_missing(sick: Node) -> None:
    sick.cluster.server.fail("endpointslices", status=403, times=None)
    sick.cluster.start()
    sick.red("source", "/readyz", said="403")
    sick.assert_alive()
    sick.cluster.server.heal()
    sick.cluster.ready()


def test_an_object_that_cannot_be_read(sick: Node) -> None:
    sick.cluster.run()
    sick.cluster.server.apply(service(ports=[{"name": "http", "port": 80000}]))
    sick.red("objects", "/readyz", said="Service default/web: spec.ports[0].port")
    assert sick.cluster.get("/readyz").status == 200
    sick.assert_alive()
    assert sick.cluster.dial().startswith("10.180.0.")
    sick.cluster.server.apply(service())
    sick.green("objects")


@pytest.mark.parametrize("word", ["observer-fails", "observer-hangs"])
def test_an_observer_that_does_not_work(sick: Node, word: str) -> None:
    sick.cluster.run()
    sick.break_(word)
    sick.cluster.server.apply(endpoint_slice("10.180.0.9"))
    sick.red("observers", "/readyz", said="conntrack")
    assert sick.cluster.get("/readyz").status == 200
    sick.assert_alive()
    sick.mend()
    sick.cluster.server.apply(endpoint_slice("10.180.0.8"))
    sick.green("observers")


def test_a_disk_that_takes_nothing(sick: Node) -> None:
    sick.cluster.state = sick.cluster.folder / "file" / "state"
    sick.cluster.state.parent.write_text("no folder")
    sick.cluster.configure()
    sick.cluster.run()
    sick.red("saved-state", "/readyz")
    assert sick.cluster.get("/readyz").status == 200
    sick.assert_alive()


def test_a_configuration_that_is_wrong(sick: Node) -> None:
    sick.cluster.run()
    sick.cluster.configure("clusterCIDR: nonsense\n")
    sick.red("configuration", "/readyz", said="clusterCIDR")
    assert sick.cluster.get("/readyz").status == 200
    sick.assert_alive()
    sick.cluster.configure()
    sick.green("configuration")


def test_a_node_that_is_about_to_go(sick: Node) -> None:
    sick.cluster.run()
    sick.cluster.server.apply(
        node(taints=[{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}])
    )
    sick.red("node", "/healthz", said="ToBeDeletedByClusterAutoscaler")
    assert sick.cluster.get("/healthz")["nodeEligible"] is False
    sick.assert_alive()
    sick.cluster.server.apply(node())
    sick.green("node", "/healthz")
    sick.cluster.server.apply(node(metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"}))
    sick.red("node", "/healthz", said="being deleted")
    sick.assert_alive()


def test_a_source_that_ends_by_a_bug(sick: Node) -> None:
    sick.cluster.run()
    sick.break_("source-fails")
    sick.red("source-thread", "/livez", said="a bug")
    assert sick.cluster.dial().startswith("10.180.0.")


def test_a_port_that_is_taken(sick: Node) -> None:
    taken = sick.cluster.lab.node.socket(socket.AF_INET, socket.SOCK_STREAM)
    with taken:
        taken.bind(("127.0.0.1", 10249))
        taken.listen()
        sick.cluster.run()
        sick.red("servers", "/readyz", said="10249", port=10256)
        assert sick.cluster.get("/readyz").status == 200
        sick.assert_alive()
    wait_until(lambda: sick.cluster.get("/livez", 10249).status == 200, "the port is opened once it is free")


def test_a_table_that_cannot_be_put_right(sick: Node) -> None:
    sick.cluster.run()
    sick.break_("kernel-refuses")
    sick.cluster.lab.node.run(["nft", "delete", "table", "ip", "proxycore"])
    sick.red("drift", "/readyz")
    sick.red("pending", "/readyz")
    sick.assert_alive()
    sick.mend()
    sick.green("drift")
    assert sick.cluster.dial(VIP).startswith("10.180.0.")
