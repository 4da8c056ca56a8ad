"""The backend's promises, one by one, on a fake nf_tables."""

from __future__ import annotations

import errno
import itertools

import pytest

from proxycore.api import (
    BackendContext,
    Failure,
    FrontendKind,
    KernelError,
    LocalPodsByInterface,
    NodePortAddresses,
    ServiceState,
)
from proxycore.testing.states import (
    HOST,
    batch,
    context,
    frontend,
    full,
    host,
    name_of,
    node_port,
    numbered,
    service,
)
from proxycore_nft import layout, skeleton, tables
from proxycore_nft.backend import NftBackend
from proxycore_nft.fake import FakeKernel
from proxycore_nft.kernel import Element, Refusal, Refused

from .meaning import live_table
from .running import assert_means, entry_of, running, started

# -- work in proportion to the change --


def _work(kernel: FakeKernel, backend: NftBackend, state: ServiceState) -> tuple[int, int]:
    """Operations and messages of one batch, which must be one transaction."""
    commits, messages = kernel.commits, kernel.messages
    result = backend.proxycore_backend_apply(batch(state))
    assert result.outcome == "applied"
    assert kernel.commits == commits + 1
    return result.operations, kernel.messages - messages


@pytest.mark.parametrize("affinity", [None, 10])
@pytest.mark.parametrize("after", [9, 10, 11], ids=["removed", "replaced", "added"])
def test_a_change_costs_the_same_however_many_services_there_are(affinity, after):
    costs = set()
    for count in (10, 1000):
        kernel, backend = running(*(numbered(n, 10, affinity=affinity) for n in range(count)))
        costs.add(_work(kernel, backend, numbered(5, after, first=after == 10, affinity=affinity)))
    assert len(costs) == 1


@pytest.mark.parametrize("affinity", [None, 10])
def test_a_change_costs_the_same_however_many_frontends_there_are(affinity):
    costs = set()
    for frontends in (1, 5):
        kernel, backend = running(numbered(5, 10, frontends=frontends, affinity=affinity))
        costs.add(_work(kernel, backend, numbered(5, 9, frontends=frontends, affinity=affinity)))
    assert len(costs) == 1


def test_an_endpoint_that_takes_anothers_place_costs_two_elements():
    kernel, backend = running(numbered(5, 10))
    operations, _ = _work(
        kernel,
        backend,
        service(
            numbered(5).name, *numbered(5).frontends, cluster=[f"10.1.5.{n + 1}:80" for n in (*range(9), 99)]
        ),
    )
    assert operations == 2


def test_an_endpoint_removed_costs_at_most_five_elements():
    kernel, backend = running(numbered(5, 10))
    targets = [f"10.1.5.{n + 1}:80" for n in range(10) if n != 4]
    operations, _ = _work(kernel, backend, service(numbered(5).name, *numbered(5).frontends, cluster=targets))
    # The last slot moves into the hole (2), its own goes (1), the class changes (2).
    assert operations == 5


def test_a_batch_that_changes_nothing_is_no_transaction():
    kernel, backend = running(numbered(1, 3), numbered(1, 3, family="IPv6"))
    commits, number = kernel.commits, kernel.number
    result = backend.proxycore_backend_apply(batch(numbered(1, 3), numbered(1, 3, family="IPv6")))
    assert (result.outcome, result.operations) == ("applied", 0)
    assert (kernel.commits, kernel.number) == (commits, number)


def test_both_families_are_one_transaction():
    kernel, backend = running(numbered(1, 3), numbered(1, 3, family="IPv6"))
    commits = kernel.commits
    backend.proxycore_backend_apply(batch(numbered(1, 5), numbered(1, 5, family="IPv6")))
    assert kernel.commits == commits + 1


# -- refusals --


def test_a_refused_service_is_named_and_nothing_changes():
    kernel, backend = running(numbered(1, 3), numbered(2, 3), numbered(3, 3, family="IPv6"))
    bad = layout.target_bytes("10.1.2.4", 80)
    kernel.refuse = lambda name, key: (
        "frozen over" if name == "frontends" and key[:4] == b"\xac\x1e\0\x04" else None
    )
    assert bad
    before = kernel.number
    result = backend.proxycore_backend_apply(
        batch(numbered(1, 4), numbered(3, 2), numbered(3, 5, family="IPv6"))
    )
    assert result.outcome == "rejected"
    assert result.culprits == (
        Failure(name=numbered(3).name, why="nf_tables refused its elements of frontends: frozen over"),
    )
    assert kernel.number == before
    assert_means(kernel, numbered(1, 3), numbered(2, 3), numbered(3, 3, family="IPv6"))
    kernel.refuse = lambda name, key: None
    result = backend.proxycore_backend_apply(batch(numbered(1, 4), numbered(3, 5, family="IPv6")))
    assert result.outcome == "applied"
    assert_means(kernel, numbered(1, 4), numbered(2, 3), numbered(3, 5, family="IPv6"))


