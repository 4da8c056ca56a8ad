"""What batches amount to: durations, failures, and which Service ports are in force."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..backend import ApplyResult
from ..changes import SNAPSHOT, ChangeBatch, ServiceChange
from ..model import Family, FrontendKind, PoolName, ServicePortName, ServiceState, WhenEmpty
from .families import DURATION, PROGRAMMING, TRIGGER
from .values import Histogram, Labels, Values, one

OUTCOMES = ("applied", "partial", "rejected")
KINDS = ("added", "updated", "removed")
POLICIES = ("internal", "external")
FAILURES: Mapping[str, str] = {
    "nftables": "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
    "iptables": "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
    "ipvs": "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
}


class Lacks(NamedTuple):
    """Which traffic policies are Local and find no endpoint here, though there are some elsewhere."""

    internal: bool = False
    external: bool = False


NOTHING = Lacks()


def lacks(state: ServiceState) -> Lacks:
    """Semantics: kube-proxy's sync_proxy_rules_no_local_endpoints_total."""
    local = state.local
    # A pool that is empty because no endpoint is left anywhere refuses; nobody is to blame a policy for that.
    if local is None or local.endpoints or local.when_empty is WhenEmpty.REJECT:
        return NOTHING
    kinds = {f.kind for f in state.frontends if f.routes.outside.pool is PoolName.LOCAL}
    return Lacks(FrontendKind.CLUSTER_IP in kinds, bool(kinds - {FrontendKind.CLUSTER_IP}))


class InForce:
    """The Service ports in force; kept up to date by changes, corrected by full batches."""

    def __init__(self) -> None:
        self._known: dict[ServicePortName, Lacks] = {}
        self._ports: dict[Family, int] = {}
        self._lacking: dict[tuple[Family, str], int] = {}

    def take(self, batch: ChangeBatch, result: ApplyResult) -> list[ServiceChange]:
        """Take over a batch; the changes that came into force.

        What failed, or is half done, keeps the state that it had; what is unsupported has none.
        """
        kept = {failure.name for failure in result.failed} | set(result.unknown)
        gone = {failure.name for failure in result.unsupported}
        if batch.full:
            present = {change.name for change in batch.changes}
            for name in [name for name in self._known if name not in present]:
                self._put(name, None)
        done: list[ServiceChange] = []
        for change in batch.changes:
            if change.name in kept:
                continue
            if change.name in gone:
                self._put(change.name, None)
                continue
            self._put(change.name, lacks(change.after) if change.after is not None else None)
            done.append(change)
        return done

    def ports(self, family: Family) -> int:
        """How many are in force."""
        return self._ports.get(family, 0)

    def lacking(self, family: Family, policy: str) -> int:
        """How many of them lack a local endpoint."""
        return self._lacking.get((family, policy), 0)

    def _put(self, name: ServicePortName, new: Lacks | None) -> None:
        old = self._known.pop(name, None)
        for state, step in ((old, -1), (new, 1)):
            if state is None:
                continue
            self._ports[name.family] = self._ports.get(name.family, 0) + step
            for policy in POLICIES:
                if getattr(state, policy):
                    key = (name.family, policy)
                    self._lacking[key] = self._lacking.get(key, 0) + step
        if new is not None:
            self._known[name] = new


class Recorder:
    """Counts batches, for the families of this host and one of kube-proxy's modes."""

    def __init__(self, families: Sequence[Family], mode: str) -> None:
        self._families = tuple(families)
        self._mode = mode
        self._in_force = InForce()
        self._sync, self._full, self._partial = (self._durations(DURATION) for _ in range(3))
        self._programming = self._durations(PROGRAMMING)
        self._trigger = Histogram(TRIGGER)
        self._failures: dict[Family, int] = dict.fromkeys(self._families, 0)
        self._outcomes = dict.fromkeys(OUTCOMES, 0)
        self._changes = dict.fromkeys(KINDS, 0)
        self._operations = 0

    def applied(self, batch: ChangeBatch, result: ApplyResult, seconds: float, now: float) -> None:
        """A batch is in force since `now`, in seconds since the epoch, but for the exceptions in `result`."""
        done = self._in_force.take(batch, result)
        if batch.reason == SNAPSHOT:
            # Nothing was programmed: this only brings us up to date after we missed events.
            return
        self._sync_took(batch, seconds)
        partial = bool(result.failed or result.unsupported or result.unknown)
        self._outcomes["partial" if partial else "applied"] += 1
        self._operations += result.operations
        for change in done:
            self._changes[change.kind] += 1
        for _, _, family, trigger in _triggers(done):
            if family in self._programming:
                # Clocks of two machines may differ.
                self._programming[family].observe(max(0.0, now - trigger))
        if batch.oldest_trigger_time is not None:
            self._trigger.observe(max(0.0, now - batch.oldest_trigger_time))

    def failed(self, batch: ChangeBatch, result: ApplyResult, seconds: float) -> None:
        """Nothing of a batch came into force, so what is in force stays as it was."""
        self._sync_took(batch, seconds)
        self._outcomes["rejected"] += 1
        self._operations += result.operations
        for family in self._touched(batch):
            self._failures[family] += 1

    def values(self) -> Values:
        """All that is declared as RECORDED, as it is now: what is counted later does not change it."""
        found: dict[str, Mapping[Labels, float | Histogram]] = {
            "kubeproxy_sync_proxy_rules_duration_seconds": _by_family(self._sync),
            "kubeproxy_sync_full_proxy_rules_duration_seconds": _by_family(self._full),
            "kubeproxy_sync_partial_proxy_rules_duration_seconds": _by_family(self._partial),
            "kubeproxy_network_programming_duration_seconds": _by_family(self._programming),
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total": {
                (family, policy): float(self._in_force.lacking(family, policy))
                for family in self._families
                for policy in POLICIES
            },
            "proxycore_trigger_to_kernel_seconds": {(): self._trigger.copy()},
            "proxycore_batches_total": {(outcome,): count for outcome, count in self._outcomes.items()},
            "proxycore_changes_total": {(kind,): count for kind, count in self._changes.items()},
            "proxycore_kernel_operations_total": one(self._operations),
            "proxycore_service_ports": {(family,): self._in_force.ports(family) for family in self._families},
        }
        if self._mode in FAILURES:
            found[FAILURES[self._mode]] = {(family,): count for family, count in self._failures.items()}
        return found

    def _durations(self, buckets: Sequence[float]) -> dict[Family, Histogram]:
        return {family: Histogram(buckets) for family in self._families}

    def _sync_took(self, batch: ChangeBatch, seconds: float) -> None:
        for family in self._touched(batch):
            self._sync[family].observe(seconds)
            (self._full if batch.full else self._partial)[family].observe(seconds)

    def _touched(self, batch: ChangeBatch) -> tuple[Family, ...]:
        """The families that a batch is about: all, if it holds the whole state or the node's facts."""
        if batch.full or batch.host is not None:
            return self._families
        touched = {change.name.family for change in batch.changes}
        return tuple(family for family in self._families if family in touched)


def _triggers(changes: Iterable[ServiceChange]) -> set[tuple[str, str, Family, float]]:
    """What told when it began, once for each Service and family, however many ports it has.

    A Service port that goes was not waited for by anybody.
    """
    return {
        (change.name.namespace, change.name.name, change.name.family, change.trigger_time)
        for change in changes
        if change.trigger_time is not None and change.after is not None
    }


def _by_family(histograms: Mapping[Family, Histogram]) -> dict[Labels, float | Histogram]:
    return {(family,): histogram.copy() for family, histogram in histograms.items()}
