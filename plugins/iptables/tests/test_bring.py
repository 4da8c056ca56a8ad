"""What becomes of a batch that iptables refuses in part, of rules that others put beside ours, and of what others change."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from proxycore.api import Capability, KernelError, ServiceState
from proxycore.kernel.xtables import RestoreRefused
from proxycore.kubechains import LOCALNET_MARKER, MARKER
from proxycore.testing.states import HOST, batch, context, frontend, full, host, name_of, numbered, service
from proxycore_iptables.backend import CAPABILITIES, IptablesBackend
from proxycore_iptables.fake import FakeHost

VARIANTS = ["legacy", "nft"]


def started(fake: FakeHost, **options: object) -> IptablesBackend:
    backend = IptablesBackend(open_host=fake.open, clock=lambda: 0.0)
    backend.proxycore_backend_start(msgspec.structs.replace(context(HOST), options=options))
    return backend


def running(variant: str, *states: ServiceState, **options: object) -> tuple[FakeHost, IptablesBackend]:
    fake = FakeHost(variant)
    backend = started(fake, **options)
    assert backend.proxycore_backend_apply(full(*states)).outcome == "applied"
    backend.proxycore_backend_verify(True)
    return fake, backend


def refusing(*addresses: str):
    return lambda rule: any(rule.endswith(f"--to-destination {address}") for address in addresses)


def served(fake: FakeHost, state: ServiceState) -> bool:
    """Is there a way from the Service's first address to each of its endpoints?"""
    tables = fake.tables[state.name.family].tables["nat"]
    reached, looked = set(), ["KUBE-SERVICES"]
    seen = set(looked)
    while looked:
        for rule in tables[looked.pop()]:
            target = rule.rpartition("-j ")[2].split(" ")[0]
            if "cluster IP" in rule and f"-d {state.frontends[0].address}/" not in rule:
                continue
            if target == "DNAT":
                reached.add(rule.rpartition(" ")[2])
            elif target in tables and target not in seen:
                seen.add(target)
                looked.append(target)
    return {str(endpoint) for endpoint in state.cluster.endpoints} <= reached


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("bad", [1, 13, 60])
def test_however_many_are_refused_the_others_are_served(variant, named, bad):
    states = [numbered(i, 2) for i in range(bad + 30)]
    wrong = [state for i, state in enumerate(states) if i % 2 == 0][:bad] + states[bad * 2 :][
        : max(0, bad - 45)
    ]
    wrong = wrong[:bad]
    fake = FakeHost(variant)
    refuse = refusing(*(str(state.cluster.endpoints[1]) for state in wrong))
    for tables in fake.tables.values():
        if named:
            tables.refuse_line = refuse
        else:
            tables.refuse_commit = refuse
    backend = started(fake)
    result = backend.proxycore_backend_apply(full(*states))
    assert result.outcome == "applied", result.message
    failed = {failure.name for failure in result.failed}
    assert {state.name for state in wrong} <= failed
    for state in states:
        if state.name not in failed:
            assert served(fake, state), state.name
    # Some may have to wait for their next turn, but only beside many.
    assert len(failed) - len(wrong) <= (40 if bad > 40 else 0)
    second = backend.proxycore_backend_apply(
        batch(*(s for s in states if s.name in failed and s not in wrong))
    )
    assert second.outcome == "applied"
    assert not second.failed


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("services", [1, 20])
def test_where_nothing_is_accepted_nobody_is_blamed(variant, services):
    fake = FakeHost(variant)
    backend = started(fake)
    for tables in fake.tables.values():
        tables.restore = refuse_all
    result = backend.proxycore_backend_apply(full(*(numbered(i, 1) for i in range(services))))
    assert (result.outcome, result.culprits, result.failed) == ("rejected", (), ())
    assert "no single Service" in result.message


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_whose_old_state_is_refused_too_does_not_hold_up_the_others(variant):
    sticky = numbered(0, 2, affinity=10)
    others = [numbered(i, 1) for i in range(1, 12)]
    fake, backend = running(variant, sticky, *others)
    tables = fake.tables["IPv4"]
    tables.refuse_commit = lambda rule: "-m recent" in rule
    for chain in list(tables.tables["nat"]):
        if chain.startswith("KUBE-"):
            tables.tables["nat"][chain].clear()
    tables.commits += 1
    assert backend.proxycore_backend_verify(True).drift
    result = backend.proxycore_backend_apply(full(sticky, *others))
    assert result.outcome == "applied"
    assert result.unknown == (sticky.name,)
    assert "refused" in result.message
    assert all(served(fake, state) for state in others)
    assert not served(fake, sticky)


