"""The backend's hooks: from a batch to rules in force."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from proxycore.api import (
    ApplyResult,
    BackendContext,
    BackendInfo,
    Capability,
    ChangeBatch,
    Cleanup,
    Counters,
    Drift,
    Failure,
    Family,
    HostState,
    KernelError,
    KernelObject,
    Operation,
    Probe,
    ServicePortName,
    ServiceState,
    Started,
    Verification,
    hookimpl,
)

from . import cleaning, counts, offline
from .bring import Bringer
from .drift import compare
from .host import Host, RealHost
from .live import Live, LockHeld
from .program import Piece
from .rules import Jump
from .ruleset import Ruleset
from .shape import Options, parse_options
from .work import Work

CAPABILITIES = frozenset(Capability) - {
    Capability.UNDEFINED_PORTS,
    Capability.SERVICE_CIDR_DROP,
    Capability.ATOMIC,
}
NEEDS = ("iptables 1.8.2", "CAP_NET_ADMIN", "CAP_NET_RAW (iptables-legacy)")
SUMMARY = "netfilter rules in kube-proxy's own chains, written by iptables-restore; legacy and nft variants"
REST_FROM_SECONDS = 0.1
"""A legacy commit that took longer is followed by a rest as long as it took, so that changes gather."""
VERIFY_SHARE = 0.2
"""While others keep changing rules, reading ours back takes about this share of the time."""
VERIFY_PAUSE_MAX = 10.0
"""But what others change is found within this time and that of one reading."""
DEEP_SHARE = 0.02
DEEP_PAUSE_MIN = 30.0
"""Changes of others that keep the size of a legacy table show only when all is read: that is done as often as this allows."""


class _Outcome:
    """What became of a batch in both families: one that iptables refuses does not hold up the other."""

    def __init__(self) -> None:
        self.families = 0
        self.operations = 0
        self.failed: list[Failure] = []
        self.unknown: list[ServicePortName] = []
        self._messages: list[str] = []

    def brought(self, bringer: Bringer) -> None:
        self.families += 1
        self.operations += bringer.operations
        self.failed += [Failure(name=name, why=why) for name, why in bringer.failed.items()]
        self.unknown += bringer.dropped
        self._messages += bringer.dropped.values()

    def refused(self, names: Iterable[ServicePortName], why: str) -> None:
        self.unknown += names
        self._messages += [why] if why else []

    @property
    def message(self) -> str:
        """Why, of all that is not in force as it should be and no single Service's failure."""
        return "; ".join(dict.fromkeys(self._messages))


