"""What the published facts amount to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..backend import INVALID_DROPPED, LOCALHOST_NODE_PORTS_ACCEPTED
from ..health import ENDPOINTS, judge
from ..model import Family, ServicePortName
from ..status import Facts
from .values import Labels, Samples, Values, one

STATES = ("live", "stale", "ended", "failed")


def of_facts(facts: Facts, families: Sequence[Family]) -> Values:
    """All that is declared as PUBLISHED.  `families` are this host's."""
    status = facts.status
    verdict = judge(facts)
    waited = max(0.0, facts.monotonic - status.pending_since) if status.pending_since is not None else 0.0
    stale = max(0.0, facts.now - status.source_since) if status.source.state == "stale" else 0.0
    found: dict[str, Samples] = {
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds": _each(families, status.last_success),
        "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds": _each(families, status.last_queued),
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending": one(status.endpoint_changes_pending),
        "kubeproxy_sync_proxy_rules_endpoint_changes_total": one(status.endpoint_changes_total),
        "kubeproxy_sync_proxy_rules_service_changes_pending": one(status.service_changes_pending),
        "kubeproxy_sync_proxy_rules_service_changes_total": one(status.service_changes_total),
        "proxycore_health": {(endpoint,): verdict.healthy(endpoint) for endpoint in ENDPOINTS},
        "proxycore_pending_seconds": one(waited),
        "proxycore_service_ports_quarantined": _counted(families, status.quarantined),
        "proxycore_service_ports_unsupported": _counted(families, status.unsupported),
        "proxycore_unreadable_objects": one(len(status.troubles)),
        "proxycore_drift_total": one(status.drift_total),
        "proxycore_drift_unrepaired": one(status.drift_unrepaired),
        "proxycore_source_synced": one(status.synced),
        "proxycore_source_state": {(state,): state == status.source.state for state in STATES},
        "proxycore_source_stale_seconds": one(stale),
        "proxycore_watch_age_seconds": {(r,): max(0.0, facts.now - at) for r, at in facts.heard.items()},
        "proxycore_takeover_incomplete": one(bool(facts.takeover)),
        "proxycore_node_eligible": one(status.node.eligible),
        "proxycore_engine_silent_seconds": one(facts.engine_silent_seconds),
        "proxycore_backend_overdue": one(bool(facts.backend_overdue)),
        "proxycore_backend_overdue_calls_total": one(facts.backend_overdue_total),
        "proxycore_observer_failures_total": {(o.name,): o.failed_total for o in facts.observers},
        "proxycore_observer_dropped_events_total": {(o.name,): o.dropped_total for o in facts.observers},
        "proxycore_observer_overdue_calls_total": {(o.name,): o.overdue_total for o in facts.observers},
        "proxycore_observer_overdue": {(o.name,): bool(o.overdue) for o in facts.observers},
        "proxycore_observers_left_out": one(len(facts.left_out)),
        "proxycore_server_open": {(server.address,): not server.problem for server in facts.servers},
    }
    for figure in (INVALID_DROPPED, LOCALHOST_NODE_PORTS_ACCEPTED):
        if figure in status.figures:
            found[f"kubeproxy_iptables_{figure}_total"] = one(status.figures[figure])
    if facts.saved is not None:
        found["proxycore_saved_state_failing"] = one(bool(facts.saved.problem))
        if facts.saved.saved_at is not None:
            found["proxycore_saved_state_age_seconds"] = one(max(0.0, facts.now - facts.saved.saved_at))
    if facts.config is not None:
        found["proxycore_config_loaded_timestamp_seconds"] = one(facts.config.loaded_at)
        found["proxycore_config_refused"] = one(bool(facts.config.problem))
        found["proxycore_config_refusals_total"] = one(facts.config.refused_total)
        found["proxycore_config_fields_awaiting_restart"] = one(len(facts.config.needs_restart))
    return found


def _each(families: Sequence[Family], value: float | None) -> Samples:
    return {(family,): value for family in families} if value is not None else {}


def _counted(families: Sequence[Family], names: Iterable[ServicePortName]) -> dict[Labels, float]:
    counts = Counter(name.family for name in names)
    return {(family,): counts[family] for family in families}