def test_one_family_that_is_refused_does_not_hold_up_the_other():
    fake = FakeHost("nft")
    backend = started(fake)
    fake.tables["IPv6"].refuse_commit = lambda rule: True
    four, six = numbered(1, 1), numbered(2, 1, family="IPv6")
    result = backend.proxycore_backend_apply(full(four, six))
    assert (result.outcome, result.unknown) == ("applied", (six.name,))
    assert served(fake, four)
    fake.tables["IPv6"].refuse_commit = lambda rule: False
    assert backend.proxycore_backend_apply(batch(six)).outcome == "applied"
    assert served(fake, six)
    assert backend.proxycore_backend_verify(True).drift == ()


def test_what_is_half_done_when_it_fails_is_found_by_the_next_look(monkeypatch):
    """The engine may have nothing more to send: an object that went back to what it was."""
    states = [numbered(i, 1) for i in range(4)]
    fake, backend = running("nft", *states, chainsPerRestore=3)
    tables = fake.tables["IPv4"]
    restore, calls = tables.restore, itertools.count()

    def failing(text, sections):
        if next(calls) == 1:
            raise KernelError("out of memory")
        restore(text, sections)

    monkeypatch.setattr(tables, "restore", failing)
    changed = [numbered(i, 1, first=50) for i in range(4)]
    result = backend.proxycore_backend_apply(batch(*changed))
    assert (result.outcome, result.culprits) == ("rejected", ())
    found = backend.proxycore_backend_verify(False)
    assert found.checked
    assert {drift.service for drift in found.drift} & {state.name for state in states}
    backend.proxycore_backend_apply(full(*states))
    assert all(served(fake, state) for state in states)
    assert not served(fake, changed[0])
    assert backend.proxycore_backend_verify(True).drift == ()


