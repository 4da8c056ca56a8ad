"""Every metric of ours, declared.  `docs/metrics.md` says the same for people.

Names, types, labels and buckets of `kubeproxy_*`, `rest_client_*` and `kubernetes_*` are those of kube-proxy and of
Kubernetes' components.  No label ever holds the name of an object of the API: the number of series is bounded.
"""

from __future__ import annotations

from .values import Family, Type

FAMILY = ("ip_family",)
CODE = ("code",)
DURATION = tuple(0.001 * 2.0**k for k in range(15))
"""kube-proxy's buckets for durations, in seconds."""
PROGRAMMING = (
    0.0,
    0.25,
    0.5,
    *map(float, range(1, 60)),
    *map(float, range(60, 120, 5)),
    *map(float, range(120, 301, 30)),
)
TRIGGER = (0.0005, *DURATION, 30.0, 60.0, 120.0, 300.0)
REQUEST = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
"""client-go's buckets for requests, in seconds."""


def _kube(
    name: str,
    type_: Type,
    help_: str,
    labels: tuple[str, ...] = (),
    *,
    buckets: tuple[float, ...] = (),
    modes: tuple[str, ...] = (),
) -> Family:
    return Family(
        name=f"kubeproxy_{name}", type=type_, help=help_, labels=labels, buckets=buckets, modes=modes
    )


def _ours(
    name: str, type_: Type, help_: str, labels: tuple[str, ...] = (), *, buckets: tuple[float, ...] = ()
) -> Family:
    return Family(name=f"proxycore_{name}", type=type_, help=help_, labels=labels, buckets=buckets)


RECORDED = (
    _kube(
        "sync_proxy_rules_duration_seconds",
        "histogram",
        "Time that the backend took for a batch with changes of this family",
        FAMILY,
        buckets=DURATION,
    ),
    _kube(
        "sync_full_proxy_rules_duration_seconds",
        "histogram",
        "The same for batches that stand for the whole state",
        FAMILY,
        buckets=DURATION,
        modes=("iptables", "nftables"),
    ),
    _kube(
        "sync_partial_proxy_rules_duration_seconds",
        "histogram",
        "The same for batches of changes alone",
        FAMILY,
        buckets=DURATION,
        modes=("iptables", "nftables"),
    ),
    _kube(
        "network_programming_duration_seconds",
        "histogram",
        "From the change of a Service's endpoints, as their EndpointSlice tells, until it is in force",
        FAMILY,
        buckets=PROGRAMMING,
    ),
    _kube(
        "sync_proxy_rules_no_local_endpoints_total",
        "gauge",
        "Service ports in force with a Local traffic policy that have endpoints, but none on this node",
        ("ip_family", "traffic_policy"),
    ),
    _kube(
        "sync_proxy_rules_nftables_sync_failures_total",
        "counter",
        "Batches that did not come into force",
        FAMILY,
        modes=("nftables",),
    ),
    _kube(
        "sync_proxy_rules_iptables_restore_failures_total",
        "counter",
        "Batches that did not come into force",
        FAMILY,
        modes=("iptables", "ipvs"),
    ),
    _ours(
        "trigger_to_kernel_seconds",
        "histogram",
        "From the earliest cause of a batch, or its arrival where nothing tells, until the batch is in force",
        buckets=TRIGGER,
    ),
    _ours("batches_total", "counter", "Batches by what became of them", ("outcome",)),
    _ours("changes_total", "counter", "Changes of Service ports that came into force", ("kind",)),
    _ours("kernel_operations_total", "counter", "Kernel operations of the backend"),
    _ours("service_ports", "gauge", "Service ports in force", FAMILY),
)
"""Counted from batches by the observer."""