def test_a_refusal_in_one_family_leaves_the_other_as_it_was():
    kernel, backend = running(numbered(1, 3), numbered(1, 3, family="IPv6"))
    kernel.refuse = lambda name, key: (
        "no" if len(key) == 8 and name == "endpoints" and key[4:8] == b"\x03\0\0\0" else None
    )
    result = backend.proxycore_backend_apply(batch(numbered(1, 2), numbered(1, 4, family="IPv6")))
    assert result.outcome == "rejected"
    assert [culprit.name for culprit in result.culprits or ()] == [numbered(1, family="IPv6").name]
    assert_means(kernel, numbered(1, 3), numbered(1, 3, family="IPv6"))


@pytest.mark.parametrize("as_full", [False, True])
def test_two_services_with_one_frontend_are_told_apart_by_the_kernel(as_full):
    """The core prevents it; if it happens all the same, the later one is to blame, and its elements do no harm."""
    thief = service(name_of("thief"), *numbered(1).frontends, cluster=["10.9.9.9:80"])
    kernel, backend = running(numbered(1, 3), numbered(2, 3))
    given = full(numbered(1, 3), numbered(2, 4), thief) if as_full else batch(numbered(2, 4), thief)
    result = backend.proxycore_backend_apply(given)
    assert result.outcome == "rejected"
    assert [culprit.name for culprit in result.culprits or ()] == [thief.name]
    assert_means(kernel, numbered(1, 3), numbered(2, 3))
    given = full(numbered(1, 3), numbered(2, 4)) if as_full else batch(numbered(2, 4))
    assert backend.proxycore_backend_apply(given).outcome == "applied"
    assert_means(kernel, numbered(1, 3), numbered(2, 4))
    assert len(backend._tables["IPv4"].mirror.plain.used) == 2


@pytest.mark.parametrize("position", [-1, 10**6])
def test_a_fault_of_the_transaction_as_a_whole_is_no_services(position):
    """As EPERM and ENOMEM come: with the number of the batch's first or last mark."""
    kernel, backend = running(numbered(1, 3))

    def refuse(bodies) -> None:
        raise Refused([Refusal(position, errno.ENOMEM, "", None)])

    kernel.commit = refuse  # type: ignore[method-assign]
    result = backend.proxycore_backend_apply(batch(numbered(1, 4)))
    assert result.outcome == "rejected"
    assert result.culprits is None
    assert "ENOMEM" in result.message


def test_a_service_that_does_not_fit_fails_alone(monkeypatch):
    kernel, backend = running(numbered(1, 3), numbered(2, 3))
    monkeypatch.setattr(layout, "POOL_MAX", 5)
    result = backend.proxycore_backend_apply(batch(numbered(1, 4), numbered(2, 6), numbered(3, 6)))
    assert result.outcome == "applied"
    assert {failure.name for failure in result.failed} == {numbered(2).name, numbered(3).name}
    assert "6 endpoints in one pool" in result.failed[0].why
    assert_means(kernel, numbered(1, 4), numbered(2, 3))


def test_an_element_that_is_gone_is_healed_without_blame():
    """A deletion of what is not there means that somebody else was here: everything is written, nobody is named."""
    kernel, backend = running(numbered(1, 3), numbered(2, 3))
    kernel.state["ip", "proxycore"].sets["pools"].elements.clear()
    kernel.number += 1
    result = backend.proxycore_backend_apply(batch(numbered(1, 4)))
    assert (result.outcome, result.culprits) == ("applied", None)
    assert_means(kernel, numbered(1, 4), numbered(2, 3))


@pytest.mark.parametrize("count", [5, 30], ids=["usual class", "new class"])
def test_what_a_lost_transaction_has_done_is_undone(count):
    """It was in force though nobody heard of it; by the time of the next batch it is wanted no more."""
    kernel, backend = running(numbered(1, 3))
    kernel.lose_next = True
    with pytest.raises(KernelError, match="acknowledgement is lost"):
        backend.proxycore_backend_apply(batch(numbered(2, count)))
    assert backend.proxycore_backend_apply(batch(numbered(1, 4))).outcome == "applied"
    assert_means(kernel, numbered(1, 4))
    assert backend.proxycore_backend_verify(True).drift == ()
    assert len(kernel.state) == 2


