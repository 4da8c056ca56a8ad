"""What /metrics says: names, types and labels as kube-proxy's, and what batches and facts amount to."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from proxycore import apiclient
from proxycore.backend import INVALID_DROPPED, LOCALHOST_NODE_PORTS_ACCEPTED, ApplyResult, BackendInfo
from proxycore.changes import UNKNOWN, ChangeBatch, ServiceChange, change
from proxycore.config.gates import GATES
from proxycore.metrics import build, families, plugin, requests
from proxycore.metrics.exposition import Collector, Registry, expose, le
from proxycore.metrics.observer import MetricsObserver
from proxycore.metrics.values import Family
from proxycore.model import (
    Frontend,
    FrontendKind,
    HostState,
    Pool,
    PoolName,
    Route,
    Routes,
    ServicePortName,
    ServiceState,
    WhenEmpty,
)
from proxycore.observer import ObserverContext
from proxycore.observers import conntrack
from proxycore.servers import Servers
from proxycore.source import Health
from proxycore.status import ConfigStatus, Facts, ObserverStatus, SavedStatus, ServerStatus, Status

ROOT = Path(__file__).parents[2]
NOW = 1_800_000_000.0
HOST = HostState(node_name="here")
INFO = BackendInfo(name="nft", summary="", api="0.1", capabilities=frozenset())
MODES = ("iptables", "ipvs", "nftables")


def name(service: str = "web", family: str = "IPv4") -> ServicePortName:
    return ServicePortName("shop", service, "http", "TCP", family)


def lacking(of: ServicePortName) -> ServiceState:
    """A Service port with internal policy Local and endpoints on other nodes alone."""
    local = Route(PoolName.LOCAL, False)
    cluster_ip = Frontend(
        kind=FrontendKind.CLUSTER_IP,
        address="10.96.0.1",
        port=80,
        protocol="TCP",
        routes=Routes(local_pod=local, node=local, outside=local),
    )
    return ServiceState(name=of, frontends=(cluster_ip,), local=Pool(when_empty=WhenEmpty.DROP))


def put(state: ServiceState, trigger: float | None = None) -> ServiceChange:
    return msgspec.structs.replace(change(state.name, None, state), trigger_time=trigger)


def batch(*changes: ServiceChange, full: bool = False) -> ChangeBatch:
    return ChangeBatch(generation=1, changes=changes, full=full)


APPLIED = ApplyResult(generation=1)
REJECTED = ApplyResult(generation=1, outcome="rejected")


# -- the page ------------------------------------------------------------------------------------------------------


def facts(**status) -> Facts:
    return Facts(
        now=NOW,
        monotonic=1000.0,
        status=Status(
            synced=True,
            started=True,
            applied_total=1,
            families=("IPv4", "IPv6"),
            last_success=NOW - 10,
            last_queued=NOW - 20,
            **status,
        ),
        observers=(ObserverStatus(name="metrics"),),
        saved=SavedStatus(path="/var/lib/proxycore/state", saved_at=NOW - 7),
        config=ConfigStatus(loaded_at=NOW - 100),
        servers=(ServerStatus(address="127.0.0.1:10249"),),
        heard={"services": NOW - 3},
    )


class Page:
    """Everything that registers metrics, as in a running proxy, and what is exposed."""

    def __init__(self, mode: str) -> None:
        self.registry = Registry()
        # Only the backend of that mode has any.
        counted = {INVALID_DROPPED: 5, LOCALHOST_NODE_PORTS_ACCEPTED: 7} if mode == "iptables" else {}
        self.facts = facts(figures=counted)
        self.observer = plugin()
        self.conntrack = conntrack.plugin()
        self.servers = Servers(lambda: self.facts, self.registry, mode=lambda: mode, configz=dict)
        self.servers.serve(None, None, False)
        for observer in (self.observer, self.conntrack):
            observer.proxycore_observer_start(
                ObserverContext(
                    host=HOST,
                    backend=INFO,
                    healthy=lambda: True,
                    facts=lambda: self.facts,
                    registry=self.registry,
                    mode=mode,
                )
            )

    def close(self) -> None:
        self.conntrack.proxycore_observer_stop()
        self.observer.proxycore_observer_stop()
        self.servers.close()

    def text(self) -> str:
        return expose(self.registry).decode()

    def parsed(self) -> dict[str, Metric]:
        """By the name that the page gives, which for counters the parser shortens."""
        found = {}
        for metric in text_string_to_metric_families(self.text()):
            full = f"{metric.name}_total" if metric.type == "counter" else metric.name
            assert full not in found
            found[full] = metric
        return found


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def page(mode: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    requests_made = apiclient.Requests()
    monkeypatch.setattr(apiclient, "REQUESTS", requests_made)
    requests_made.record("GET", "10.0.0.1:6443", "200", 0.3)
    requests_made.record("POST", "10.0.0.1:6443", "201", 0.05)
    made = Page(mode)
    yield made
    made.close()


F = {"ip_family"}
DURATION = [0.001 * 2**k for k in range(15)]
NETWORK = [0, 0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30)]
REQUEST = [0.005, 0.025, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60]
KUBE_PROXY = {
    "kubeproxy_sync_proxy_rules_duration_seconds": ("histogram", F, DURATION, MODES),
    "kubeproxy_sync_full_proxy_rules_duration_seconds": ("histogram", F, DURATION, ("iptables", "nftables")),
    "kubeproxy_sync_partial_proxy_rules_duration_seconds": (
        "histogram",
        F,
        DURATION,
        ("iptables", "nftables"),
    ),
    "kubeproxy_sync_proxy_rules_last_timestamp_seconds": ("gauge", F, None, MODES),
    "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds": ("gauge", F, None, MODES),
    "kubeproxy_network_programming_duration_seconds": ("histogram", F, NETWORK, MODES),
    "kubeproxy_sync_proxy_rules_endpoint_changes_pending": ("gauge", set(), None, MODES),
    "kubeproxy_sync_proxy_rules_endpoint_changes_total": ("counter", set(), None, MODES),
    "kubeproxy_sync_proxy_rules_service_changes_pending": ("gauge", set(), None, MODES),
    "kubeproxy_sync_proxy_rules_service_changes_total": ("counter", set(), None, MODES),
    "kubeproxy_sync_proxy_rules_no_local_endpoints_total": (
        "gauge",
        {"ip_family", "traffic_policy"},
        None,
        MODES,
    ),
    "kubeproxy_sync_proxy_rules_iptables_restore_failures_total": ("counter", F, None, ("iptables", "ipvs")),
    "kubeproxy_sync_proxy_rules_nftables_sync_failures_total": ("counter", F, None, ("nftables",)),
    "kubeproxy_iptables_ct_state_invalid_dropped_packets_total": ("counter", set(), None, ("iptables",)),
    "kubeproxy_iptables_localhost_nodeports_accepted_packets_total": ("counter", set(), None, ("iptables",)),
    "kubeproxy_conntrack_reconciler_sync_duration_seconds": ("histogram", F, DURATION, MODES),
    "kubeproxy_conntrack_reconciler_deleted_entries_total": ("counter", F, None, MODES),
    "kubeproxy_proxy_healthz_total": ("counter", {"code"}, None, MODES),
    "kubeproxy_proxy_livez_total": ("counter", {"code"}, None, MODES),
    "rest_client_requests_total": ("counter", {"code", "method", "host"}, None, MODES),
    "rest_client_request_duration_seconds": ("histogram", {"verb", "host"}, REQUEST, MODES),
    "kubernetes_feature_enabled": ("gauge", {"name", "stage"}, None, MODES),
    "kubernetes_build_info": (
        "gauge",
        {
            "major",
            "minor",
            "git_version",
            "git_commit",
            "git_tree_state",
            "build_date",
            "go_version",
            "compiler",
            "platform",
        },
        None,
        MODES,
    ),
    "process_cpu_seconds_total": ("counter", set(), None, MODES),
    "process_resident_memory_bytes": ("gauge", set(), None, MODES),
    "process_virtual_memory_bytes": ("gauge", set(), None, MODES),
    "process_start_time_seconds": ("gauge", set(), None, MODES),
    "process_open_fds": ("gauge", set(), None, MODES),
    "process_max_fds": ("gauge", set(), None, MODES),
}
"""Written from what kube-proxy exposes: type, labels, buckets, modes."""


def test_kube_proxys_metrics_have_its_names_types_labels_and_buckets(page: Page, mode: str):
    parsed = page.parsed()
    expected = {metric for metric, (*_, modes) in KUBE_PROXY.items() if mode in modes}
    assert {metric for metric in parsed if not metric.startswith("proxycore_")} == expected
    for metric in expected:
        type_, labels, buckets, _ = KUBE_PROXY[metric]
        assert parsed[metric].type == type_, metric
        for sample in parsed[metric].samples:
            assert set(sample.labels) - {"le"} == labels, metric
        if buckets is not None:
            one = [s.labels for s in parsed[metric].samples if s.name.endswith("_bucket")]
            bounds = [float(s["le"]) for s in one if {**s, "le": ""} == {**one[0], "le": ""}]
            assert bounds == pytest.approx([*buckets, float("inf")]), metric


def test_types_are_written_as_the_go_client_writes_them(page: Page):
    text = page.text()
    for line in (
        "# TYPE kubeproxy_sync_proxy_rules_endpoint_changes_total counter",
        "# TYPE kubeproxy_sync_proxy_rules_no_local_endpoints_total gauge",
        "# TYPE kubernetes_build_info gauge",
        "# TYPE process_cpu_seconds_total counter",
    ):
        name = line.split()[2]
        series, value = text.split(f"\n{line}\n")[1].split("\n")[0].rsplit(" ", 1)
        assert series.partition("{")[0] == name
        assert float(value) >= 0
    assert "_created" not in text
    assert 'le="60"' in text, "not 60.0"


def test_every_metric_has_a_help_line_and_a_sample(page: Page):
    text = page.text()
    kinds = re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)
    assert re.findall(r"^# HELP (\S+) \S", text, re.MULTILINE) == kinds
    assert all(metric.samples for metric in page.parsed().values())


def declared(mode: str) -> dict[str, Family]:
    parts = (
        families.of_mode(families.RECORDED, mode),
        families.of_mode(families.PUBLISHED, mode),
        families.CONSTANT,
        families.REQUESTS,
        families.CONNTRACK,
        families.SERVED,
        families.COLLECTORS,
        families.PROCESS,
    )
    return {family.name: family for part in parts for family in part}


def test_the_page_holds_what_is_declared_and_nothing_else(page: Page, mode: str):
    parsed = page.parsed()
    expected = declared(mode)
    assert set(parsed) == set(expected)
    for metric, family in expected.items():
        assert parsed[metric].type == family.type
        assert {tuple(sorted(set(s.labels) - {"le"})) for s in parsed[metric].samples} == {
            tuple(sorted(family.labels))
        }


ROW = re.compile(r"^\| `([a-z_]+)` \| (\w+) \|([^|]*)\| [^|]+ \|$", re.MULTILINE)


def test_the_documentation_lists_what_is_declared_and_nothing_else():
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = [
        (metric, type_, tuple(sorted(re.findall(r"`([a-z_]+)`", labels))))
        for metric, type_, labels in ROW.findall(page)
    ]
    every = {f.name: f for mode in MODES for f in declared(mode).values()}
    every |= {f.name: f for f in families.INDICATORS}
    assert sorted(rows) == sorted((f.name, f.type, tuple(sorted(f.labels))) for f in every.values())


def test_absent_metrics_of_kube_proxy_are_named_in_the_documentation():
    page = (ROOT / "docs" / "metrics.md").read_text()
    absent = (
        "kubeproxy_sync_proxy_rules_iptables_total",
        "kubeproxy_sync_proxy_rules_iptables_last",
        "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total",
        "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
        "kubeproxy_nftables_localhost_nodeport_listeners",
        "kubeproxy_nftables_localhost_nodeport_listener_creation_failures_total",
        "kubeproxy_nftables_localhost_nodeport_rejected_packets_total",
    )
    assert [metric for metric in absent if f"`{metric}`" not in page] == []
    every = {metric for mode in MODES for metric in declared(mode)}
    assert set(absent) & every == set()


DASHBOARD = {
    "kubeproxy_sync_proxy_rules_duration_seconds_bucket": {},
    "kubeproxy_sync_proxy_rules_duration_seconds_count": {},
    "kubeproxy_network_programming_duration_seconds_bucket": {},
    "kubeproxy_network_programming_duration_seconds_count": {},
    "rest_client_requests_total": {"code": r"2.."},
    "rest_client_request_duration_seconds_bucket": {"verb": r"POST"},
    "process_resident_memory_bytes": {},
    "process_cpu_seconds_total": {},
}
"""Selectors of the dashboard for kube-proxy that everybody has; `up` is made by Prometheus itself."""


@pytest.mark.parametrize("mode", ["nftables"])
@pytest.mark.parametrize("metric", DASHBOARD)
def test_the_usual_dashboard_finds_its_series(page: Page, metric: str):
    page.observer.proxycore_observer_applied(batch(put(lacking(name()), NOW - 1)), APPLIED, 0.004)
    found = [
        sample
        for family in page.parsed().values()
        for sample in family.samples
        if sample.name == metric
        and all(re.fullmatch(want, sample.labels.get(label, "")) for label, want in DASHBOARD[metric].items())
    ]
    assert found
    if metric.endswith("_bucket"):
        # Summed over ip_family, as dashboards that are older than the label do: cumulative, so a quantile can be told.
        by_bound: dict[float, float] = {}
        for sample in found:
            bound = float(sample.labels["le"])
            by_bound[bound] = by_bound.get(bound, 0) + sample.value
        sums = [by_bound[bound] for bound in sorted(by_bound)]
        assert sums == sorted(sums)
        assert sums[-1] == 1
        assert max(by_bound) == float("inf")


@pytest.mark.parametrize("mode", ["nftables"])
def test_values_of_facts(page: Page):
    page.facts = msgspec.structs.replace(
        facts(
            pending_since=990.0,
            quarantined={name(): "no", name("api"): "no"},
            unsupported={name(family="IPv6"): "no"},
            troubles={"x": "y"},
            source=Health("stale", "refused"),
            source_since=NOW - 75,
            drift_total=3,
            drift_unrepaired=True,
            endpoint_changes_total=9,
            endpoint_changes_pending=2,
        ),
        observers=(
            ObserverStatus(name="x", failed_total=1, dropped_total=2, overdue_total=3, overdue="hangs"),
        ),
        left_out=("y",),
        backend_overdue="hangs",
        backend_overdue_total=4,
        saved=SavedStatus(path="p", saved_at=NOW - 7, problem="full"),
        config=ConfigStatus(loaded_at=5.0, problem="no", refused_total=6, needs_restart=("mode",)),
        servers=(ServerStatus(address="a", problem="taken"), ServerStatus(address="b")),
        heard={"services": NOW - 3},
        takeover="kube-proxy is running",
    )
    series = {
        (s.name, *sorted(s.labels.values())): s.value for f in page.parsed().values() for s in f.samples
    }
    expected = {
        ("kubeproxy_sync_proxy_rules_last_timestamp_seconds", "IPv6"): NOW - 10,
        ("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", "IPv4"): NOW - 20,
        ("kubeproxy_sync_proxy_rules_endpoint_changes_total",): 9,
        ("kubeproxy_sync_proxy_rules_endpoint_changes_pending",): 2,
        ("proxycore_pending_seconds",): 10,
        ("proxycore_service_ports_quarantined", "IPv4"): 2,
        ("proxycore_service_ports_quarantined", "IPv6"): 0,
        ("proxycore_service_ports_unsupported", "IPv6"): 1,
        ("proxycore_unreadable_objects",): 1,
        ("proxycore_drift_total",): 3,
        ("proxycore_drift_unrepaired",): 1,
        ("proxycore_source_state", "stale"): 1,
        ("proxycore_source_state", "live"): 0,
        ("proxycore_source_stale_seconds",): 75,
        ("proxycore_watch_age_seconds", "services"): 3,
        ("proxycore_takeover_incomplete",): 1,
        ("proxycore_node_eligible",): 0,
        ("proxycore_health", "livez"): 0,
        ("proxycore_backend_overdue",): 1,
        ("proxycore_backend_overdue_calls_total",): 4,
        ("proxycore_observer_failures_total", "x"): 1,
        ("proxycore_observer_dropped_events_total", "x"): 2,
        ("proxycore_observer_overdue_calls_total", "x"): 3,
        ("proxycore_observer_overdue", "x"): 1,
        ("proxycore_observers_left_out",): 1,
        ("proxycore_saved_state_age_seconds",): 7,
        ("proxycore_saved_state_failing",): 1,
        ("proxycore_config_loaded_timestamp_seconds",): 5,
        ("proxycore_config_refused",): 1,
        ("proxycore_config_refusals_total",): 6,
        ("proxycore_config_fields_awaiting_restart",): 1,
        ("proxycore_server_open", "a"): 0,
        ("proxycore_server_open", "b"): 1,
        ("proxycore_info", build.version(), "nft", "nftables"): 1,
    }
    assert {key: series.get(key) for key in expected} == expected


@pytest.mark.parametrize("mode", ["iptables"])
def test_figures_of_the_backend(page: Page):
    lines = page.text().splitlines()
    assert "kubeproxy_iptables_ct_state_invalid_dropped_packets_total 5.0" in lines
    assert "kubeproxy_iptables_localhost_nodeports_accepted_packets_total 7.0" in lines
    page.facts = facts(figures={INVALID_DROPPED: 6})
    assert "kubeproxy_iptables_ct_state_invalid_dropped_packets_total 6.0" in page.text().splitlines()
    assert "localhost_nodeports" not in page.text()


@pytest.mark.parametrize("mode", ["nftables"])
def test_what_is_not_known_has_no_sample(page: Page):
    page.facts = Facts(now=NOW, monotonic=0.0, status=Status())
    absent = declared("nftables").keys() - page.parsed().keys()
    assert absent == {
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
        "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
        "proxycore_watch_age_seconds",
        "proxycore_observer_failures_total",
        "proxycore_observer_dropped_events_total",
        "proxycore_observer_overdue_calls_total",
        "proxycore_observer_overdue",
        "proxycore_saved_state_age_seconds",
        "proxycore_saved_state_failing",
        "proxycore_config_loaded_timestamp_seconds",
        "proxycore_config_refused",
        "proxycore_config_refusals_total",
        "proxycore_config_fields_awaiting_restart",
        "proxycore_server_open",
    }


@pytest.mark.parametrize("mode", ["nftables"])
def test_no_series_names_a_service(page: Page):
    before = page.text().count("\n")
    many = [put(lacking(name(f"svc-{n}")), NOW) for n in range(500)]
    page.observer.proxycore_observer_applied(batch(*many, full=True), APPLIED, 0.1)
    page.facts = facts(quarantined={item.name: "no" for item in many}, troubles={"Service shop/svc-1": "no"})
    text = page.text()
    assert "svc-" not in text
    assert "shop" not in text
    assert text.count("\n") == before


@pytest.mark.parametrize("mode", ["nftables"])
def test_scrapes_during_heavy_updates_are_consistent(page: Page):
    stop = threading.Event()
    applied = 0

    def churn() -> None:
        nonlocal applied
        coming = [put(lacking(name(f"s{n}")), NOW) for n in range(100)]
        going = [change(name(f"s{n}"), UNKNOWN, None) for n in range(100)]
        while not stop.is_set():
            for changes in (coming, going):
                page.observer.proxycore_observer_applied(batch(*changes), APPLIED, 0.001)
                applied += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(20):
            parsed = page.parsed()
            (ports, _) = parsed["proxycore_service_ports"].samples
            internal = next(
                s
                for s in parsed["kubeproxy_sync_proxy_rules_no_local_endpoints_total"].samples
                if s.labels == {"ip_family": "IPv4", "traffic_policy": "internal"}
            )
            assert ports.value == internal.value in (0, 100)
            batches = sum(s.value for s in parsed["proxycore_batches_total"].samples)
            sync = parsed["kubeproxy_sync_proxy_rules_duration_seconds"].samples
            (took,) = [
                s.value for s in sync if s.name.endswith("_count") and s.labels == {"ip_family": "IPv4"}
            ]
            assert took == batches
    finally:
        stop.set()
        thread.join()
    assert applied > 0


def test_an_observer_where_nobody_serves_metrics_does_nothing():
    observer = MetricsObserver()
    observer.proxycore_observer_start(ObserverContext(host=HOST, backend=INFO, healthy=lambda: True))
    observer.proxycore_observer_applied(batch(put(lacking(name()))), APPLIED, 0.1)
    observer.proxycore_observer_failed(batch(put(lacking(name()))), REJECTED, 0.1)
    observer.proxycore_observer_stop()


def test_a_name_that_is_taken_leaves_nothing_registered():
    registry = CollectorRegistry()
    taken = Gauge("proxycore_drift_unrepaired", "Somebody else's.", registry=registry)
    context = ObserverContext(
        host=HOST, backend=INFO, healthy=lambda: True, facts=facts, registry=registry, mode="nftables"
    )
    observer = MetricsObserver()
    with pytest.raises(ValueError, match="proxycore_drift_unrepaired"):
        observer.proxycore_observer_start(context)
    assert [metric.name for metric in registry.collect()] == ["proxycore_drift_unrepaired"]
    registry.unregister(taken)
    observer.proxycore_observer_start(context)
    assert registry.get_sample_value("proxycore_drift_unrepaired") == 0
    observer.proxycore_observer_stop()
    assert list(registry.collect()) == []


def test_a_family_that_two_collectors_have_is_shown_once(caplog):
    family = Family(name="x_total", type="counter", help="X.")
    registry = Registry()
    registry.register(Collector([family], lambda: {"x_total": {(): 1}}))

    class Nameless:
        def collect(self) -> list[Metric]:
            return Collector([family], lambda: {"x_total": {(): 2}}).collect()

    registry.register(Nameless())
    text = expose(registry).decode()
    assert "\nx_total 1.0\n" in text
    assert "\nx_total 2.0\n" not in text
    assert "\nproxycore_collector_failures_total 1.0\n" in text
    assert [r.levelno for r in caplog.records] == [logging.ERROR]


# -- small things --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "text"), [(0.0, "0"), (0.001, "0.001"), (0.25, "0.25"), (60.0, "60"), (16.384, "16.384")]
)
def test_bounds_are_written_as_the_go_client_writes_them(bound: float, text: str):
    assert le(bound) == text


def test_every_gate_that_we_know_is_told_and_every_stage_is_of_a_gate():
    told = build.constant("nft", "nftables", external_ips=False)["kubernetes_feature_enabled"]
    assert {gate for gate, _ in told} == set(GATES)
    assert set(build.STAGES) <= set(GATES)
    assert told["AllowServiceExternalIPs", "DEPRECATED"] is False
    assert told["NFTablesProxyMode", ""] is True


def test_the_clients_buckets_are_those_that_are_declared():
    assert apiclient.BUCKETS == families.REQUEST


def test_requests_are_shown_as_they_were_counted():
    made = apiclient.Requests()
    for seconds in (0.01, 0.01, 0.3, 99.0):
        made.record("POST", "h:1", "201", seconds)
    values = requests.of_counts(made.snapshot())
    assert values["rest_client_requests_total"] == {("201", "POST", "h:1"): 4}
    histogram = values["rest_client_request_duration_seconds"]["POST", "h:1"]
    assert histogram.counts == [0, 2, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert histogram.sum == pytest.approx(99.32)


def test_metrics_load_no_client_of_the_api_server():
    script = (
        "import sys\nfrom proxycore.metrics import observer, requests\nimport proxycore.servers\n"
        "assert requests.values() == {}\n"
        "print(*sorted({n.partition('.')[0] for n in sys.modules} & {'kubernetes', 'urllib3', 'aiohttp'}))\n"
        "print('proxycore.apiclient' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["", "False", ""]


def test_the_entry_point_loads_nothing_before_it_is_called():
    script = "import sys, proxycore.metrics\nprint('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
