"""What somebody else does to our tables is noticed, named and put right."""

from __future__ import annotations

import pytest

from proxycore.api import (
    HostState,
)
from proxycore.testing.states import batch, context, full, numbered
from proxycore_nft import layout
from proxycore_nft.backend import VERIFY_PAUSE_MAX, NftBackend
from proxycore_nft.fake import FakeKernel
from proxycore_nft.kernel import Element
from proxycore_nft.skeleton import Hook

from .meaning import live_table
from .running import Clock, assert_means, entry_of, running, started

# -- a table that somebody has changed while no proxy ran --


def _flush_services(kernel: FakeKernel) -> None:
    kernel.state["ip", "proxycore"].rules["services"] = []


def _add_a_rule(kernel: FakeKernel) -> None:
    kernel.state["ip", "proxycore"].rules["client"].insert(0, b"accept")


def _change_a_class(kernel: FakeKernel) -> None:
    kernel.state["ip", "proxycore"].rules["endpoints-3"].pop()


def _unhook(kernel: FakeKernel) -> None:
    kernel.state["ip", "proxycore"].chains["nat-output"] = None


def _policy(kernel: FakeKernel) -> None:
    kernel.state["ip", "proxycore"].chains["filter-forward"] = Hook("filter", 2, 0, policy=0)


def _priority(kernel: FakeKernel) -> None:
    kernel.state["ip", "proxycore"].chains["nat-prerouting"] = Hook("nat", 0, -90)


def _sleep(kernel: FakeKernel) -> None:
    kernel.state["ip", "proxycore"].dormant = True


def _another_hook(kernel: FakeKernel) -> None:
    kernel.state["ip", "proxycore"].chains["mine"] = Hook("filter", 0, 0)


def _another_chain(kernel: FakeKernel) -> None:
    kernel.state["ip", "proxycore"].chains["mine"] = None


def _lose_a_verdict(kernel: FakeKernel) -> None:
    elements = kernel.state["ip", "proxycore"].sets["refusals"].elements
    del elements[next(iter(elements))]


def _lose_a_class(kernel: FakeKernel) -> None:
    elements = kernel.state["ip", "proxycore"].sets["classes"].elements
    del elements[next(iter(elements))]


def _lose_a_set(kernel: FakeKernel) -> None:
    del kernel.state["ip", "proxycore"].sets["slots"]


TAMPERING = [
    _flush_services,
    _add_a_rule,
    _change_a_class,
    _unhook,
    _policy,
    _priority,
    _sleep,
    _another_hook,
    _another_chain,
    _lose_a_verdict,
    _lose_a_class,
    _lose_a_set,
]


@pytest.mark.parametrize("tamper", TAMPERING)
def test_a_table_changed_while_no_proxy_ran_is_replaced(tamper):
    kernel, first = running(numbered(1, 3, affinity=10), numbered(2, 3))
    index = entry_of(first, numbered(1).name).index
    tamper(kernel)
    second = NftBackend(open_kernel=lambda: kernel)
    note = second.proxycore_backend_start(context()).adopted
    assert note is not None
    assert "changed by somebody else" in note
    second.proxycore_backend_apply(full(numbered(1, 3, affinity=10), numbered(2, 3)))
    assert live_table(kernel, "ip") == "proxycore-alt"
    assert live_table(kernel, "ip6") == "proxycore"
    assert len(kernel.state) == 2
    assert_means(kernel, numbered(1, 3, affinity=10), numbered(2, 3))
    assert second.proxycore_backend_verify(True).drift == ()
    assert entry_of(second, numbered(1).name).index == index or tamper is _lose_a_set


@pytest.mark.parametrize("tamper", TAMPERING)
def test_a_table_changed_while_a_proxy_runs_is_found_and_replaced(tamper):
    kernel, backend = running(numbered(1, 3, affinity=10), numbered(2, 3))
    tamper(kernel)
    kernel.number += 1
    found = backend.proxycore_backend_verify(False)
    assert found.drift
    assert all("ip proxycore" in drift.what for drift in found.drift)
    result = backend.proxycore_backend_apply(full(numbered(1, 3, affinity=10), numbered(2, 3), facts=None))
    assert result.outcome == "applied"
    assert live_table(kernel, "ip") == "proxycore-alt"
    assert_means(kernel, numbered(1, 3, affinity=10), numbered(2, 3))
    assert backend.proxycore_backend_verify(True).drift == ()


def test_an_intact_table_is_adopted_and_nothing_is_left_of_the_comparison():
    kernel, _ = running(numbered(1, 3, affinity=10), numbered(2, 30))
    second = NftBackend(open_kernel=lambda: kernel)
    assert second.proxycore_backend_start(context()).adopted == (
        "table ip proxycore, 2 frontends; table ip6 proxycore, 0 frontends"
    )
    assert set(kernel.state) == {("ip", "proxycore"), ("ip6", "proxycore")}


# -- verify --