def test_classes_made_ahead_that_nobody_heard_of_are_not_made_twice():
    kernel, backend = running(numbered(1, 3))
    backend.proxycore_backend_apply(batch(numbered(1, 100)))
    kernel.lose_next = True
    backend.proxycore_backend_verify(False)
    assert backend.proxycore_backend_apply(batch(numbered(1, 101))).outcome == "applied"
    assert_means(kernel, numbered(1, 101))
    assert backend.proxycore_backend_verify(True).drift == ()


def test_the_table_gone_under_a_small_batch_is_healed():
    kernel, backend = running(numbered(1, 3), numbered(2, 3))
    kernel.state.clear()
    result = backend.proxycore_backend_apply(batch(numbered(1, 4)))
    assert result.outcome == "applied"
    kernel.number += 1
    backend._verify_after = 0.0
    if backend.proxycore_backend_verify(False).drift:
        backend.proxycore_backend_apply(full(numbered(1, 4), numbered(2, 3)))
    assert_means(kernel, numbered(1, 4), numbered(2, 3))


# -- restarts --


def test_a_refused_first_batch_does_not_lose_what_the_last_run_gave_out():
    states = [numbered(1, 3, affinity=10), numbered(2, 3), numbered(3, 3, affinity=10)]
    kernel, first = running(*states)
    known = [entry_of(first, state.name) for state in states]
    second = started(kernel)
    kernel.refuse = lambda name, key: "no" if name == "frontends" and key[:4] == b"\xac\x1e\0\x03" else None
    assert second.proxycore_backend_apply(full(*states)).outcome == "rejected"
    kernel.refuse = lambda name, key: None
    assert second.proxycore_backend_apply(full(*states)).outcome == "applied"
    now = [entry_of(second, state.name) for state in states]
    assert [(e.index, e.cluster.handles) for e in now] == [(e.index, e.cluster.handles) for e in known]


def test_a_new_service_listed_first_does_not_take_an_old_ones_index():
    kernel, first = running(numbered(5, 3), numbered(6, 3, affinity=10))
    known = {n: entry_of(first, numbered(n).name).index for n in (5, 6)}
    second = started(kernel)
    new = [numbered(1, 3), numbered(2, 3, affinity=10)]
    second.proxycore_backend_apply(full(*new, numbered(5, 3), numbered(6, 3, affinity=10)))
    assert {n: entry_of(second, numbered(n).name).index for n in (5, 6)} == known


def test_classes_are_adopted_and_not_made_twice():
    kernel, _ = running(numbered(1, 40), numbered(2, 3, affinity=77))
    chains = set(kernel.state["ip", "proxycore"].chains)
    second = started(kernel)
    commits = kernel.commits
    second.proxycore_backend_apply(full(numbered(1, 40), numbered(2, 3, affinity=77)))
    assert kernel.commits == commits + 1
    assert set(kernel.state["ip", "proxycore"].chains) == chains


def test_a_start_that_failed_can_be_tried_again():
    kernel, _ = running(numbered(1, 3))
    kernel.state["ip", "proxycore"].rules["services"].clear()
    closed = []
    kernel.close = lambda: closed.append(1)  # type: ignore[method-assign]
    kernel.refuse_text = lambda text: True
    backend = NftBackend(open_kernel=lambda: kernel)
    with pytest.raises(KernelError, match="out of luck"):
        backend.proxycore_backend_start(context())
    kernel.refuse_text = lambda text: False
    backend.proxycore_backend_start(context())
    assert closed == [1]
    assert backend.proxycore_backend_apply(full(numbered(1, 3))).outcome == "applied"
    assert_means(kernel, numbered(1, 3))
    assert backend.proxycore_backend_verify(False).checked is False


def test_a_family_that_is_served_no_more_is_taken_away():
    kernel, _ = running(numbered(1, 3), numbered(1, 3, family="IPv6"))
    backend = NftBackend(open_kernel=lambda: kernel)
    backend.proxycore_backend_start(context(families=("IPv4",)))
    assert {nft for nft, _ in kernel.state} == {"ip"}
    backend.proxycore_backend_apply(full(numbered(1, 3), numbered(1, 3, family="IPv6")))
    assert {nft for nft, _ in kernel.state} == {"ip"}
    assert not backend.proxycore_backend_verify(False).checked


