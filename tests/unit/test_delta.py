"""Changes stay pending until they are acknowledged; what cannot be done is set aside and tried again."""

from __future__ import annotations

import pytest

from proxycore.backend import ApplyResult, Failure
from proxycore.changes import UNKNOWN
from proxycore.delta import FULL_TRIES, LONGEST_PAUSE_SECONDS, Ledger
from proxycore.errors import InternalError
from proxycore.model import Endpoint, Pool, ServicePortName, ServiceState
from proxycore.quarantine import LONGEST_DELAY_SECONDS, delay_seconds
from proxycore.testing.build import host


def name(text):
    return ServicePortName("default", text, "", "TCP", "IPv4")


def state(text, *ports):
    return ServiceState(
        name=name(text),
        cluster=Pool(endpoints=tuple(Endpoint(address="10.0.0.1", port=port) for port in ports)),
    )


def states(*texts, port=1):
    return {name(text): state(text, port) for text in texts}


def text(batch):
    """The names of a batch, a minus before what goes."""
    return [("-" if item.after is None else "") + item.name.name for item in batch.changes]


def applied(batch, **exceptions):
    return ApplyResult(generation=batch.generation, **exceptions)


def rejected(batch, *culprits, message="no"):
    failures = tuple(Failure(name=name(culprit), why=f"{culprit} is bad") for culprit in culprits) or None
    return ApplyResult(generation=batch.generation, outcome="rejected", culprits=failures, message=message)


def ledger_with(*texts):
    ledger = Ledger()
    ledger.update(states(*texts))
    batch = ledger.batch(0.0, full=True)
    ledger.acknowledge(batch, applied(batch), 0.0)
    assert ledger.batch(0.0) is None
    return ledger


def names(*texts):
    return {name(text) for text in texts}


# Batches


def test_first_full_batch_holds_everything():
    ledger = Ledger()
    ledger.update(states("a", "b"))
    batch = ledger.batch(0.0, full=True, reason="start")
    assert (text(batch), batch.full, batch.reason, batch.generation) == (["a", "b"], True, "start", 1)
    assert [item.before for item in batch.changes] == [None, None]
    assert ledger.pending == names("a", "b")
    ledger.acknowledge(batch, applied(batch), 0.0)
    assert ledger.pending == frozenset()
    assert ledger.acknowledged == states("a", "b")


def test_changes_coalesce_and_before_is_what_was_acknowledged():
    ledger = ledger_with("a")
    ledger.update(states("a", port=2))
    ledger.update(states("a", port=3))
    ledger.update(states("b"))
    batch = ledger.batch(0.0)
    assert text(batch) == ["a", "b"]
    assert batch.changes[0].before == state("a", 1)
    assert batch.changes[0].after == state("a", 3)
    assert [e.port for e in batch.changes[0].cluster.added] == [3]
    assert not batch.full


def test_change_that_returns_to_the_acknowledged_state_disappears():
    ledger = ledger_with("a")
    ledger.update(states("a", port=2))
    ledger.update(states("a"))
    ledger.update({name("b"): state("b", 1)})
    ledger.update({name("b"): None})
    assert ledger.batch(0.0) is None
    assert ledger.next_time(0.0) is None


def test_change_that_returns_while_its_batch_is_out_is_undone():
    ledger = ledger_with("a")
    ledger.update(states("a", port=2))
    batch = ledger.batch(0.0)
    ledger.update(states("a"))
    ledger.acknowledge(batch, applied(batch), 0.0)
    undo = ledger.batch(0.0)
    assert (undo.changes[0].before, undo.changes[0].after) == (state("a", 2), state("a", 1))
    assert undo.generation == batch.generation + 1


def test_only_one_batch_is_out():
    ledger = ledger_with("a")
    ledger.update(states("b"))
    batch = ledger.batch(0.0)
    ledger.update(states("c"))
    assert ledger.next_time(0.0) is None
    with pytest.raises(InternalError, match="in flight"):
        ledger.batch(0.0)
    ledger.acknowledge(batch, applied(batch), 0.0)
    with pytest.raises(InternalError, match="not in flight"):
        ledger.acknowledge(batch, applied(batch), 0.0)
    assert text(ledger.batch(0.0)) == ["c"]


