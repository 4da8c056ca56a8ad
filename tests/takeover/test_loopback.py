"""Packets to loopback addresses are routed only behind a guard, and who had them routed is remembered."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest

from proxycore import hostsetup, logs
from proxycore.config.model import Config, Conntrack
from proxycore.errors import KernelError
from proxycore.kernel import loopback, xtables
from proxycore.plugins import load_backend
from proxycore.testing.clients import wait_until
from proxycore.testing.cluster import Cluster
from proxycore.testing.conformance import problems
from proxycore.testing.lab import Lab
from proxycore.testing.netns import Namespace
from proxycore.testing.states import HOST, context

from .rules import OTHER_VARIANT, VARIANTS, load, others, saved

pytestmark = pytest.mark.root

KNOB = Path("/proc/sys/net/ipv4/conf/all/route_localnet")
GUARD = (
    '-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" '
    "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
)
REMEMBERED = ":KUBE-SVC-LOCALNET "


@pytest.fixture
def namespace(tmp_path, monkeypatch) -> Iterator[Namespace]:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    with Namespace("loopback") as made:
        yield made


@pytest.fixture
def said() -> Iterator[StringIO]:
    stream = StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure("json", stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def knob(namespace: Namespace, value: str | None = None) -> str:
    def work() -> str:
        if value is not None:
            KNOB.write_text(value)
        return KNOB.read_text().strip()

    return namespace.call(work)


# -- is there a guard? --


def test_nothing_guards_an_empty_namespace_and_nothing_is_made_by_looking(namespace):
    assert namespace.call(loopback.guarded) == ""
    assert namespace.call(loopback.remembered) == frozenset()
    assert namespace.call(lambda: xtables.legacy_tables("IPv4")) == frozenset()
    assert namespace.run(["nft", "list", "ruleset"]).stdout == ""


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_kubelets_guard(namespace, variant):
    load(namespace, variant, "IPv4", others("IPv4"))
    assert namespace.call(loopback.guarded) == f"iptables-{variant}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "lines",
    [
        [GUARD],
        [GUARD, "-A OUTPUT -j KUBE-FIREWALL"],
        [GUARD, "-A INPUT -p tcp -j KUBE-FIREWALL"],
        ["-A INPUT -j KUBE-FIREWALL"],
        ["-A INPUT -j KUBE-FIREWALL", GUARD.replace("-d 127.0.0.0/8", "-d 127.0.0.1/32")],
        ["-A INPUT -j KUBE-FIREWALL", GUARD.replace("-j DROP", "-p tcp -j DROP")],
        ["-A INPUT -j KUBE-FIREWALL", GUARD.replace("-j DROP", "-j ACCEPT")],
    ],
)
def test_what_is_no_guard_in_force(namespace, variant, lines):
    load(namespace, variant, "IPv4", "\n".join(("*filter", ":KUBE-FIREWALL - [0:0]", *lines, "COMMIT", "")))
    assert namespace.call(loopback.guarded) == ""


# -- an init container --


def init_only(
    namespace: Namespace, tmp_path: Path, *, takeover: str = "auto", **values: object
) -> list[dict[str, object]]:
    """What it says."""
    tmp_path.mkdir(exist_ok=True)
    config = tmp_path / "config.yaml"
    kube_proxy = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        **values,
    }
    config.write_text(json.dumps(kube_proxy))
    words = ["run", "--init-only", "--backend", "iptables", "--log-format", "json", "--config", str(config)]
    words += ["--takeover", takeover]
    (tmp_path / "objects").mkdir(exist_ok=True)
    done = namespace.run(
        [sys.executable, "-m", "proxycore", *words, "--source", f"file:{tmp_path / 'objects'}"], check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stderr.splitlines()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_init_container_sets_it_behind_a_kubelets_guard(namespace, tmp_path, variant):
    load(namespace, variant, "IPv4", others("IPv4"))
    before = saved(namespace, variant, "IPv4")
    init_only(namespace, tmp_path)
    assert knob(namespace) == "1"
    after = saved(namespace, variant, "IPv4")
    assert [line for line in after.splitlines() if not line.startswith(REMEMBERED)] == before.splitlines()
    assert after != before
    assert REMEMBERED not in saved(namespace, OTHER_VARIANT[variant], "IPv4")
    # The kubelet has it that packets stay guarded; without it the setting goes back.
    load(namespace, variant, "IPv4", "*mangle\n-X KUBE-KUBELET-CANARY\n-X KUBE-IPTABLES-HINT\nCOMMIT\n")
    assert "net.ipv4.conf.all.route_localnet = 1" in cleaned(namespace)
    assert knob(namespace) == "0"
    assert REMEMBERED not in saved(namespace, variant, "IPv4")
    assert GUARD in saved(namespace, variant, "IPv4")
    assert cleaned(namespace) == ()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_init_container_remembers_nothing_where_it_is_set_already(namespace, tmp_path, variant):
    load(namespace, variant, "IPv4", others("IPv4"))
    knob(namespace, "1")
    init_only(namespace, tmp_path)
    assert REMEMBERED not in saved(namespace, variant, "IPv4")


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_kube_proxy_goes_on_with_stays_set(namespace, tmp_path, variant):
    """An init container of ours was here once, and never a run."""
    load(namespace, variant, "IPv4", others("IPv4"))
    init_only(namespace, tmp_path)
    load(namespace, variant, "IPv4", "*mangle\n-X KUBE-KUBELET-CANARY\n-X KUBE-IPTABLES-HINT\nCOMMIT\n")
    load(namespace, variant, "IPv4", "*nat\n:KUBE-SERVICES - [0:0]\n-A OUTPUT -j KUBE-SERVICES\nCOMMIT\n")
    before = saved(namespace, variant, "IPv4")
    assert cleaned(namespace) == ()
    assert knob(namespace) == "1"
    assert saved(namespace, variant, "IPv4") == before


def cleaned(namespace: Namespace) -> tuple[str, ...]:
    backend = load_backend("iptables")
    return namespace.call(lambda: backend.call("proxycore_backend_cleanup", context=context(HOST))).removed


def test_an_init_container_leaves_it_to_the_run_without_a_guard(namespace, tmp_path):
    [line] = [line for line in init_only(namespace, tmp_path) if "route_localnet" in str(line["msg"])]
    assert line["level"] == "info"
    assert "once its guard is in force" in line["msg"]
    assert knob(namespace) == "0"
    assert namespace.run(["nft", "list", "ruleset"]).stdout == ""


def test_an_init_container_leaves_it_where_no_node_ports_are_wanted_there(namespace, tmp_path):
    load(namespace, "nft", "IPv4", others("IPv4"))
    assert init_only(namespace, tmp_path, iptables={"localhostNodePorts": False}) == []
    assert knob(namespace) == "0"


# -- remembering --


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("guarded", [True, False])
def test_it_is_remembered_before_it_is_set(namespace, said, monkeypatch, variant, guarded):
    config = Config(conntrack=Conntrack(max_per_core=0), localhost_node_ports=True)
    log = logs.get("host")
    tools = [f"iptables-{variant}", f"ip6tables-{variant}"]
    seen: list[str] = []
    remember = loopback.remember

    def remembering(names) -> None:
        seen.append(KNOB.read_text().strip())
        remember(names)

    monkeypatch.setattr(loopback, "remember", remembering)
    assert namespace.call(lambda: hostsetup.route_loopback(config, tools, guarded=True, log=log))
    assert (seen, knob(namespace)) == (["0"], "1")
    assert REMEMBERED in saved(namespace, variant, "IPv4")
    assert REMEMBERED not in saved(namespace, variant, "IPv6")
    # What a later run finds set by an earlier one goes on being remembered, also in another variant.
    other = [name.replace(variant, {"nft": "legacy", "legacy": "nft"}[variant]) for name in tools]
    assert namespace.call(lambda: hostsetup.route_loopback(config, other, guarded=guarded, log=log))
    assert all(REMEMBERED in saved(namespace, each, "IPv4") for each in VARIANTS)


def test_without_a_guard_nothing_is_set(namespace, said):
    config = Config(conntrack=Conntrack(max_per_core=0), localhost_node_ports=True)
    assert namespace.call(
        lambda: hostsetup.route_loopback(config, ["iptables-nft"], guarded=False, log=logs.get("host"))
    )
    assert knob(namespace) == "0"
    assert namespace.run(["nft", "list", "ruleset"]).stdout == ""


def test_what_others_set_is_not_remembered(namespace, said):
    knob(namespace, "1")
    config = Config(conntrack=Conntrack(max_per_core=0), localhost_node_ports=True)
    assert namespace.call(
        lambda: hostsetup.route_loopback(config, ["iptables-nft"], guarded=True, log=logs.get("host"))
    )
    assert namespace.run(["nft", "list", "ruleset"]).stdout == ""


def test_what_cannot_be_remembered_is_told_and_no_obstacle(namespace, said, monkeypatch):
    def fails(*arguments: object) -> None:
        raise KernelError("out of luck")

    monkeypatch.setattr(xtables, "restore", fails)
    config = Config(conntrack=Conntrack(max_per_core=0), localhost_node_ports=True)
    assert namespace.call(
        lambda: hostsetup.route_loopback(config, ["iptables-nft"], guarded=True, log=logs.get("host"))
    )
    assert knob(namespace) == "1"
    assert "out of luck" in said.getvalue()


# -- a whole run --


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    with Lab([80, 8080]) as made:
        yield made


@pytest.fixture
def cluster(lab: Lab, tmp_path: Path) -> Cluster:
    made = Cluster(lab, tmp_path, ["172.30.0.41", "fd00:172:30::41"], node_ports={0: 30041})
    made.set_endpoints(0, ["10.180.0.1"])
    made.set_endpoints(1, ["fd00:10::1"])
    return made


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    if reason := problems("iptables", {"variant": request.param}):
        pytest.skip(reason)
    return request.param


def test_a_run_sets_it_once_and_cleaning_up_takes_it_back(lab, cluster, variant):
    knob(lab.node, "0")
    cluster.configure("iptables", {"variant": variant}, {"nodePortAddresses": ["0.0.0.0/0"]})
    with cluster.proxy() as proxy:
        wait_until(lambda: knob(lab.node) == "1", proxy.tail)
        rules = saved(lab.node, variant, "IPv4")
        assert GUARD in rules
        assert REMEMBERED in rules
        cluster.set_endpoints(0, ["10.180.0.2"])
        wait_until(lambda: "10.180.0.2" in saved(lab.node, variant, "IPv4"), proxy.tail)
        assert REMEMBERED in saved(lab.node, variant, "IPv4")
        assert proxy.stop() is None, proxy.tail()
    # The next run finds it set, and goes on remembering.
    with cluster.proxy() as proxy:
        wait_until(lambda: "msg=synced" in cluster.said(), proxy.tail)
        cluster.set_endpoints(0, ["10.180.0.3"])
        wait_until(lambda: "10.180.0.3" in saved(lab.node, variant, "IPv4"), proxy.tail)
        assert proxy.stop() is None, proxy.tail()
    assert REMEMBERED in saved(lab.node, variant, "IPv4")
    assert "net.ipv4.conf.all.route_localnet = 1" in cleaned(lab.node)
    assert knob(lab.node) == "0"
    assert "KUBE" not in saved(lab.node, variant, "IPv4")


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({"nodePortAddresses": ["192.168.0.2/32"]}, {}),
        ({"nodePortAddresses": ["0.0.0.0/0"], "iptables": {"localhostNodePorts": False}}, {}),
        ({"nodePortAddresses": ["0.0.0.0/0"]}, {"localhostNodePorts": False}),
    ],
)
def test_a_run_without_a_guard_leaves_it(lab, cluster, values, options):
    if reason := problems("iptables", {"variant": "nft"}):
        pytest.skip(reason)
    knob(lab.node, "0")
    cluster.configure("iptables", {"variant": "nft", **options}, values, {"takeover": "auto"})
    load(lab.node, "legacy", "IPv4", "*nat\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n")
    with cluster.proxy() as proxy:
        # The take-over comes after it.
        wait_until(lambda: "KUBE" not in saved(lab.node, "legacy", "IPv4"), proxy.tail)
        assert knob(lab.node) == "0"
        assert "KUBE-FIREWALL" not in saved(lab.node, "nft", "IPv4")
        assert REMEMBERED not in saved(lab.node, "nft", "IPv4")
        assert proxy.stop() is None, proxy.tail()


@pytest.mark.parametrize("mode", ["refuse", "auto"])
def test_a_run_goes_on_after_an_init_container(lab, cluster, tmp_path, variant, mode):
    load(lab.node, variant, "IPv4", others("IPv4"))
    knob(lab.node, "0")
    init_only(lab.node, tmp_path / "init", takeover=mode)
    assert knob(lab.node) == "1"
    assert REMEMBERED in saved(lab.node, variant, "IPv4")
    cluster.configure("iptables", {"variant": variant}, more={"takeover": mode})
    with cluster.proxy() as proxy:
        wait_until(lambda: "10.180.0.1" in saved(lab.node, variant, "IPv4"), proxy.tail)
        assert proxy.stop() is None, proxy.tail()
    assert "level=error" not in cluster.said()
    assert REMEMBERED in saved(lab.node, variant, "IPv4")