OTHER_SHAPES = [
    host(masquerade_bit=3),
    host(
        node_ports_ipv4=NodePortAddresses(all_local=True), node_ports_ipv6=NodePortAddresses(all_local=True)
    ),
    host(detect_local=LocalPodsByInterface("cni0")),
]


@pytest.mark.parametrize("facts", OTHER_SHAPES)
def test_another_configuration_replaces_the_table_in_one_step(facts):
    kernel, first = running(numbered(1, 3, affinity=10), numbered(2, 3))
    known = [entry_of(first, numbered(n).name).index for n in (1, 2)]
    seen: list[tuple[str, ...]] = []
    loads = kernel.load

    def load(text: str) -> None:
        loads(text)
        seen.append(
            tuple(n for (nft, n), t in kernel.state.items() if nft == "ip" and any(t.chains.values()))
        )

    kernel.load = load  # type: ignore[method-assign]
    second = started(kernel, facts)
    assert {nft for nft, _ in kernel.state} == {"ip", "ip6"}
    result = second.proxycore_backend_apply(full(numbered(1, 3, affinity=10), numbered(2, 3), facts=facts))
    assert result.outcome == "applied"
    assert all(1 <= len(names) <= 2 for names in seen), "at every moment a table carries traffic"
    assert seen[0] == ("proxycore",)
    assert seen[-1] == ("proxycore-alt",)
    assert sorted(name for nft, name in kernel.state) == ["proxycore-alt", "proxycore-alt"]
    assert [entry_of(second, numbered(n).name).index for n in (1, 2)] == known
    assert_means(kernel, numbered(1, 3, affinity=10), numbered(2, 3), facts=facts)


@pytest.mark.parametrize("facts", OTHER_SHAPES)
def test_facts_that_change_between_start_and_first_batch_do_not_stop_traffic(facts):
    """The live table of another version stays until its successor is filled, whatever that turns out to be."""
    kernel, _ = running(numbered(1, 3, affinity=10), facts=host(masquerade_bit=9))
    client = layout.address_bytes("10.0.0.1") + layout.number(1)
    kernel.state["ip", "proxycore"].sets["affinity"].elements[client, None, 0] = Element(
        client, layout.number(1 << 16 | 1), timeout=10000, expiration=4000
    )
    second = started(kernel)
    loads = kernel.load
    hooked: list[int] = []

    def load(text: str) -> None:
        loads(text)
        hooked.append(
            sum(1 for (nft, _), t in kernel.state.items() if nft == "ip" and any(t.chains.values()))
        )

    kernel.load = load  # type: ignore[method-assign]
    second.proxycore_backend_apply(full(numbered(1, 3, affinity=10), facts=facts))
    assert set(hooked) == {1, 2}, "at every moment a table carries traffic"
    assert_means(kernel, numbered(1, 3, affinity=10), facts=facts)
    table = kernel.state["ip", live_table(kernel, "ip")]
    assert [e.key for e in table.sets["affinity"].elements.values()] == [client]
    assert len(kernel.state) == 2


@pytest.mark.parametrize("facts", [HOST, *OTHER_SHAPES])
def test_hooks_that_cannot_be_set_are_set_by_the_next_batch(facts):
    kernel, _ = running(numbered(1, 3, affinity=10), facts=host(masquerade_bit=9))
    second = started(kernel)
    kernel.refuse_text = lambda text: "type nat hook" in text
    with pytest.raises(KernelError, match="out of luck"):
        second.proxycore_backend_apply(full(numbered(1, 20, affinity=10), numbered(2, 20), facts=facts))
    assert_means(kernel, numbered(1, 3, affinity=10), facts=host(masquerade_bit=9))
    kernel.refuse_text = lambda text: False
    result = second.proxycore_backend_apply(full(numbered(1, 20, affinity=10), numbered(2, 20), facts=facts))
    assert result.outcome == "applied"
    assert_means(kernel, numbered(1, 20, affinity=10), numbered(2, 20), facts=facts)
    mirror = second._tables["IPv4"].mirror
    assert len(mirror.plain.used) == len(mirror.sticky.used) == 1
    assert len(kernel.state) == 2
    table = kernel.state["ip", live_table(kernel, "ip")]
    assert all(len(rules) <= 4 for chain, rules in table.rules.items() if chain.startswith("endpoints"))
    assert second.proxycore_backend_verify(True).drift == ()


