"""The fake nf_tables against the kernel's: the same bytes, the same verdicts, the same dumps.

What the tests on the fake prove is worth as much as this one says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from proxycore.api import Family, HostState, KernelError, ServicePortName, ServiceState
from proxycore.testing.netns import Namespace
from proxycore.testing.states import HOST, batch, context, full
from proxycore_nft import encode, layout, skeleton
from proxycore_nft.backend import NftBackend
from proxycore_nft.encode import Body
from proxycore_nft.fake import FakeKernel
from proxycore_nft.kernel import Element, NetlinkKernel, Refused
from proxycore_nft.skeleton import Hook

from .test_model import HOSTS, NAMES, SPECS, state_of

pytestmark = pytest.mark.root
TABLE = "proxycore"


def outcome(call: Callable[[], None]) -> object:
    """What came of a call, to be compared: refused messages with errno and place, or how else it failed."""
    try:
        call()
    except Refused as refused:
        return [(refusal.position, refusal.errno, refusal.offset) for refusal in refused.refusals]
    except KernelError:
        return "failed"
    return "done"


def plain(element: Element) -> tuple[object, ...]:
    """Without what time and traffic change."""
    return element.key, element.data, element.chain, element.key_end, element.flags, element.comment


class Twin:
    """Both kernels at once; fails as soon as they differ."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.real = namespace.call(NetlinkKernel)
        self.fake = FakeKernel()
        self.fake.number = self.real.generation()

    def close(self) -> None:
        self.real.close()

    def _both(self, real: Callable[[], None], fake: Callable[[], None]) -> None:
        found, wanted = outcome(real), outcome(fake)
        assert found == wanted
        assert self.real.generation() == self.fake.generation()
        if found != "done":
            fake()

    def _same(self, real: object, fake: object) -> None:
        assert real == fake

    def load(self, text: str) -> None:
        self._both(lambda: self.namespace.call(lambda: self.real.load(text)), lambda: self.fake.load(text))

    def commit(self, bodies: Sequence[Body]) -> None:
        self._both(lambda: self.real.commit(bodies), lambda: self.fake.commit(bodies))

    def generation(self) -> int:
        self._same(self.real.generation(), self.fake.generation())
        return self.real.generation()

    def tables(self, family: str) -> set[str]:
        found = self.real.tables(family)
        self._same(found, self.fake.tables(family))
        return found

    def dormant(self, family: str) -> set[str]:
        found = self.real.dormant(family)
        self._same(found, self.fake.dormant(family))
        return found

    def sets(self, family: str, table: str) -> set[str]:
        found = self.real.sets(family, table)
        self._same(found, self.fake.sets(family, table))
        return found

    def chains(self, family: str, table: str) -> dict[str, Hook | None]:
        found = self.real.chains(family, table)
        self._same(found, self.fake.chains(family, table))
        return found

    def rules(self, family: str, table: str, chain: str | None = None) -> dict[str, str]:
        found = self.real.rules(family, table, chain)
        self._same(found.keys(), self.fake.rules(family, table, chain).keys())
        return found

    def elements(self, family: str, table: str, name: str) -> list[Element]:
        found: list[Element] = []
        present: list[Element] = []
        verdicts = (
            outcome(lambda: found.extend(self.real.elements(family, table, name))),
            outcome(lambda: present.extend(self.fake.elements(family, table, name))),
        )
        self._same(*verdicts)
        if verdicts[0] != "done":
            self.fake.elements(family, table, name)
        self._same(sorted(map(repr, map(plain, found))), sorted(map(repr, map(plain, present))))
        return found

    def find(self, family: str, table: str, name: str, keys: Sequence[bytes]) -> list[Element]:
        found = self.real.find(family, table, name, keys)
        present = self.fake.find(family, table, name, keys)
        self._same(sorted(map(repr, map(plain, found))), sorted(map(repr, map(plain, present))))
        return found

    def dumps_are_equal(self) -> None:
        for family in ("ip", "ip6"):
            for table in self.tables(family):
                self.chains(family, table)
                self.rules(family, table)
                for name in self.sets(family, table):
                    self.elements(family, table, name)


Step = tuple[str, dict[ServicePortName, ServiceState | None], HostState]