def test_removal_is_pending_until_acknowledged():
    ledger = ledger_with("a", "b")
    ledger.update({name("a"): None})
    batch = ledger.batch(0.0)
    assert text(batch) == ["-a"]
    ledger.acknowledge(batch, rejected(batch, message="busy"), 0.0)
    assert name("a") in ledger.acknowledged
    batch = ledger.batch(1.0)
    ledger.acknowledge(batch, applied(batch), 1.0)
    assert ledger.acknowledged == states("b")


def test_full_batch_holds_what_did_not_change_and_what_goes():
    ledger = ledger_with("a", "b")
    ledger.update({name("a"): None})
    batch = ledger.batch(0.0, full=True, reason="drift")
    assert text(batch) == ["b", "-a"]
    assert (batch.changes[0].before, batch.changes[0].after) == (state("b", 1), state("b", 1))


def test_batches_are_full_until_one_is_acknowledged():
    ledger = ledger_with("a")
    lost = ledger.batch(0.0, full=True, reason="drift")
    ledger.lost(lost, "it raised", 0.0)
    assert ledger.batch(0.0) is None, "all waits a little"
    assert ledger.next_time(0.0) == 1.0
    again = ledger.batch(1.0)
    assert (again.full, again.reason) == (True, "drift")
    ledger.acknowledge(again, applied(again), 1.0)
    ledger.update(states("a", port=2))
    assert not ledger.batch(1.0).full


def test_forgetting_makes_everything_pending():
    ledger = ledger_with("a")
    ledger.update(states("b"))
    out = ledger.batch(0.0)
    ledger.forget("another backend")
    with pytest.raises(InternalError):
        ledger.acknowledge(out, applied(out), 0.0)
    batch = ledger.batch(0.0)
    assert (text(batch), batch.full, batch.reason) == (["a", "b"], True, "another backend")
    assert batch.changes[0].before is None


# The node's facts


def test_node_facts_go_along_until_acknowledged():
    ledger = ledger_with("a")
    ledger.update_host(host())
    batch = ledger.batch(0.0)
    assert (batch.changes, batch.host.before, batch.host.after) == ((), None, host())
    ledger.acknowledge(batch, applied(batch), 0.0)
    ledger.update_host(host())
    assert ledger.batch(0.0) is None
    ledger.update_host(host(zone="b"))
    batch = ledger.batch(0.0)
    assert (batch.host.before, batch.host.after) == (host(), host(zone="b"))


def test_node_facts_are_a_suspect_too():
    ledger = ledger_with("a")
    ledger.update_host(host())
    ledger.update(states("b", "c"))
    batch = ledger.batch(0.0)
    ledger.acknowledge(batch, rejected(batch), 0.0)
    alone = ledger.batch(0.0)
    assert (alone.changes, alone.host is not None) == ((), True)
    ledger.acknowledge(alone, rejected(alone), 0.0)
    for expected in (["b"], ["c"]):
        batch = ledger.batch(0.0)
        assert (text(batch), batch.host) == (expected, None)
        ledger.acknowledge(batch, applied(batch), 0.0)
    assert ledger.batch(0.0) is None
    assert ledger.next_time(0.0) == 1.0
    assert ledger.batch(1.0).host is not None


# Trigger times


def test_oldest_trigger_time_is_that_of_the_changes_in_the_batch():
    ledger = Ledger()
    ledger.update(states("a"), 30.0)
    ledger.update(states("b"), 20.0)
    ledger.update(states("a", port=2), 40.0)
    batch = ledger.batch(0.0)
    assert batch.oldest_trigger_time == 20.0
    ledger.acknowledge(batch, rejected(batch, "b"), 0.0)
    assert ledger.batch(0.0).oldest_trigger_time == 30.0