def _keep_tables(text: str) -> bool:
    return "delete table" in text


def test_a_table_that_cannot_be_taken_away_goes_with_the_next_batch():
    facts = OTHER_SHAPES[0]
    kernel, backend = running(numbered(1, 3, affinity=10))
    kernel.refuse_text = _keep_tables
    with pytest.raises(KernelError, match="out of luck"):
        backend.proxycore_backend_apply(batch(numbered(1, 4, affinity=10), facts=facts))
    assert len(kernel.state) == 4
    kernel.refuse_text = lambda text: False
    backend.proxycore_backend_apply(batch(numbered(2, 4)))
    assert set(kernel.state) == {("ip", "proxycore-alt"), ("ip6", "proxycore-alt")}
    assert_means(kernel, numbered(1, 4, affinity=10), numbered(2, 4), facts=facts)
    assert backend.proxycore_backend_verify(True).drift == ()


def test_a_table_that_was_not_taken_away_may_be_needed_again():
    kernel, backend = running(numbered(1, 3))
    kernel.refuse_text = _keep_tables
    with pytest.raises(KernelError, match="out of luck"):
        backend.proxycore_backend_apply(batch(numbered(1, 4), facts=OTHER_SHAPES[0]))
    kernel.refuse_text = lambda text: False
    backend.proxycore_backend_apply(batch(numbered(1, 5), facts=OTHER_SHAPES[1]))
    assert_means(kernel, numbered(1, 5), facts=OTHER_SHAPES[1])
    assert set(kernel.state) == {("ip", "proxycore"), ("ip6", "proxycore")}


def test_an_interrupted_switch_is_completed_by_the_next_start():
    facts = OTHER_SHAPES[0]
    kernel, first = running(numbered(1, 3, affinity=10))
    kernel.refuse_text = _keep_tables
    with pytest.raises(KernelError, match="out of luck"):
        first.proxycore_backend_apply(batch(numbered(1, 4, affinity=10), facts=facts))
    kernel.refuse_text = lambda text: False
    second = NftBackend(open_kernel=lambda: kernel)
    adopted = second.proxycore_backend_start(context(facts)).adopted
    assert adopted == "table ip proxycore-alt, 1 frontends; table ip6 proxycore-alt, 0 frontends"
    assert set(kernel.state) == {("ip", "proxycore-alt"), ("ip6", "proxycore-alt")}
    second.proxycore_backend_apply(full(numbered(1, 4, affinity=10), facts=facts))
    assert_means(kernel, numbered(1, 4, affinity=10), facts=facts)


@pytest.mark.parametrize("facts", OTHER_SHAPES)
def test_a_new_table_that_cannot_be_made_leaves_the_old_one_in_force(facts):
    kernel, backend = running(numbered(1, 3, affinity=10))
    kernel.refuse_text = lambda text: "map frontends" in text
    with pytest.raises(KernelError, match="out of luck"):
        backend.proxycore_backend_apply(batch(numbered(1, 4, affinity=10), facts=facts))
    assert_means(kernel, numbered(1, 3, affinity=10))
    kernel.refuse_text = lambda text: False
    backend.proxycore_backend_apply(batch(numbered(1, 4, affinity=10), facts=facts))
    assert_means(kernel, numbered(1, 4, affinity=10), facts=facts)
    assert len(kernel.state) == 2


def test_an_index_freed_with_a_new_table_is_not_given_again_at_once():
    kernel, backend = running(numbered(1, 3), numbered(2, 3), numbered(3, 3))
    freed = entry_of(backend, numbered(2).name).index
    facts = OTHER_SHAPES[0]
    backend.proxycore_backend_apply(batch(removed=[numbered(2).name], facts=facts))
    backend.proxycore_backend_apply(batch(numbered(4, 3)))
    assert entry_of(backend, numbered(4).name).index != freed
    assert_means(kernel, numbered(1, 3), numbered(3, 3), numbered(4, 3), facts=facts)


# -- the rest --