PUBLISHED = (
    _kube("sync_proxy_rules_last_timestamp_seconds", "gauge", "When a batch last came into force", FAMILY),
    _kube(
        "sync_proxy_rules_last_queued_timestamp_seconds",
        "gauge",
        "When something last had to be programmed; much later than the last success: something hangs",
        FAMILY,
    ),
    _kube(
        "sync_proxy_rules_endpoint_changes_pending",
        "gauge",
        "Changes of EndpointSlices that are not in force",
    ),
    _kube("sync_proxy_rules_endpoint_changes_total", "counter", "Changes of EndpointSlices"),
    _kube("sync_proxy_rules_service_changes_pending", "gauge", "Changes of Services that are not in force"),
    _kube("sync_proxy_rules_service_changes_total", "counter", "Changes of Services"),
    _kube(
        "iptables_ct_state_invalid_dropped_packets_total",
        "counter",
        "Packets dropped because connection tracking calls them invalid",
        modes=("iptables",),
    ),
    _kube(
        "iptables_localhost_nodeports_accepted_packets_total",
        "counter",
        "New connections to node ports on loopback addresses",
        modes=("iptables",),
    ),
    _ours("health", "gauge", "1 while this endpoint is green", ("endpoint",)),
    _ours("pending_seconds", "gauge", "How long the oldest change has been waiting, 0 if none does"),
    _ours("service_ports_quarantined", "gauge", "Service ports set aside after a failure", FAMILY),
    _ours("service_ports_unsupported", "gauge", "Service ports that the backend does not support", FAMILY),
    _ours("unreadable_objects", "gauge", "Objects or files that cannot be read"),
    _ours("drift_total", "counter", "How often the kernel was found to differ from what was programmed"),
    _ours("drift_unrepaired", "gauge", "1 while the kernel differs and has not been put right"),
    _ours("source_synced", "gauge", "1 once the source has delivered everything"),
    _ours("source_state", "gauge", "1 for the state that the source is in", ("state",)),
    _ours("source_stale_seconds", "gauge", "How long the source has been stale, 0 if it is not"),
    _ours("watch_age_seconds", "gauge", "Since something was last heard of this resource", ("resource",)),
    _ours("takeover_incomplete", "gauge", "1 while another proxy's rules are here that were to go"),
    _ours("node_eligible", "gauge", "1 while this node may get traffic from load balancers"),
    _ours("engine_silent_seconds", "gauge", "Since the engine's loop last turned"),
    _ours("backend_overdue", "gauge", "1 while a call of the backend is past its deadline"),
    _ours("backend_overdue_calls_total", "counter", "Calls of the backend that outlived their deadline"),
    _ours("observer_failures_total", "counter", "Calls of an observer that failed", ("observer",)),
    _ours("observer_dropped_events_total", "counter", "Events that an observer missed", ("observer",)),
    _ours(
        "observer_overdue_calls_total",
        "counter",
        "Calls of an observer that outlived their deadline",
        ("observer",),
    ),
    _ours("observer_overdue", "gauge", "1 while a call of an observer is past its deadline", ("observer",)),
    _ours("observers_left_out", "gauge", "Observers that could not be loaded"),
    _ours("saved_state_age_seconds", "gauge", "Since the last known good state was written"),
    _ours("saved_state_failing", "gauge", "1 while the last known good state cannot be written"),
    _ours("config_loaded_timestamp_seconds", "gauge", "When the configuration in force was loaded"),
    _ours("config_refused", "gauge", "1 while a newer configuration is refused"),
    _ours("config_refusals_total", "counter", "Configurations that were refused"),
    _ours(
        "config_fields_awaiting_restart", "gauge", "Fields that a newer configuration changes at a restart"
    ),
    _ours("server_open", "gauge", "1 while this address of ours is open", ("address",)),
)
"""Read from the published facts at each scrape."""

CONSTANT = (
    Family(
        name="kubernetes_build_info",
        type="gauge",
        help="Always 1; the labels tell what this program is",
        labels=(
            "major",
            "minor",
            "git_version",
            "git_commit",
            "git_tree_state",
            "build_date",
            "go_version",
            "compiler",
            "platform",
        ),
    ),
    Family(
        name="kubernetes_feature_enabled",
        type="gauge",
        help="1 for a feature gate of kube-proxy that is on",
        labels=("name", "stage"),
    ),
    _ours("info", "gauge", "Always 1; the labels tell what runs", ("version", "backend", "mode")),
)
"""Known when the observer starts."""

REQUESTS = (
    Family(
        name="rest_client_requests_total",
        type="counter",
        help="Requests to the API server",
        labels=("code", "method", "host"),
    ),
    Family(
        name="rest_client_request_duration_seconds",
        type="histogram",
        help="Time until the answer's head",
        labels=("verb", "host"),
        buckets=REQUEST,
    ),
)
"""Kept by the client of the API server."""

CONNTRACK = (
    _kube(
        "conntrack_reconciler_sync_duration_seconds",
        "histogram",
        "Time of one look for stale UDP flows",
        FAMILY,
        buckets=DURATION,
    ),
    _kube(
        "conntrack_reconciler_deleted_entries_total", "counter", "Stale UDP flows that were deleted", FAMILY
    ),
)
"""Kept by the conntrack observer, where the backend needs it."""

SERVED = (
    _kube("proxy_healthz_total", "counter", "Answers of /healthz", CODE),
    _kube("proxy_livez_total", "counter", "Answers of /livez", CODE),
    _ours("proxy_readyz_total", "counter", "Answers of /readyz", CODE),
)
"""Kept by the servers."""

COLLECTORS = (
    _ours("collector_failures_total", "counter", "Collectors of metrics that failed during a scrape"),
)
"""Kept by the registry."""

INDICATORS = (
    Family(
        name="kubernetes_healthcheck",
        type="gauge",
        help="1 while this check is well",
        labels=("name", "type"),
    ),
    Family(
        name="kubernetes_healthchecks_total",
        type="counter",
        help="Results of this check",
        labels=("name", "type", "status"),
    ),
)
"""At /metrics/slis."""

PROCESS = (
    Family(name="process_virtual_memory_bytes", type="gauge", help="Virtual memory size in bytes."),
    Family(name="process_resident_memory_bytes", type="gauge", help="Resident memory size in bytes."),
    Family(name="process_start_time_seconds", type="gauge", help="Start time since the epoch."),
    Family(name="process_cpu_seconds_total", type="counter", help="User and system CPU time."),
    Family(name="process_max_fds", type="gauge", help="Maximum number of open file descriptors."),
    Family(name="process_open_fds", type="gauge", help="Number of open file descriptors."),
)
"""Made by prometheus_client; declared for documentation and tests alone."""


def of_mode(families: tuple[Family, ...], mode: str) -> tuple[Family, ...]:
    """Those that kube-proxy has in this mode."""
    return tuple(family for family in families if not family.modes or mode in family.modes)
