"""The backend against iptables in memory, through any history: batches, restarts, refusals, kills and foreign hands.

After every batch that came into force the rules must be those that a backend writes at once on a host without rules.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from proxycore.api import (
    Endpoint,
    Family,
    FrontendKind,
    LocalPodsByInterface,
    NodePortAddresses,
    Pool,
    ServicePortName,
    ServiceState,
    WhenEmpty,
)
from proxycore.testing.states import (
    EXTERNAL_LOCAL,
    HOST,
    IN_CLUSTER,
    batch,
    context,
    frontend,
    full,
    host,
    name_of,
    node_port,
    service,
)
from proxycore_iptables.backend import IptablesBackend
from proxycore_iptables.fake import FakeHost

FAMILIES: tuple[Family, Family] = ("IPv4", "IPv6")
HOSTS = [
    HOST,
    host(detect_local=None),
    host(masquerade_bit=3),
    host(detect_local=LocalPodsByInterface("cni0")),
    host(node_ports_ipv4=NodePortAddresses(all_local=True), node_ports_ipv6=NodePortAddresses()),
]
NAMES = [name_of(f"s{number}", family=family) for number in range(5) for family in FAMILIES]
OPTIONS = {"treeFrom": 4, "commentsUpTo": 12, "chainsPerRestore": 8}
FOREIGN = [
    ("nat", "PREROUTING", "-j DOCKER"),
    ("nat", "DOCKER", "-j RETURN"),
    ("filter", "INPUT", "-p tcp -m tcp --dport 22 -j ACCEPT"),
]


class Spec(NamedTuple):
    """A Service port in few words, so that a failing history can be read."""

    first: int = 0
    count: int = 0
    affinity: int | None = None
    local: bool = False
    ranges: bool = False
    shared: bool = False
    drop: bool = False


SPECS = st.builds(
    Spec,
    first=st.integers(0, 4),
    count=st.integers(0, 6),
    affinity=st.sampled_from([None, None, 10]),
    local=st.booleans(),
    ranges=st.booleans(),
    shared=st.booleans(),
    drop=st.booleans(),
)


def state_of(name: ServicePortName, place: int, spec: Spec) -> ServiceState:
    """A Service port whose frontends nobody else has: `place` chooses them."""
    v4 = name.family == "IPv4"
    endpoints = tuple(
        Endpoint(
            address=f"10.0.{place}.{n + 1}" if v4 else f"fd00:10::{place}:{n + 1:x}",
            port=80,
            is_local=n % 2 == 0,
        )
        for n in range(spec.first, spec.first + spec.count)
    )
    cluster = Pool(endpoints=endpoints, when_empty=WhenEmpty.DROP if spec.drop else WhenEmpty.REJECT)
    made = [frontend(f"172.30.0.{place + 1}" if v4 else f"fd00:172:30::{place + 1:x}")]
    if spec.shared:
        made.append(frontend("172.30.9.9" if v4 else "fd00:172:30::99", 1000 + place))
    local = None
    if spec.local:
        local = Pool(endpoints=tuple(e for e in endpoints if e.is_local), when_empty=WhenEmpty.DROP)
        ranges = ("198.51.100.0/24",) if v4 else ("2001:db8:9::/64", "2001:db8:a::/64")
        made += [
            frontend(
                f"203.0.113.{place + 1}" if v4 else f"2001:db8:5::{place + 1:x}",
                kind=FrontendKind.LOAD_BALANCER_IP,
                routes=EXTERNAL_LOCAL,
                source_ranges=ranges if spec.ranges else None,
            ),
            node_port(30000 + place, routes=EXTERNAL_LOCAL if spec.drop else IN_CLUSTER),
        ]
    return service(name, *made, cluster=cluster, local=local, affinity=spec.affinity)


class Histories(RuleBasedStateMachine):
    """`wanted`: what is in force."""

    @initialize(variant=st.sampled_from(["legacy", "nft"]), facts=st.sampled_from(HOSTS))
    def begin(self, variant, facts):
        self.host = FakeHost(variant)
        for tables in self.host.tables.values():
            for table, chain, text in reversed(FOREIGN):
                tables.tables[table].setdefault(chain, []).append(text)
        self.facts = facts
        self.wanted: dict[ServicePortName, ServiceState] = {}
        self.in_force = False
        self.restart()

    def context(self):
        return msgspec.structs.replace(context(self.facts), options=OPTIONS)

    def restart(self):
        self.backend = IptablesBackend(open_host=self.host.open, clock=lambda: 0.0)
        self.backend.proxycore_backend_start(self.context())
        self.send({}, whole=True)

    def send(self, changes, *, whole=False, facts=None):
        """What the engine does: until it is applied, with everything after a failure."""
        target = {**self.wanted, **changes}
        target = {name: state for name, state in target.items() if state is not None}
        self.facts = facts or self.facts
        for _attempt in range(6):
            if whole:
                sent = full(*target.values(), facts=self.facts)
            else:
                gone = [name for name, state in changes.items() if state is None]
                made = [state for state in changes.values() if state is not None]
                sent = batch(*made, removed=gone, facts=facts)
            result = self.backend.proxycore_backend_apply(sent)
            if result.outcome == "applied":
                failed = {failure.name for failure in result.failed}
                for name in {*changes, *target, *self.wanted}:
                    if name not in failed:
                        if name in target:
                            self.wanted[name] = target[name]
                        else:
                            self.wanted.pop(name, None)
                self.in_force = True
                return failed
            assert result.culprits == ()
        raise AssertionError(f"refused again and again: {result.message}")

    @rule(
        changes=st.dictionaries(st.sampled_from(NAMES), st.one_of(st.none(), SPECS), max_size=5),
        whole=st.booleans(),
    )
    def change(self, changes, whole):
        made = {n: None if s is None else state_of(n, NAMES.index(n) // 2, s) for n, s in changes.items()}
        assert self.send(made, whole=whole) == set()

    @rule(facts=st.sampled_from(HOSTS))
    def host_changes(self, facts):
        self.send({}, facts=facts)

    @rule()
    def process_ends(self):
        self.restart()

    @rule(
        name=st.sampled_from(NAMES),
        spec=SPECS.filter(lambda s: s.count > 0),
        named=st.booleans(),
        whole=st.booleans(),
    )
    def one_is_refused(self, name, spec, named, whole):
        """One endpoint of a Service port is refused, by line or by the table; the others come into force."""
        state = state_of(name, NAMES.index(name) // 2, spec._replace(first=9))
        other = NAMES[(NAMES.index(name) + 2) % len(NAMES)]
        bad = f"--to-destination {state.endpoints[-1]}"

        def refuse(text: str) -> bool:
            return text.endswith(bad)

        for tables in self.host.tables.values():
            tables.refuse_line, tables.refuse_commit = (
                (refuse, tables.refuse_commit) if named else (tables.refuse_line, refuse)
            )
        before = self.wanted.get(name)
        made = {name: state, other: state_of(other, NAMES.index(other) // 2, Spec(count=2))}
        assert self.send(made, whole=whole) == {name}
        assert self.wanted.get(name) == before
        for tables in self.host.tables.values():
            tables.refuse_line = tables.refuse_commit = lambda text: False

    @rule(
        changes=st.dictionaries(st.sampled_from(NAMES), SPECS, min_size=1, max_size=5),
        after=st.integers(1, 4),
        family=st.sampled_from(FAMILIES),
        again=st.booleans(),
    )
    def killed_on_the_way(self, changes, after, family, again):
        """The process, or the tool, ends between two commits."""
        made = {n: state_of(n, NAMES.index(n) // 2, s) for n, s in changes.items()}
        self.host.tables[family].die_after = after
        self.backend.proxycore_backend_apply(full(*{**self.wanted, **made}.values(), facts=self.facts))
        self.host.tables[family].die_after = None
        if again:
            self.restart()
        else:
            self.send({}, whole=True)

    @precondition(lambda self: self.in_force)
    @rule(family=st.sampled_from(FAMILIES), table=st.sampled_from(["nat", "filter"]), data=st.data())
    def foreign_hand(self, family, table, data):
        """Somebody flushes or removes chains; it is found, and a full batch puts it right."""
        tables = self.host.tables[family]
        chains = tables.tables[table]
        chosen = data.draw(st.sets(st.sampled_from(sorted(chains))))
        lost = any(
            rule
            for chain in chosen
            for rule in chains[chain]
            if chain.startswith("KUBE-") or ("KUBE-" in rule)
        )
        for chain in chosen:
            chains[chain].clear()
        for foreign_table, chain, text in FOREIGN:
            if foreign_table == table and text not in chains.setdefault(chain, []):
                chains[chain].append(text)
        tables.commits += 1
        found = self.backend.proxycore_backend_verify(True)
        assert found.checked
        assert bool(found.drift) == lost, found.drift
        if lost:
            self.send({}, whole=True)
        assert self.backend.proxycore_backend_verify(True).drift == ()

    @invariant()
    def rules_are_those_of_a_first_start(self):
        if not hasattr(self, "host"):
            return
        fresh = FakeHost(self.host.variant)
        backend = IptablesBackend(open_host=fresh.open, clock=lambda: 0.0)
        backend.proxycore_backend_start(self.context())
        backend.proxycore_backend_apply(full(*self.wanted.values(), facts=self.facts))
        for family in FAMILIES:
            ours, theirs = self.host.tables[family].tables, fresh.tables[family].tables
            for table in ("filter", "nat"):
                assert without_comments(ours[table], FOREIGN) == without_comments(theirs[table], FOREIGN)

    @invariant()
    def nothing_foreign_is_touched(self):
        if not hasattr(self, "host"):
            return
        for tables in self.host.tables.values():
            for table, chain, text in FOREIGN:
                assert text in tables.tables[table][chain]


def without_comments(chains, foreign):
    """Chains as they are, but for comments of endpoints, which come and go at their own pace."""
    known = {text for _, _, text in foreign}
    return {
        chain: [
            re.sub(r'-m comment --comment ("[^"]*"|\S+) ', "", rule) for rule in rules if rule not in known
        ]
        for chain, rules in chains.items()
        if chain != "DOCKER"
    }


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