def test_trigger_time_survives_a_rejection_and_ends_with_the_acknowledgement():
    ledger = ledger_with("a")
    ledger.update(states("a", port=2), 30.0)
    batch = ledger.batch(0.0)
    ledger.update(states("a", port=3), 50.0)
    ledger.acknowledge(batch, rejected(batch, "x"), 0.0)
    batch = ledger.batch(0.0)
    assert batch.oldest_trigger_time == 30.0
    ledger.update(states("a", port=4), 60.0)
    ledger.acknowledge(batch, applied(batch), 0.0)
    assert ledger.batch(0.0).oldest_trigger_time == 60.0


# Exceptions of an applied batch


def test_failed_service_keeps_its_last_state_and_waits():
    ledger = ledger_with("a", "b")
    ledger.update(states("a", "b", port=2))
    batch = ledger.batch(0.0)
    ledger.acknowledge(batch, applied(batch, failed=(Failure(name=name("a"), why="no room"),)), 0.0)
    assert ledger.acknowledged == {**states("a"), **states("b", port=2)}
    assert ledger.quarantined == {name("a"): ("no room", 1, 1.0)}
    assert ledger.pending == names("a")
    assert ledger.batch(0.9) is None
    assert ledger.next_time(0.9) == 1.0
    again = ledger.batch(1.0)
    assert again.changes[0].before == state("a", 1)
    ledger.acknowledge(again, applied(again), 1.0)
    assert ledger.quarantined == {}


def test_unsupported_service_waits_for_another_object_or_node():
    for event in ("object", "node"):
        ledger = ledger_with("a")
        ledger.update(states("a", port=2))
        batch = ledger.batch(0.0)
        ledger.acknowledge(batch, applied(batch, unsupported=(Failure(name=name("a"), why="no SCTP"),)), 0.0)
        assert ledger.acknowledged == {}, "nothing of it is in force"
        assert ledger.batch(1e9) is None
        assert ledger.next_time(0.0) is None
        if event == "object":
            ledger.update(states("a", port=3))
        else:
            ledger.update_host(host())
        (change,) = ledger.batch(0.0).changes
        assert change.before is None


def test_unknown_service_is_tried_at_once_and_then_patiently():
    ledger = ledger_with("a")
    ledger.update(states("a", port=2))
    batch = ledger.batch(0.0)
    ledger.acknowledge(batch, applied(batch, unknown=(name("a"),)), 0.0)
    batch = ledger.batch(0.0)
    assert batch.changes[0].before is UNKNOWN
    ledger.acknowledge(batch, applied(batch, unknown=(name("a"),)), 0.0)
    assert ledger.batch(0.0) is None
    assert text(ledger.batch(1.0)) == ["a"]


def test_unknown_state_is_written_even_if_the_wish_is_the_old_one():
    ledger = ledger_with("a")
    ledger.update(states("a", port=2))
    batch = ledger.batch(0.0)
    ledger.update(states("a"))
    ledger.lost(batch, "it raised", 0.0)
    (change,) = ledger.batch(0.0).changes
    assert (change.before, change.after) == (UNKNOWN, state("a", 1))


# Rejected batches


def test_named_culprits_are_set_aside_and_the_rest_goes_at_once():
    ledger = ledger_with("a")
    ledger.update(states("b", "c", "d"))
    batch = ledger.batch(5.0)
    ledger.acknowledge(batch, rejected(batch, "c"), 5.0)
    assert ledger.quarantined == {name("c"): ("c is bad", 1, 6.0)}
    assert text(ledger.batch(5.0)) == ["b", "d"]


def test_culprit_that_changed_meanwhile_is_not_set_aside():
    ledger = ledger_with("a")
    ledger.update(states("b"))
    batch = ledger.batch(0.0)
    ledger.update(states("b", port=2))
    ledger.acknowledge(batch, rejected(batch, "b"), 0.0)
    assert ledger.quarantined == {}
    assert ledger.batch(0.0).changes[0].after == state("b", 2)


def test_delay_doubles_to_five_minutes():
    ledger = ledger_with("a")
    ledger.update(states("bad"))
    now, delays = 0.0, []
    for _ in range(11):
        batch = ledger.batch(now)
        ledger.acknowledge(batch, rejected(batch, "bad"), now)
        delays.append(ledger.next_time(now) - now)
        now = ledger.next_time(now)
    assert delays == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert delay_seconds(10_000) == LONGEST_DELAY_SECONDS