@st.composite
def histories(draw: st.DrawFn) -> list[Step]:
    steps: list[Step] = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["batch", "batch", "full", "restart"]))
        changes: dict[ServicePortName, ServiceState | None] = {}
        for number in draw(st.lists(st.integers(0, len(NAMES) - 1), max_size=4, unique=True)):
            spec = draw(st.one_of(st.none(), SPECS, SPECS))
            changes[NAMES[number]] = None if spec is None else state_of(NAMES[number], number // 2, spec)
        steps.append((kind, changes, draw(st.sampled_from([HOST, HOST, *HOSTS]))))
    return steps


@settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(histories())
def test_any_history_is_the_same_on_both(history):
    with Namespace("twin") as namespace:
        twin = Twin(namespace)
        try:
            play(twin, history)
        finally:
            twin.close()


def play(twin: Twin, history: list[Step]) -> None:
    def start(facts: HostState) -> NftBackend:
        backend = NftBackend(open_kernel=lambda: twin)
        backend.proxycore_backend_start(context(facts))
        return backend

    desired: dict[ServicePortName, ServiceState] = {}
    facts = history[0][2]
    backend = start(facts)
    whole = True
    for kind, changes, now in history:
        if kind == "restart":
            backend = start(now)
            whole = True
        wanted = {**desired, **changes}
        desired = {name: state for name, state in wanted.items() if state is not None}
        if whole or kind == "full":
            given_batch = full(*desired.values(), facts=now)
        else:
            given_batch = batch(
                *(state for state in changes.values() if state is not None),
                removed=[name for name, state in changes.items() if state is None],
                facts=now if now != facts else None,
            )
        facts, whole = now, False
        assert backend.proxycore_backend_apply(given_batch).outcome == "applied"
        assert not backend.proxycore_backend_verify(False).checked
        assert backend.proxycore_backend_verify(True).drift == ()
        twin.dumps_are_equal()


# -- deliberately bad transactions --

ONE = layout.frontend_key("10.0.0.1", "TCP", 80)


def elements(verb: str, name: str, *items: bytes, table: str = TABLE) -> Body:
    kind, flags = (encode.NEWSETELEM, encode.F_CREATE) if verb == "add" else (encode.DELSETELEM, 0)
    return Body(kind, flags, "ip", encode.set_head(table, name) + encode.nest(3, *items))


def flush(name: str) -> Body:
    return Body(encode.DELSETELEM, 0, "ip", encode.set_head(TABLE, name))


def item(key: int, data: int | None = None) -> bytes:
    return encode.element(layout.number(key), None if data is None else layout.number(data))


def span(first: str, last: str) -> bytes:
    return encode.range_element(ONE + layout.address_bytes(first), ONE + layout.address_bytes(last))


def verdict(key: int, chain: str) -> bytes:
    return encode.verdict_element(layout.number(key << layout.CLASS_SHIFT), chain)


PRESENT = [
    elements("add", "pools", item(1, 2)),
    elements("add", "allowed-sources", span("10.0.0.0", "10.0.0.255")),
]
GOOD_AND_BAD: dict[str, list[Body]] = {
    "delete what is missing": [elements("delete", "pools", item(5))],
    "add what is there with other data": [elements("add", "pools", item(1, 9))],
    "add what is there": [elements("add", "pools", item(1, 2))],
    "goto a missing chain": [elements("add", "classes", verdict(9, "nowhere"))],
    "goto a chain of the same batch": [
        encode.new_chain("ip", TABLE, "late"),
        elements("add", "classes", verdict(9, "late")),
    ],
    "unknown set": [elements("add", "nothing", item(1))],
    "unknown table": [elements("add", "pools", item(1, 2), table="other")],
    "flush an unknown set": [flush("nothing")],
    "chain in an unknown table": [encode.new_chain("ip", "other", "x")],
    "rule in an unknown chain": [encode.new_rule("ip", TABLE, "nowhere", [encode.go("client")])],
    "chain that is there": [encode.new_chain("ip", TABLE, "client")],
    "longest name of a chain": [encode.new_chain("ip", TABLE, "x" * 255)],
    "longer name of a chain": [encode.new_chain("ip", TABLE, "x" * 256)],
    "two refused, one between": [
        elements("delete", "pools", item(5)),
        elements("add", "pools", item(7, 1)),
        elements("delete", "slots", item(5) + item(6)),
    ],
    "second element of a message": [elements("delete", "pools", item(1), item(5))],
    "delete and add": [elements("delete", "pools", item(1)), elements("add", "pools", item(1, 9))],
    "add and delete": [elements("add", "pools", item(5, 9)), elements("delete", "pools", item(5))],
    "add twice with other data": [elements("add", "pools", item(5, 9), item(5, 8))],
    "delete after a flush": [flush("pools"), elements("delete", "pools", item(1))],
    "add after a flush": [flush("pools"), elements("add", "pools", item(1, 9))],
    "flush what is empty": [flush("slots")],
    "no data for a map": [elements("add", "pools", item(5))],
    "data for a set": [elements("add", "hairpin", encode.element(bytes(8), bytes(4)))],
    "key too short": [elements("add", "pools", encode.element(b"\1\2", bytes(4)))],
    "key too long": [elements("add", "pools", encode.element(bytes(8), bytes(4)))],
    "data too long": [elements("add", "pools", encode.element(bytes(4), bytes(8)))],
    "the same range": [elements("add", "allowed-sources", span("10.0.0.0", "10.0.0.255"))],
    "a range that begins in another": [elements("add", "allowed-sources", span("10.0.0.128", "10.0.1.255"))],
    "a range inside another": [elements("add", "allowed-sources", span("10.0.0.5", "10.0.0.9"))],
    "a range beside another": [elements("add", "allowed-sources", span("10.0.1.0", "10.0.1.255"))],
    "a range that ends before it begins": [elements("add", "allowed-sources", span("20.0.0.9", "20.0.0.1"))],
    "a range that replaces another": [
        elements("delete", "allowed-sources", span("10.0.0.0", "10.0.0.255")),
        elements("add", "allowed-sources", span("10.0.0.0", "10.0.1.255")),
    ],
    "a range after a flush": [
        flush("allowed-sources"),
        elements("add", "allowed-sources", span("10.0.0.0", "10.0.1.255")),
    ],
}  # fmt: skip


@pytest.fixture
def twin(namespace):
    made = Twin(namespace)
    shape = skeleton.shape_of(HOST, "IPv4")
    made.load(skeleton.table_text(shape, TABLE) + skeleton.hook_text(shape, TABLE))
    made.commit(PRESENT)
    yield made
    made.close()


@pytest.mark.parametrize("case", GOOD_AND_BAD)
def test_a_transaction_has_the_same_verdict_on_both(case, twin):
    outcome(lambda: twin.commit(GOOD_AND_BAD[case]))
    twin.dumps_are_equal()


def test_every_kind_of_verdict_was_among_them(twin):
    """So that a fake and a kernel that both refuse everything would not pass."""
    seen = []
    for bodies in GOOD_AND_BAD.values():
        found = outcome(lambda bodies=bodies: twin.fake.commit(bodies))
        seen.append("done" if found == "done" else found[0][1])
    assert {"done", 2, 17, 22, 34} <= set(seen)


@pytest.mark.parametrize(
    "expressions",
    [
        [encode.load_priority(8), encode.look_up("nothing", 8, 8)],
        [encode.go("nowhere")],
        [encode.load_priority(8), encode.load_priority(9), encode.remember("nothing", 1, 8, 9)],
    ],
    ids=["lookup", "goto", "dynset"],
)
def test_a_rule_that_refers_to_nothing_is_refused_by_both(expressions, twin):
    bad = [encode.new_rule("ip", TABLE, "client", expressions)]
    found = [outcome(lambda kernel=kernel: kernel.commit(bad)) for kernel in (twin.real, twin.fake)]
    assert [[(position, number) for position, number, _ in refusals] for refusals in found] == [
        [(0, 2)],
        [(0, 2)],
    ]
    twin.dumps_are_equal()


@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_text_that_is_refused_leaves_both_as_they_were(family: Family, twin):
    nft = layout.NFT_FAMILY[family]
    with pytest.raises(KernelError):
        twin.load(f"delete table {nft} nothing\n")
    twin.dumps_are_equal()


def test_a_deleted_table_is_gone_from_both(twin):
    twin.load(f"delete table ip {TABLE}\n")
    assert twin.tables("ip") == set()
    with pytest.raises(KernelError):
        twin.elements("ip", TABLE, "pools")
