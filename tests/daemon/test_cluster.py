"""`proxyctl run` against an API server: what it serves, and what it takes to lose a connection."""

from __future__ import annotations

import json
import threading

import pytest

from proxycore import statefile

from .conftest import ENDPOINTS, VIP, Cluster, Dialer, ask, endpoint_slice, node, service, wait_until

pytestmark = pytest.mark.root


def test_services_are_served_and_followed(cluster: Cluster) -> None:
    cluster.run()
    assert cluster.dial() in ENDPOINTS
    cluster.server.apply(endpoint_slice("10.180.0.9"))
    wait_until(lambda: cluster.dial() == "10.180.0.9", "the new endpoint answers")
    cluster.server.delete("Service", "default", "web")
    wait_until(lambda: cluster.dial().startswith("!"), "the Service is gone")
    cluster.stop()
    assert "level=error" not in cluster.said()


def test_the_nodes_pod_cidr_and_zone_are_followed(cluster: Cluster) -> None:
    cluster.run()
    assert (
        "10.180.0.0/24"
        in cluster.lab.node.run(["nft", "list", "set", "ip", "proxycore", "local-pods"]).stdout
    )
    cluster.server.apply(node(podCIDRs=["10.181.0.0/24"]))
    wait_until(
        lambda: (
            "10.181.0.0/24"
            in cluster.lab.node.run(["nft", "list", "set", "ip", "proxycore", "local-pods"]).stdout
        ),
        "the new pod CIDR",
    )
    hinted = endpoint_slice(*ENDPOINTS)
    for number, endpoint in enumerate(hinted["endpoints"]):
        endpoint["hints"] = {"forZones": [{"name": f"zone-{number}"}]}
    cluster.server.apply(hinted)
    cluster.server.apply(node(metadata={"labels": {"topology.kubernetes.io/zone": "zone-1"}}))
    wait_until(lambda: {cluster.dial() for _ in range(6)} == {ENDPOINTS[1]}, "only the zone's endpoint")


# -- no connection is lost that need not be ------------------------------------------------------------------------


def test_the_api_servers_plug(cluster: Cluster) -> None:
    cluster.run()
    wait_until(lambda: cluster.state.exists(), "the state is saved")
    with Dialer(cluster.lab) as dialer, cluster.stream() as stream:
        who = ask(stream)
        cluster.stop_server()
        dialer.more()
        # The proxy ends, and another one starts, with nobody to ask.
        cluster.kill()
        dialer.more()
        cluster.start()
        cluster.wait_said("serving the last known good state")
        wait_until(
            lambda: (check := cluster.check("programmed")) and check["healthy"], "programmed from the file"
        )
        dialer.more()
        cluster.start_server()
        cluster.ready()
        cluster.server.apply(endpoint_slice(*ENDPOINTS[:2]))
        wait_until(lambda: cluster.metric("proxycore_changes_pending") in (0.0, None), "all in force")
        dialer.more()
        assert ask(stream) == who
        assert dialer.failures == []


def test_the_kernels_table_with_and_without_the_api_server(cluster: Cluster) -> None:
    cluster.run()
    wait_until(lambda: cluster.state.exists(), "the state is saved")
    cluster.stop_server()
    for family in ("ip", "ip6"):
        cluster.lab.node.run(["nft", "delete", "table", family, "proxycore"])
    # Who dials in between meets nothing; the table is back within seconds.
    wait_until(lambda: cluster.dial() in ENDPOINTS, "the table is back")
    cluster.kill()
    cluster.start()
    cluster.wait_said("serving the last known good state")
    wait_until(
        lambda: (check := cluster.check("programmed")) and check["healthy"], "programmed from the file"
    )
    cluster.lab.node.run(["nft", "flush", "ruleset"])
    wait_until(lambda: cluster.dial() in ENDPOINTS, "the table is back after a restart, too")


def test_a_reboot_without_the_api_server(cluster: Cluster) -> None:
    cluster.run()
    wait_until(lambda: cluster.state.exists(), "the state is saved")
    cluster.stop()
    cluster.stop_server()
    cluster.lab.node.run(["nft", "flush", "ruleset"])
    assert cluster.dial().startswith("!")
    cluster.start()
    wait_until(lambda: cluster.dial() in ENDPOINTS, "served from the file")
    assert "serving the state that was saved" in cluster.get("/readyz", 10249).text
    # What happened meanwhile is caught up with.
    cluster.server.apply(endpoint_slice("10.180.0.9"))
    cluster.start_server()
    wait_until(lambda: cluster.dial() == "10.180.0.9", "what the API server says now")
    cluster.ready()


@pytest.mark.parametrize("damage", ["torn", "foreign"])
def test_the_disks_file(cluster: Cluster, damage: str) -> None:
    cluster.run()
    wait_until(lambda: cluster.state.exists(), "the state is saved")
    with Dialer(cluster.lab) as dialer:
        cluster.kill()
        if damage == "torn":
            bad = cluster.state.read_bytes()[:-10]
        else:
            bad = cluster.state.read_bytes().replace(b'"node":"test-node"', b'"node":"another"', 1)
        cluster.state.write_bytes(bad)
        cluster.stop_server()
        cluster.start()
        cluster.wait_said("the last known good state cannot be used")
        dialer.more()
        cluster.start_server()
        cluster.ready()
        dialer.more()
        assert dialer.failures == []
    kept = cluster.state.with_name("state.refused")
    wait_until(kept.exists, "the bad file is kept")
    assert kept.read_bytes() == bad
    wait_until(cluster.state.exists, "a good file is written")