class IptablesBackend:
    """One instance serves one network namespace, on one thread."""

    def __init__(
        self,
        open_host: Callable[[BackendContext, Options], Host] = RealHost,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_host = open_host
        self._clock = clock
        self._opened: Host | None = None
        self._rulesets: dict[Family, Ruleset] = {}
        self._state: HostState | None = None
        self._counts = counts.Totals()
        self._verify_after = self._deep_after = 0.0

    # -- facts --

    @hookimpl
    def proxycore_backend_describe(self) -> BackendInfo:
        return BackendInfo(
            name="iptables",
            summary=SUMMARY,
            api=">=0.1,<0.2",
            capabilities=CAPABILITIES,
            needs=NEEDS,
            adopts=("iptables",),
        )

    @hookimpl
    def proxycore_backend_probe(self, context: BackendContext) -> Probe:
        return offline.probe(context)

    # -- life --

    @hookimpl
    def proxycore_backend_start(self, context: BackendContext) -> Started:
        self.proxycore_backend_stop()
        options = parse_options(context.options)
        host = self._open_host(context, options)
        try:
            adopted = self._adopt(host, context, options)
            host.prepare()
        except BaseException:
            host.close()
            raise
        self._opened, self._state = host, context.host
        # The first reading of what an earlier run wrote is where this one's counts begin.
        self._counts = counts.Totals(adopted=[f for f, ruleset in self._rulesets.items() if ruleset.chains])
        return Started(
            adopted="; ".join(adopted) or None,
            holds=tuple(live.name for live in host.tables.values()),
            loopback_node_ports=options.localhost_node_ports and "IPv4" in host.tables,
        )

    def _adopt(self, host: Host, context: BackendContext, options: Options) -> list[str]:
        rulesets: dict[Family, Ruleset] = {}
        adopted: list[str] = []
        looked = host.watch.look()
        for family, live in host.tables.items():
            ruleset = rulesets[family] = Ruleset(family, options, host.features[family])
            ruleset.learn(live.read())
            if ruleset.chains:
                whose = "proxycore's" if ruleset.is_marked else "kube-proxy's"
                if context.takeover == "refuse" and not ruleset.is_marked:
                    raise KernelError(
                        f"kube-proxy's rules are here (takeover: refuse): {ruleset.chains} chains in {live.name}; "
                        "stop kube-proxy and run `kube-proxy --cleanup`, or start with --takeover auto"
                    )
                adopted.append(f"{ruleset.chains} of {whose} chains in {live.name}")
        host.watch.settle(looked)
        self._rulesets = rulesets
        return adopted

    @hookimpl
    def proxycore_backend_stop(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _host(self) -> Host:
        if self._opened is None:
            raise KernelError("the iptables backend is not started")
        return self._opened

    # -- changes --

    @hookimpl
    def proxycore_backend_apply(self, batch: ChangeBatch) -> ApplyResult:
        host = self._host()
        if batch.host is not None:
            self._state = batch.host.after
        outcome = _Outcome()
        began = self._clock()
        for family, ruleset in self._rulesets.items():
            changes = {c.name: c.after for c in batch.changes if c.name.family == family}
            if not (changes or batch.full or batch.host is not None or ruleset.doubtful or ruleset.unsettled):
                continue
            try:
                outcome.brought(self._bring(host, family, ruleset, changes, full=batch.full))
            except KernelError as error:
                host.watch.lost()
                outcome.refused(changes, str(error))
                if isinstance(error, LockHeld):
                    # Whoever has the lock has it for the other family, too.
                    outcome.refused([c.name for c in batch.changes if c.name.family != family], "")
                    break
            except BaseException:
                ruleset.doubtful = True
                raise
        if not outcome.families:
            message = outcome.message or ""
            if message:
                return ApplyResult(
                    generation=batch.generation, outcome="rejected", culprits=(), message=message
                )
        seconds = self._clock() - began
        rest = host.variant == "legacy" and outcome.operations and seconds > REST_FROM_SECONDS
        return ApplyResult(
            generation=batch.generation,
            failed=tuple(outcome.failed),
            unknown=tuple(outcome.unknown),
            message=outcome.message,
            operations=outcome.operations,
            pause_seconds=seconds if rest else 0.0,
        )

    def _bring(
        self,
        host: Host,
        family: Family,
        ruleset: Ruleset,
        changes: Mapping[ServicePortName, ServiceState | None],
        *,
        full: bool,
    ) -> Bringer:
        live = host.tables[family]
        assert self._state is not None
        if ruleset.doubtful or ((full or ruleset.unsettled) and host.watch.changed()):
            # What is compared as a whole is worth comparing with what is there now.
            ruleset.learn(live.read())
        state = self._state
        stamp = host.watch.before()

        def make() -> Work:
            return Work(ruleset, changes, state, full=full)

        def ran(piece: Piece) -> None:
            nonlocal stamp
            stamp = host.watch.after(stamp, family, piece.sections)

        bringer = Bringer(ruleset, live, make, ran)
        bringer.bring()
        return bringer

    # -- offline --

    @hookimpl
    def proxycore_backend_render(self, context: BackendContext, batch: ChangeBatch) -> str:
        return offline.render(context, batch)

    @hookimpl
    def proxycore_backend_plan(self, context: BackendContext, batch: ChangeBatch) -> tuple[Operation, ...]:
        host = self._open_host(context, parse_options(context.options))
        try:
            return offline.plan(host, context, batch)
        finally:
            host.close()

    # -- truth --

    @hookimpl
    def proxycore_backend_verify(self, deep: bool) -> Verification:
        host = self._host()
        figures = host.figures()
        began = self._clock()
        doubts = any(ruleset.doubtful or ruleset.unsettled for ruleset in self._rulesets.values())
        due = host.variant == "legacy" and began >= self._deep_after
        if not (deep or due or doubts or host.watch.changed()):
            return Verification(checked=False, figures=figures)
        if began < self._verify_after and not deep:
            return Verification(checked=False, figures=figures)
        looked = host.watch.look()
        # Also if it cannot be read: the next look is worth it when something has changed again.
        host.watch.settle(looked)
        drift: list[Drift] = []
        repaired = True
        for family, ruleset in self._rulesets.items():
            live = host.tables[family]
            found, jumps = compare(ruleset, live, live.read())
            drift += found
            if found:
                repaired = self._put_back(ruleset, live, jumps) and repaired
        ended = self._clock()
        took = ended - began
        self._verify_after = ended + min(took / VERIFY_SHARE, VERIFY_PAUSE_MAX)
        self._deep_after = ended + max(took / DEEP_SHARE, DEEP_PAUSE_MIN)
        return Verification(
            checked=True, drift=tuple(drift), repaired=bool(drift) and repaired, figures=figures
        )

    @staticmethod
    def _put_back(ruleset: Ruleset, live: Live, jumps: list[Jump]) -> bool:
        """Repair at once where nothing but rules that lead to us is missing."""
        if not jumps:
            return False
        try:
            live.assert_jumps(jumps)
        except KernelError:
            return False
        ruleset.put(jumps)
        ruleset.unsettled = False
        return True

    @hookimpl
    def proxycore_backend_inspect(self, name: ServicePortName) -> tuple[KernelObject, ...]:
        host = self._host()
        ruleset = self._rulesets.get(name.family)
        return () if ruleset is None else counts.inspect(ruleset, host.tables[name.family], name)

    @hookimpl
    def proxycore_backend_counters(self) -> tuple[Counters, ...]:
        host = self._host()
        return tuple(
            item
            for family, ruleset in self._rulesets.items()
            for item in self._counts.read(ruleset, host.tables[family])
        )

    @hookimpl
    def proxycore_backend_cleanup(self, context: BackendContext) -> Cleanup:
        return cleaning.clean_up()