def test_a_quiet_second_reads_nothing():
    kernel, backend = running(numbered(1, 3))
    kernel.elements = None  # type: ignore[assignment]
    kernel.rules = None  # type: ignore[assignment]
    assert not backend.proxycore_backend_verify(False).checked


def test_a_foreign_generation_is_looked_at_once():
    kernel, backend = running(numbered(1, 3))
    kernel.number += 5
    first = backend.proxycore_backend_verify(False)
    assert (first.checked, first.drift) == (True, ())
    assert not backend.proxycore_backend_verify(False).checked


def test_an_empty_start_does_not_hide_the_next_foreign_change():
    """To flush empty sets makes no generation; were it counted, one foreign change would go unnoticed."""
    facts = HostState(node_name="n")
    kernel, backend = running(facts=facts)
    kernel.state.clear()
    kernel.number += 1
    assert backend.proxycore_backend_verify(False).drift


def test_an_empty_rewrite_does_not_hide_the_next_foreign_change():
    facts = HostState(node_name="n")
    kernel, backend = running(facts=facts)
    backend.proxycore_backend_apply(full(facts=facts))
    kernel.state.clear()
    kernel.number += 1
    assert backend.proxycore_backend_verify(False).drift


def test_a_foreign_rule_is_found_though_a_new_class_came_between():
    kernel, backend = running(numbered(1, 3))
    kernel.state["ip", "proxycore"].rules["services"].append(b"accept")
    kernel.number += 1
    backend.proxycore_backend_apply(batch(numbered(1, 100)))
    found = backend.proxycore_backend_verify(False)
    assert found.drift[0].what == "table ip proxycore: the rules of chain services were changed"
    assert [drift.service for drift in found.drift[1:]] == [numbered(1).name]


def test_classes_made_ahead_are_expected():
    kernel, backend = running(numbered(1, 3))
    backend.proxycore_backend_apply(batch(numbered(1, 100)))
    commits = kernel.commits
    backend.proxycore_backend_verify(False)
    assert kernel.commits == commits + 1
    assert {"endpoints-99", "endpoints-101"} <= set(kernel.state["ip", "proxycore"].chains)
    assert not backend.proxycore_backend_verify(False).checked
    assert backend.proxycore_backend_verify(True).drift == ()
    operations = backend.proxycore_backend_apply(batch(numbered(1, 99))).operations
    assert operations == 5


def test_while_others_keep_changing_nf_tables_looking_takes_a_small_share_of_the_time():
    kernel, clock = FakeKernel(), Clock()
    backend = started(kernel, clock=clock)
    backend.proxycore_backend_apply(full(numbered(1, 3)))
    rules = kernel.rules

    def slow(family: str, table: str) -> dict[str, str]:
        clock.now += 0.05
        return rules(family, table)

    kernel.rules = slow  # type: ignore[method-assign]
    checked = 0
    begun = clock.now
    for _ in range(100):
        kernel.number += 1
        checked += backend.proxycore_backend_verify(False).checked
        clock.now += 0.1
    assert checked * 0.1 <= 0.12 * (clock.now - begun)
    assert checked >= 5
    clock.now += VERIFY_PAUSE_MAX
    kernel.number += 1
    assert backend.proxycore_backend_verify(False).checked


def test_a_foreign_change_during_the_look_is_looked_at_again():
    kernel, clock = FakeKernel(), Clock()
    backend = started(kernel, clock=clock)
    backend.proxycore_backend_apply(full(numbered(1, 3)))
    elements = kernel.elements

    def meanwhile(family: str, table: str, name: str) -> list[Element]:
        found = elements(family, table, name)
        if (
            name == "endpoints"
            and family == "ip"
            and kernel.state["ip", "proxycore"].sets["frontends"].elements
        ):
            kernel.state["ip", "proxycore"].sets["frontends"].elements.clear()
            kernel.number += 1
        return found

    kernel.elements = meanwhile  # type: ignore[method-assign]
    kernel.number += 1
    assert backend.proxycore_backend_verify(False).checked
    clock.now += VERIFY_PAUSE_MAX
    assert [drift.service for drift in backend.proxycore_backend_verify(False).drift] == [numbered(1).name]


def test_drift_names_the_service_and_shows_the_element():
    kernel, backend = running(numbered(1, 3), numbered(2, 3))
    endpoints = kernel.state["ip", "proxycore"].sets["endpoints"].elements
    index = entry_of(backend, numbered(2).name).index
    gone = next(place for place in endpoints if place[0][:4] == layout.number(index))
    del endpoints[gone]
    kernel.number += 1
    [drift] = backend.proxycore_backend_verify(False).drift
    assert drift.service == numbered(2).name
    assert "missing element in ip proxycore endpoints" in drift.what
    assert ": 10.1.2." in drift.what


def test_many_differences_are_counted_not_listed():
    kernel, backend = running(*(numbered(n, 10) for n in range(100)))
    kernel.state["ip", "proxycore"].sets["endpoints"].elements.clear()
    kernel.number += 1
    found = backend.proxycore_backend_verify(False).drift
    assert len(found) == 201
    assert found[-1].what == "and at least 800 more"