def test_what_a_service_has_in_the_kernel_is_shown():
    state = service(
        name_of("web"),
        frontend("172.30.0.41"),
        frontend("192.0.2.10", kind=FrontendKind.LOAD_BALANCER_IP, source_ranges=["198.51.100.0/24"]),
        node_port(30080),
        cluster=["10.180.0.1:8080"],
    )
    _, backend = running(state, numbered(1, 3))
    shown = {
        (o.place, o.native.partition(" comment")[0]) for o in backend.proxycore_backend_inspect(state.name)
    }
    places = {place for place, _ in shown}
    assert places == {
        f"ip proxycore {name}"
        for name in (
            "frontends",
            "node-ports",
            "firewalled",
            "allowed-sources",
            "cluster-ips",
            "pools",
            "endpoints",
        )
    }
    texts = {
        text.partition(" : ")[0] for place, text in shown if place.endswith(("frontends", "allowed-sources"))
    }
    assert texts == {
        "172.30.0.41 . tcp . 80",
        "192.0.2.10 . tcp . 80",
        "192.0.2.10 . tcp . 80 . 198.51.100.0-198.51.100.255",
    }
    assert backend.proxycore_backend_inspect(name_of("unknown")) == ()


def test_connections_are_counted_by_frontend():
    kernel, backend = running(numbered(1, 3, frontends=2), numbered(2, 3, family="IPv6"))
    elements = kernel.state["ip", "proxycore"].sets["frontends"].elements
    for number, place in enumerate(sorted(elements, key=repr)):
        elements[place] = elements[place]._replace(packets=number + 5)
    found = {counters.name: counters for counters in backend.proxycore_backend_counters()}
    assert found[numbered(1).name].connections == 11
    assert set(found[numbered(1).name].by_frontend) == {"172.30.0.2 . tcp . 80", "192.0.2.2 . tcp . 8001"}
    assert found[numbered(2, family="IPv6").name].connections == 0


@pytest.mark.parametrize("call", ["verify", "apply", "inspect", "counters"])
def test_without_a_start_the_answer_says_so(call):
    backend = NftBackend(open_kernel=FakeKernel)
    arguments = {"verify": (True,), "apply": (full(),), "inspect": (numbered(1).name,), "counters": ()}[call]
    with pytest.raises(KernelError, match="not started"):
        getattr(backend, f"proxycore_backend_{call}")(*arguments)


def test_cleaning_up_takes_every_table_of_ours_and_no_other():
    kernel, _ = running(numbered(1, 3))
    shape = skeleton.shape_of(HOST, "IPv4")
    kernel.load(skeleton.table_text(shape, "proxycore-alt", "skeleton-older"))
    kernel.load("table ip mine {\n\tchain services {\n\t}\n}\n")
    backend = NftBackend(open_kernel=lambda: kernel)
    removed = backend.proxycore_backend_cleanup(context()).removed
    assert sorted(removed) == ["table ip proxycore", "table ip proxycore-alt", "table ip6 proxycore"]
    assert set(kernel.state) == {("ip", "mine")}
    assert backend.proxycore_backend_cleanup(context()).removed == ()


@pytest.mark.parametrize("takeover", ["auto", "leave"])
def test_kube_proxys_tables_are_the_cores_affair(takeover):
    kernel = FakeKernel()
    kernel.load("table ip kube-proxy {\n\tchain services {\n\t}\n}\n")
    backend = NftBackend(open_kernel=lambda: kernel)
    backend.proxycore_backend_start(BackendContext(host=HOST, families=("IPv4", "IPv6"), takeover=takeover))
    assert backend.proxycore_backend_apply(full(numbered(1, 3))).outcome == "applied"
    assert "kube-proxy" in kernel.tables("ip")
    assert backend.proxycore_backend_verify(True).drift == ()


def test_classes_that_no_pool_has_leave_with_a_new_table(monkeypatch):
    monkeypatch.setattr(tables, "CLASSES_KEPT", 50)
    kernel, backend = running(numbered(1, 3))
    names = []
    for size in range(20, 60):
        assert backend.proxycore_backend_apply(batch(numbered(1, size))).outcome == "applied"
        names.append(live_table(kernel, "ip"))
    assert len(kernel.elements("ip", names[-1], "classes")) <= 75
    # A new table now and then, not with each batch.
    changes = sum(one != other for one, other in itertools.pairwise(names))
    assert 1 <= changes <= 4
    assert_means(kernel, numbered(1, 59))


def test_many_classes_in_use_do_not_bring_a_new_table_with_each_batch(monkeypatch):
    monkeypatch.setattr(tables, "CLASSES_KEPT", 50)
    kernel, backend = running(*(numbered(number, 16 + number) for number in range(1, 60)))
    names = []
    for size in (3, 4, 5, 6, 7):
        assert backend.proxycore_backend_apply(batch(numbered(1, size))).outcome == "applied"
        names.append(live_table(kernel, "ip"))
    assert len(kernel.elements("ip", names[-1], "classes")) > 50
    assert len(set(names)) == 1
