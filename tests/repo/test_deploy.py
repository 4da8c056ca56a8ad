"""deploy/: what is applied to a cluster hangs together, and with the program."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from proxycore.cli.kubeproxy import options_of_line, read_line
from proxycore.config import load
from proxycore.config.fields import ENVIRONMENT
from proxycore.health import ENDPOINTS
from proxycore.statefile import DEFAULT_PATH

ROOT = Path(__file__).parents[2]
KUBEADM = ROOT / "tests" / "unit" / "config" / "data" / "kubeadm-1.35.yaml"


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((ROOT / "deploy" / name).read_text()))


@pytest.fixture(scope="module")
def pod() -> dict:
    (daemonset,) = documents("daemonset.yaml")
    return daemonset["spec"]["template"]["spec"]


def containers(pod: dict) -> list[dict]:
    return [*pod["initContainers"], *pod["containers"]]


def options(container: dict):
    """As the program reads the container's command, with kubeadm's ConfigMap for a configuration."""
    program, *arguments = container["command"]
    assert Path(program).name == "kube-proxy"
    environ = {item["name"]: item.get("value", "node-1") for item in container.get("env", ())}
    arguments = [
        argument.replace("/var/lib/kube-proxy/config.conf", str(KUBEADM)).replace("$(NODE_NAME)", "node-1")
        for argument in arguments
    ]
    return options_of_line(read_line(arguments), environ)


def test_the_proxy_starts_as_it_is_told_to(pod: dict) -> None:
    (container,) = pod["containers"]
    found = options(container)
    assert (found.backend, found.node_name, found.source, found.init_only) == (
        "nft",
        "node-1",
        "kubernetes",
        False,
    )


def test_the_init_container_does_only_that(pod: dict) -> None:
    (container,) = pod["initContainers"]
    found = options(container)
    assert found.init_only
    # kubeadm's file names no mode, which would mean kube-proxy's own default.
    assert found.backend == "nft"
    assert container["securityContext"] == {"privileged": True}


def test_variables_of_ours_exist(pod: dict) -> None:
    names = {item["name"] for container in containers(pod) for item in container.get("env", ())}
    assert {name for name in names if name.startswith("PROXYCORE_")} <= ENVIRONMENT.keys()


def test_the_probes_ask_what_is_answered(pod: dict) -> None:
    (container,) = pod["containers"]
    port = int((load().config.healthz_bind_address or "").rpartition(":")[2])
    for probe, endpoint in (("livenessProbe", "livez"), ("readinessProbe", "readyz")):
        assert endpoint in ENDPOINTS
        asked = container[probe]["httpGet"]
        assert (asked["path"], asked["port"]) == (f"/{endpoint}", port)


def test_every_mount_has_its_volume_and_the_state_its_place(pod: dict) -> None:
    mounts = [mount for container in containers(pod) for mount in container["volumeMounts"]]
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in pod["volumes"]}
    assert str(Path(DEFAULT_PATH).parent) in {mount["mountPath"] for mount in mounts}


def test_the_account_is_the_one_that_has_the_role(pod: dict) -> None:
    (account,) = (item for item in documents("rbac.yaml") if item["kind"] == "ServiceAccount")
    assert account["metadata"] == {"name": pod["serviceAccountName"], "namespace": "kube-system"}


def test_it_has_no_more_rights_than_the_pages_say(pod: dict) -> None:
    (container,) = pod["containers"]
    rights = container["securityContext"]["capabilities"]
    assert rights["drop"] == ["ALL"]
    page = (ROOT / "docs" / "cluster.md").read_text()
    assert all(f"CAP_{right}" in page for right in rights["add"])