def test_a_file_that_misses_changes_does_not_undo_them(cluster: Cluster) -> None:
    cluster.run()
    wait_until(lambda: cluster.state.exists(), "the state is saved")
    saved = statefile.read(str(cluster.state))
    assert saved is not None
    statefile.mark_incomplete(str(cluster.state), saved.header.node, saved.header.origin)
    cluster.kill()
    cluster.stop_server()
    with Dialer(cluster.lab) as dialer:
        cluster.start()
        cluster.wait_said("nothing is programmed until this is mended")
        dialer.more()
        # In the kernel alone there is nothing to lose.
        cluster.kill()
        cluster.lab.node.run(["nft", "flush", "ruleset"])
        cluster.start()
        dialer.answers.clear()
        dialer.more()


def test_a_node_that_may_not_be_read_for_a_moment_is_as_it_was_saved(cluster: Cluster) -> None:
    def pods() -> str:
        return cluster.lab.node.run(["nft", "list", "set", "ip", "proxycore", "local-pods"]).stdout

    cluster.run()
    wait_until(lambda: cluster.state.exists(), "the state is saved")
    cluster.stop()
    # An API server that has just started refuses until it knows its roles.
    refusing = cluster.server.fail("nodes", status=403, times=None)
    cluster.start()
    wait_until(lambda: (check := cluster.check("programmed")) and check["healthy"], "programmed")
    assert "10.180.0.0/24" in pods()
    assert cluster.check("node", "/healthz")["healthy"]
    refusing.over()
    cluster.server.apply(node(podCIDRs=["10.181.0.0/24"]))
    wait_until(lambda: "10.181.0.0/24" in pods(), "the Node is followed again")


def test_no_connect_fails_over_restarts_and_changes(cluster: Cluster) -> None:
    cluster.run()
    stop = threading.Event()

    def churn() -> None:
        number = 0
        while not stop.wait(0.05):
            number += 1
            cluster.server.apply(endpoint_slice(*ENDPOINTS[: 1 + number % 3]))
            cluster.server.apply(
                service("other", "172.30.0.77", sessionAffinity="ClientIP" if number % 2 else "None")
            )

    changing = threading.Thread(target=churn, daemon=True)
    with Dialer(cluster.lab) as dialer, cluster.stream() as stream:
        who = ask(stream)
        changing.start()
        for end in (cluster.kill, cluster.stop, cluster.kill):
            dialer.more()
            end()
            dialer.more()
            cluster.run()
        stop.set()
        changing.join()
        assert ask(stream) == who
        assert dialer.failures == []


# -- the daemon's other sides --------------------------------------------------------------------------------------


def test_kube_proxys_command_line_and_configuration(cluster: Cluster) -> None:
    cluster.start(command=("kube-proxy",))
    cluster.ready()
    assert cluster.dial(VIP) in ENDPOINTS
    assert cluster.fetch("/proxyMode", 10249)[2] == b"nftables"
    configz = json.loads(cluster.fetch("/configz", 10249)[2])
    assert configz["kubeproxy.config.k8s.io"]["mode"] == "nftables"


def test_a_new_configuration_is_taken_over(cluster: Cluster) -> None:
    open_ports = [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080}]
    cluster.server.apply(service(type="NodePort", ports=open_ports))
    cluster.run()
    assert cluster.dial("192.168.0.2", 30080) in ENDPOINTS
    cluster.configure('metricsBindAddress: "127.0.0.1:10333"\n')
    wait_until(lambda: cluster.get("/livez", 10333).status == 200, "the new metrics address")
    assert cluster.get("/livez", 10249).status == 0
    cluster.configure("nodePortAddresses: [192.168.1.0/24]\n")
    wait_until(lambda: cluster.dial("192.168.1.2", 30080) in ENDPOINTS, "node ports there")
    wait_until(lambda: cluster.dial("192.168.0.2", 30080).startswith("!"), "and no more here")
    said = cluster.said()
    assert "metricsBindAddress" in said
    assert "nodePortAddresses" in said


def test_the_metrics_count(cluster: Cluster) -> None:
    cluster.run()
    before = cluster.metric("kubeproxy_sync_proxy_rules_endpoint_changes_total")
    assert before is not None
    cluster.server.apply(endpoint_slice("10.180.0.9"))
    wait_until(
        lambda: cluster.metric("kubeproxy_sync_proxy_rules_endpoint_changes_total") == before + 1,
        "one more change",
    )
    wait_until(lambda: cluster.metric("kubeproxy_sync_proxy_rules_endpoint_changes_pending") == 0, "in force")
    assert cluster.metric("rest_client_requests_total", code="200", method="GET") is not None
    assert cluster.metric("kubeproxy_sync_proxy_rules_last_timestamp_seconds", ip_family="IPv4") is not None


def test_events_are_told_to_the_api_server(cluster: Cluster) -> None:
    cluster.run()
    wait_until(
        lambda: any(event["reason"] == "Starting" for event in cluster.server.events), "the Event Starting"
    )