def test_new_object_starts_with_a_clean_record():
    ledger = ledger_with("a")
    ledger.update(states("bad"))
    batch = ledger.batch(0.0)
    ledger.acknowledge(batch, rejected(batch, "bad"), 0.0)
    ledger.update(states("bad", port=2))
    assert ledger.quarantined == {}
    batch = ledger.batch(0.0)
    ledger.acknowledge(batch, rejected(batch, "bad"), 0.0)
    assert ledger.quarantined[name("bad")].attempts == 1


def test_retries_do_not_hold_up_the_healthy():
    ledger = ledger_with("a")
    ledger.update(states("bad"))
    batch = ledger.batch(0.0)
    ledger.acknowledge(batch, rejected(batch, "bad"), 0.0)
    ledger.update(states("b"))
    seen = []
    for port in (2, 3):
        batch = ledger.batch(10.0)
        seen.append(text(batch))
        ledger.acknowledge(
            batch, applied(batch) if batch.changes[0].name.name == "b" else rejected(batch, "bad"), 10.0
        )
        ledger.update(states("b", port=port))
    assert seen in ([["b"], ["bad"]], [["bad"], ["b"]])


@pytest.mark.parametrize("culprits", [(0,), (99,), (42,), (10, 11), (3, 97)])
def test_unnamed_culprits_are_found_by_halving(culprits):
    ledger = ledger_with("ok")
    texts = [f"s{i}" for i in range(100)]
    bad = {f"s{i}" for i in culprits}
    ledger.update(states(*texts))
    batches = 0
    while (batch := ledger.batch(0.0)) is not None:
        batches += 1
        refused = bad & set(text(batch))
        ledger.acknowledge(batch, rejected(batch) if refused else applied(batch), 0.0)
    assert {one.name for one in ledger.quarantined} == bad
    assert len(ledger.acknowledged) == 101 - len(bad)
    assert batches <= 15 * len(bad)


def test_full_batch_is_halved_without_taking_anything_away():
    ledger = ledger_with("a", "b", "c")
    ledger.update(states("a", "b", "d", port=2))
    in_force, bad = dict(ledger.acknowledged), name("b")
    full = True
    while (batch := ledger.batch(0.0, full=full)) is not None:
        full = False
        if any(item.name == bad and item.after == state("b", 2) for item in batch.changes):
            ledger.acknowledge(batch, rejected(batch), 0.0)
            continue
        if batch.full:
            assert names("a", "b", "c") <= {item.name for item in batch.changes}
            in_force = {}
        in_force |= {item.name: item.after for item in batch.changes}
        ledger.acknowledge(batch, applied(batch), 0.0)
    assert in_force == {**states("a", "d", port=2), **states("b", "c")}
    assert set(ledger.quarantined) == {bad}


def test_full_batch_keeps_the_last_state_of_quarantined_services():
    ledger = ledger_with("a", "b")
    ledger.update(states("b", "c", port=2))
    batch = ledger.batch(0.0)
    ledger.acknowledge(batch, rejected(batch, "b", "c"), 0.0)
    full = ledger.batch(0.0, full=True)
    assert [(item.name.name, item.after) for item in full.changes] == [
        ("a", state("a", 1)),
        ("b", state("b", 1)),
    ]
    ledger.acknowledge(full, applied(full), 0.0)
    assert set(ledger.quarantined) == names("b", "c")


def lost(ledger, now=0.0):
    batch = ledger.batch(now)
    ledger.lost(batch, "it raised", now)
    return batch


def test_full_batch_keeps_what_may_be_in_force_after_an_exception():
    ledger = ledger_with("a", "b")
    ledger.update(states("a", port=2))
    lost(ledger)
    assert ledger.acknowledged[name("a")] is UNKNOWN
    full = ledger.batch(0.5, full=True, reason="drift")
    assert [(item.name.name, item.before, item.after) for item in full.changes] == [
        ("a", UNKNOWN, state("a", 1)),
        ("b", state("b", 1), state("b", 1)),
    ]
    ledger.acknowledge(full, applied(full), 0.5)
    assert ledger.acknowledged == states("a", "b")
    (retry,) = ledger.batch(1.0).changes
    assert (retry.before, retry.after) == (state("a", 1), state("a", 2))


