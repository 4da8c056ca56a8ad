"""deploy/rbac.yaml grants what a full run asks for: no more, no less."""

from __future__ import annotations

from pathlib import Path

import yaml

from proxycore.backend import BackendInfo
from proxycore.changes import ChangeBatch
from proxycore.model import HostState, ServicePortName
from proxycore.observer import ObserverContext
from proxycore.observers import events
from proxycore.source import APIServer
from proxycore.status import Facts, Status
from proxycore.testing.apiserver import FakeAPIServer

from .kubernetes_run import NODE, endpoint_slice, followed, live, node, service, service_cidr

RBAC = Path(__file__).parents[2] / "deploy" / "rbac.yaml"
WEB = ServicePortName("default", "web", "", "TCP", "IPv4")


def requested(server):
    """Group, resource and verb of every request, as the API server's authorizer sees them."""
    found = set()
    for request in server.requests:
        steps = request.path.strip("/").split("/")
        found.add(("" if steps[0] == "api" else steps[1], request.resource, request.verb))
    return found


def granted():
    documents = list(yaml.safe_load_all(RBAC.read_text()))
    kinds = {document["kind"]: document for document in documents}
    assert len(documents) == len(kinds) == 3
    account, role, binding = (kinds[k] for k in ("ServiceAccount", "ClusterRole", "ClusterRoleBinding"))
    assert account["metadata"] == {"name": "proxycore", "namespace": "kube-system"}
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["roleRef"]["kind"] == "ClusterRole"
    assert binding["subjects"] == [{"kind": "ServiceAccount", **account["metadata"]}]
    return [
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    ]


def test_the_role_is_what_a_run_asks_for(monkeypatch):
    monkeypatch.setattr(events, "GATHER_SECONDS", 0.0)
    with FakeAPIServer() as server:
        for item in (node(), service("web"), endpoint_slice("web-1", "web", "10.1.0.1"), service_cidr()):
            server.apply(item)
        observer = events.plugin()
        facts = Facts(now=0.0, monotonic=0.0, status=Status(quarantined={WEB: "no"}))
        context = ObserverContext(
            host=HostState(node_name=NODE),
            backend=BackendInfo(name="mem", summary="", api="", capabilities=frozenset()),
            healthy=lambda: True,
            facts=lambda: facts,
            api_server=APIServer(master=server.url, qps=0.0),
        )
        with followed(server) as sink:
            sink.until(live)
            # Every turn that things can take: listing again, watching again, changes.
            server.apply(service("web", port=81))
            server.fail("services", "watch", gone=True)
            server.end_watches()
            observer.proxycore_observer_start(context)
            observer.proxycore_observer_failed(ChangeBatch(generation=1, changes=()))
            server.until(lambda s: len(s.events) == 2 and s.count("services", "watch") >= 3)
            observer.proxycore_observer_stop()
        assert [event["reason"] for event in server.events] == ["Starting", "NotProgrammed"]
        rights = granted()
        assert len(rights) == len(set(rights))
        assert set(rights) == requested(server)