def test_damage_that_could_not_be_repaired_is_not_forgotten():
    state = numbered(1, 2)
    fake, backend = running("nft", state)
    tables = fake.tables["IPv4"]
    tables.tables["nat"]["KUBE-SERVICES"].clear()
    tables.commits += 1
    tables.refuse_commit = lambda rule: True
    for _ in range(3):
        assert backend.proxycore_backend_verify(True).drift
        assert backend.proxycore_backend_apply(full(state)).unknown == (state.name,)
    tables.refuse_commit = lambda rule: False
    assert backend.proxycore_backend_apply(full(state)).outcome == "applied"
    assert served(fake, state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_chain_that_others_emptied_is_nobodys_fault(variant):
    states = [numbered(i, 1) for i in range(30)]
    fake, backend = running(variant, *states)
    tables = fake.tables["IPv4"]
    tables.tables["nat"]["KUBE-SERVICES"].clear()
    tables.commits += 1
    new = numbered(100, 1)
    result = backend.proxycore_backend_apply(batch(new))
    assert (result.outcome, result.failed) == ("applied", ())
    assert all(served(fake, state) for state in [*states, new])


def refuse_all(text, sections):
    raise RestoreRefused(
        "can't initialize iptables table", line=None, lines=(), said="can't initialize table"
    )


def test_a_mark_beside_ours_comes_back_after_a_flush():
    """It says that route_localnet was 0 before us."""
    state = numbered(1, 1)
    fake, backend = running("nft", state)
    nat = fake.tables["IPv4"].tables["nat"]
    nat[LOCALNET_MARKER] = []
    fake.tables["IPv4"].commits += 1
    assert backend.proxycore_backend_verify(True).drift == ()
    for chain in [chain for chain in nat if chain.startswith("KUBE-")]:
        del nat[chain]
    for rules in nat.values():
        rules.clear()
    fake.tables["IPv4"].commits += 1
    assert backend.proxycore_backend_verify(True).drift
    backend.proxycore_backend_apply(full(state))
    assert LOCALNET_MARKER in fake.tables["IPv4"].tables["nat"]
    assert backend.proxycore_backend_verify(True).drift == ()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chain", ["PREROUTING", "THEIRS"])
@pytest.mark.parametrize(
    "theirs",
    ["-s 10.77.0.0/16 -p tcp -m tcp --dport 9999 -j KUBE-MARK-MASQ", "-s 5.5.5.5/32 -j KUBE-SERVICES"],
)
def test_a_rule_of_somebody_else_that_leads_to_us_stays(variant, chain, theirs):
    state = numbered(1, 1)
    fake, backend = running(variant, state)
    tables = fake.tables["IPv4"]
    tables.tables["nat"].setdefault(chain, []).append(theirs)
    tables.commits += 1
    assert backend.proxycore_backend_verify(True).drift == ()
    backend.proxycore_backend_apply(full(state))
    assert theirs in tables.tables["nat"][chain]
    assert backend.proxycore_backend_verify(True).drift == ()


def test_the_kubelets_chain_that_comes_after_our_start_keeps_its_rules():
    fake = FakeHost("legacy")
    backend = started(fake, localhostNodePorts=True)
    theirs = "-m mark --mark 0x8000/0x8000 -j DROP"
    tables = fake.tables["IPv4"]
    tables.tables["filter"]["KUBE-FIREWALL"] = [theirs]
    tables.tables["filter"]["INPUT"].append("-j KUBE-FIREWALL")
    tables.commits += 1
    assert backend.proxycore_backend_apply(full(numbered(1, 1))).outcome == "applied"
    assert tables.tables["filter"]["KUBE-FIREWALL"][0] == theirs
    assert len(tables.tables["filter"]["KUBE-FIREWALL"]) == 2
    assert tables.tables["filter"]["INPUT"].count("-j KUBE-FIREWALL") == 1


@pytest.mark.parametrize("pieces", [1000, 3])
def test_while_the_mark_changes_packets_with_either_are_forwarded(pieces):
    states = [numbered(i, 1) for i in range(4)]
    fake, backend = running("nft", *states, chainsPerRestore=pieces)
    fake.tables["IPv4"].texts.clear()
    backend.proxycore_backend_apply(batch(facts=host(masquerade_bit=5)))
    accepted, set_mark = {"0x4000"}, "0x4000"
    for section in "".join(fake.tables["IPv4"].texts).split("COMMIT\n"):
        lines = section.splitlines()
        forward = [line for line in lines if line.startswith("-A KUBE-FORWARD") and "--mark" in line]
        if any(line.startswith(":KUBE-FORWARD") for line in lines):
            accepted = {line.rpartition("--mark ")[2].partition("/")[0] for line in forward}
        for line in lines:
            if line.startswith("-A KUBE-MARK-MASQ"):
                set_mark = line.rpartition("--set-xmark ")[2].partition("/")[0]
        assert set_mark in accepted
    assert (accepted, set_mark) == ({"0x20"}, "0x20")


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_that_is_refused_does_not_keep_an_address_that_another_has_now(variant):
    a, b = name_of("a"), name_of("b")
    old = service(a, frontend("172.30.0.1"), cluster=["10.0.0.1:80"])
    fake, backend = running(variant, old)
    for tables in fake.tables.values():
        tables.refuse_line = refusing("10.0.0.9:80")
    moved = service(a, frontend("172.30.0.2"), cluster=["10.0.0.9:80"])
    newcomer = service(b, frontend("172.30.0.1"), cluster=["10.0.0.5:80"])
    result = backend.proxycore_backend_apply(batch(moved, newcomer))
    assert [failure.name for failure in result.failed] == [a]
    rules = [rule for rule in fake.tables["IPv4"].tables["nat"]["KUBE-SERVICES"] if "172.30.0.1/" in rule]
    assert len(rules) == 1
    assert served(fake, newcomer)


def test_one_whose_rules_cannot_be_written_fails_alone():
    odd = service(name_of("odd"), frontend("172.30.9.9"), cluster=["10.0.0.1:80"])
    odd = msgspec.structs.replace(
        odd, frontends=(msgspec.structs.replace(odd.frontends[0], address="nowhere"),)
    )
    fake, backend = running("nft", numbered(1, 1))
    result = backend.proxycore_backend_apply(batch(odd, numbered(2, 1)))
    assert [failure.name for failure in result.failed] == [odd.name]
    assert served(fake, numbered(2, 1))


def test_a_mark_that_goes_tells_of_a_kube_proxy():
    fake, backend = running("nft", numbered(1, 1))
    del fake.tables["IPv4"].tables["nat"][MARKER]
    fake.tables["IPv4"].commits += 1
    [drift] = backend.proxycore_backend_verify(True).drift
    assert "kube-proxy" in drift.what


@pytest.mark.parametrize("call", ["verify", "apply", "inspect", "counters"])
def test_without_a_start_the_answer_says_so(call):
    arguments = {
        "verify": (False,),
        "apply": (full(),),
        "inspect": (name_of("web"),),
        "counters": (),
    }[call]
    with pytest.raises(KernelError, match="not started"):
        getattr(IptablesBackend(), f"proxycore_backend_{call}")(*arguments)


def test_what_is_claimed_is_what_kube_proxys_iptables_mode_does():
    assert Capability.LOCALHOST_NODE_PORT in CAPABILITIES
    assert Capability.UNDEFINED_PORTS not in CAPABILITIES