def test_full_batch_holds_a_new_service_that_may_be_in_force_until_it_fails_as_well():
    ledger = ledger_with("a")
    ledger.update(states("new"))
    lost(ledger)
    full = ledger.batch(0.0, full=True)
    assert [(item.name.name, item.before, item.after) for item in full.changes] == [
        ("a", state("a", 1), state("a", 1)),
        ("new", UNKNOWN, state("new", 1)),
    ]
    ledger.acknowledge(full, rejected(full, "new"), 0.0)
    again = ledger.batch(0.0)
    assert (text(again), again.full) == (["a"], True)


def test_full_batch_takes_away_what_goes_and_may_be_in_force():
    ledger = ledger_with("a", "b")
    ledger.update({name("a"): None})
    lost(ledger)
    full = ledger.batch(0.0, full=True)
    assert text(full) == ["b", "-a"]
    ledger.acknowledge(full, applied(full), 0.0)
    assert (ledger.acknowledged, ledger.quarantined, ledger.pending) == (states("b"), {}, frozenset())


def test_full_batch_tried_again_keeps_the_quarantined_too():
    ledger = ledger_with("a", "b")
    ledger.update(states("b", port=2))
    for now in (0.0, 1.0):
        batch = ledger.batch(now)
        ledger.acknowledge(batch, rejected(batch, "b"), now)
    full = ledger.batch(1.0, full=True)
    ledger.lost(full, "it raised", 1.0)
    again = ledger.batch(2.0)
    assert [(item.name.name, item.before, item.after) for item in again.changes] == [
        ("a", UNKNOWN, state("a", 1)),
        ("b", UNKNOWN, state("b", 1)),
    ]


def test_culprit_of_a_full_batch_that_did_not_change_loses_its_state():
    ledger = ledger_with("a", "b")
    full = ledger.batch(0.0, full=True)
    ledger.acknowledge(full, rejected(full, "b"), 0.0)
    again = ledger.batch(0.0)
    assert (text(again), again.full) == (["a"], True)
    ledger.acknowledge(again, applied(again), 0.0)
    (retry,) = ledger.batch(1.0).changes
    assert retry.before is UNKNOWN


def test_exception_makes_every_service_of_the_batch_unknown():
    ledger = ledger_with("a", "b")
    ledger.update(states("a", "c", port=2))
    batch = ledger.batch(0.0)
    ledger.lost(batch, "KeyError: 'x'", 0.0)
    assert ledger.acknowledged == {name("a"): UNKNOWN, **states("b"), name("c"): UNKNOWN}
    first = ledger.batch(0.0)
    assert (text(first), first.changes[0].before) == (["a"], UNKNOWN)
    ledger.lost(first, "KeyError: 'x'", 0.0)
    assert ledger.quarantined[name("a")].why == "KeyError: 'x'"
    assert text(ledger.batch(0.0)) == ["c"]


def test_answer_for_another_generation_counts_as_an_exception():
    ledger = ledger_with("a")
    ledger.update(states("a", port=2))
    batch = ledger.batch(0.0)
    ledger.acknowledge(batch, ApplyResult(generation=batch.generation - 1), 0.0)
    assert ledger.acknowledged == {name("a"): UNKNOWN}
    assert "answered for generation 1, not 2" in ledger.quarantined[name("a")].why


def test_full_batch_is_tried_whole_before_it_is_halved():
    ledger = Ledger()
    ledger.update(states("a", "b"))
    now, sizes = 0.0, []
    for _ in range(FULL_TRIES + 2):
        batch = ledger.batch(now, full=True)
        sizes.append(len(batch.changes))
        ledger.lost(batch, "it raised", now)
        now = ledger.next_time(now)
    assert sizes == [2] * (FULL_TRIES + 1) + [1]


def test_backend_that_refuses_everything_is_not_the_services_fault():
    ledger = ledger_with("ok")
    ledger.update(states(*(f"s{i}" for i in range(64))))
    now, batches, pauses = 0.0, 0, []
    while now < 60.0:
        batch = ledger.batch(now)
        if batch is not None:
            batches += 1
            ledger.acknowledge(batch, rejected(batch, message="EPERM"), now)
        wake = ledger.next_time(now)
        if wake > now:
            pauses.append(wake - now)
        now = max(wake, now)
    assert batches < 40
    assert pauses[:4] == [1, 2, 4, 8]
    assert len(ledger.quarantined) < 12
    while (batch := ledger.batch(now)) is not None or ledger.next_time(now) is not None:
        if batch is None:
            assert ledger.next_time(now) - now <= LONGEST_PAUSE_SECONDS
            now = ledger.next_time(now)
            continue
        ledger.acknowledge(batch, applied(batch), now)
    assert len(ledger.acknowledged) == 65
    assert ledger.quarantined == {}


def test_what_was_refused_in_bad_times_is_tried_again_at_the_first_success():
    ledger = ledger_with("ok")
    ledger.update(states("a", "b", "c"))
    now = 0.0
    while now < 2000.0:
        batch = ledger.batch(now)
        if batch is not None:
            ledger.acknowledge(batch, rejected(batch), now)
        now = ledger.next_time(now)
    assert all(held.next_retry > now - 1000 and held.attempts > 5 for held in ledger.quarantined.values())
    late = max(held.next_retry for held in ledger.quarantined.values()) - 1.0
    ledger.update(states("d"))
    batch = ledger.batch(late)
    while "d" not in text(batch):
        ledger.acknowledge(batch, rejected(batch), late)
        late = ledger.next_time(late)
        batch = ledger.batch(late)
    assert any(held.next_retry > late for held in ledger.quarantined.values()), "some would have to wait"
    ledger.acknowledge(batch, applied(batch), late)
    assert sorted(text(ledger.batch(late))) == ["a", "b", "c"]


def test_failure_of_an_object_of_the_past_sets_nothing_aside():
    ledger = ledger_with("a")
    ledger.update(states("a", port=2))
    batch = ledger.batch(0.0)
    ledger.update(states("a", port=3))
    ledger.acknowledge(batch, applied(batch, failed=(Failure(name=name("a"), why="no"),)), 0.0)
    assert ledger.quarantined == {}
    assert ledger.batch(0.0).changes[0].after == state("a", 3)


def test_exception_makes_the_node_facts_unknown_too():
    ledger = ledger_with("a")
    ledger.update_host(host())
    first = ledger.batch(0.0)
    ledger.acknowledge(first, applied(first), 0.0)
    ledger.update_host(host(zone="b"))
    ledger.lost(ledger.batch(0.0), "it raised", 0.0)
    ledger.update_host(host())
    again = ledger.batch(0.0)
    assert (again.host.before, again.host.after) == (None, host())


def test_halves_of_a_full_batch_bring_the_node_facts():
    ledger = Ledger()
    ledger.update_host(host())
    ledger.update(states("a", "b"))
    batch = ledger.batch(0.0, full=True)
    ledger.acknowledge(batch, rejected(batch), 0.0)
    half = ledger.batch(0.0)
    assert (text(half), half.full, half.host.after) == (["a"], True, host())


@pytest.mark.parametrize("full", [True, False])
def test_a_refusal_that_is_nobodys_fault_is_tried_again_as_it_was(full):
    """However often: neither is anybody set aside, nor is a full batch cut in half, which would take Services away."""
    ledger = Ledger() if full else ledger_with("old")
    ledger.update(states("a", "b", "c"))
    now, sent = 0.0, []
    for _ in range(8):
        batch = ledger.batch(now, full=full, reason="start")
        sent.append(text(batch))
        ledger.acknowledge(batch, applied(batch, outcome="rejected", culprits=(), message="locked"), now)
        assert ledger.batch(now) is None, "no rest before the next try"
        assert not ledger.quarantined
        now += LONGEST_PAUSE_SECONDS
    assert sent == [["a", "b", "c"]] * 8
    batch = ledger.batch(now, full=full)
    ledger.acknowledge(batch, applied(batch), now)
    assert ledger.pending == frozenset()
