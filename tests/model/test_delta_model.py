"""Whatever a backend does to its batches, what is desired comes into force once it works again."""

from __future__ import annotations

import math

from hypothesis import event, given, settings
from hypothesis import strategies as st

from proxycore.backend import ApplyResult, Failure
from proxycore.changes import UNKNOWN
from proxycore.delta import Ledger
from proxycore.desired import Desired
from proxycore.model import Endpoint, Pool, ServicePortName, ServiceState
from proxycore.testing import strategies
from proxycore.testing.build import NODE, host

MANY = settings(max_examples=200, deadline=None)
NAMES = [ServicePortName("default", f"s{i}", "", "TCP", "IPv4") for i in range(6)]


def state(name, port):
    return ServiceState(name=name, cluster=Pool(endpoints=(Endpoint(address="10.0.0.1", port=port),)))


class Broken(Exception):
    """The toy backend gave up half-way."""


class Backend:
    """Holds what is in force, and checks what it is handed against it."""

    def __init__(self):
        self.in_force = {}
        self.unsure = set()
        self.host = None
        self.generation = 0
        self.full_failed = False

    def apply(self, batch, mood, bad, number):
        """`bad` names Services that cannot be brought into force; `number` chooses where things go wrong."""
        assert batch.generation > self.generation, "generations only grow"
        self.generation = batch.generation
        self._check(batch)
        refused = [
            item.name
            for item in batch.changes
            if item.name in bad and item.after != self.in_force.get(item.name)
        ]
        if mood == "raises":
            self._write(batch.changes[: number % (len(batch.changes) + 1)], ())
            self.unsure |= {item.name for item in batch.changes}
            raise Broken
        if mood == "refuses" or (refused and mood in ("names", "silent")):
            culprits = tuple(Failure(name=name, why="bad") for name in refused) if mood == "names" else None
            return ApplyResult(generation=batch.generation, outcome="rejected", culprits=culprits)
        if batch.full:
            kept = {item.name for item in batch.changes}
            self.in_force = {name: known for name, known in self.in_force.items() if name in kept}
        exceptions = {}
        if mood == "unknown":
            refused = []
            if batch.changes:
                item = batch.changes[number % len(batch.changes)]
                if number % 2:
                    self._write([item], ())
                self.unsure.add(item.name)
                refused.append(item.name)
                exceptions = {"unknown": (item.name,)}
        elif refused and mood == "unsupported":
            exceptions = {"unsupported": tuple(Failure(name=name, why="lacking") for name in refused)}
            for name in refused:
                self.in_force.pop(name, None)
                self.unsure.discard(name)
        elif refused:
            exceptions = {"failed": tuple(Failure(name=name, why="failed") for name in refused)}
        self._write(batch.changes, refused)
        if batch.host is not None:
            self.host = batch.host.after
        return ApplyResult(generation=batch.generation, **exceptions)

    def _check(self, batch):
        names = [item.name for item in batch.changes]
        assert len(set(names)) == len(names)
        for item in batch.changes:
            assert item.before is not None or item.after is not None
            if item.before is UNKNOWN:
                assert item.name in self.unsure
            else:
                assert item.name not in self.unsure
                assert item.before == self.in_force.get(item.name)
            if not batch.full:
                assert item.before != item.after, "no change, no entry"

    def _write(self, changes, without):
        for item in changes:
            if item.name in without:
                continue
            self.unsure.discard(item.name)
            if item.after is None:
                self.in_force.pop(item.name, None)
            else:
                self.in_force[item.name] = item.after


def send(ledger, backend, now, mood, bad=frozenset(), number=0, meanwhile=None, **kwargs):
    """One batch out and its answer in; False if there was nothing to send."""
    batch = ledger.batch(now, **kwargs)
    if batch is None:
        return False
    if batch.full and not backend.full_failed:
        kept = {item.name for item in batch.changes if item.after is not None}
        assert kept >= ledger.desired.keys() & backend.in_force.keys(), "what is desired and in force stays"
    if meanwhile:
        ledger.update(meanwhile)
    try:
        result = backend.apply(batch, mood, bad, number)
    except Broken:
        backend.full_failed = backend.full_failed or batch.full
        ledger.lost(batch, "it broke", now)
        return True
    if batch.full:
        backend.full_failed = result.outcome == "rejected"
    ledger.acknowledge(batch, result, now)
    return True


def settle(ledger, backend, now, bad=frozenset(), mood="names", until=math.inf, limit=400):
    """Let time pass until nothing is left to do."""
    for _ in range(limit):
        if not send(ledger, backend, now, mood, bad):
            wake = ledger.next_time(now)
            if wake is None or wake > until:
                return now
            assert wake > now, "nothing to send, though it is time"
            now = wake
    raise AssertionError(f"no end after {limit} batches: {ledger.pending}, {ledger.quarantined}")


updates = st.dictionaries(st.sampled_from(NAMES), st.sampled_from((None, 1, 2, 3)), max_size=4).map(
    lambda ports: {name: port and state(name, port) for name, port in ports.items()}
)
moods = st.sampled_from(("names", "silent", "failed", "unsupported", "unknown", "raises", "refuses"))
steps = st.lists(
    st.fixed_dictionaries(
        {
            "update": updates,
            "meanwhile": updates,
            "mood": moods,
            "bad": st.frozensets(st.sampled_from(NAMES), max_size=2),
            "number": st.integers(0, 7),
            "passes": st.sampled_from((0.0, 0.5, 5.0, 1000.0)),
            "full": st.booleans(),
            "zone": st.sampled_from((None, "a", "b")),
        }
    ),
    max_size=12,
)


def play(script):
    ledger, backend, now, wanted = Ledger(), Backend(), 0.0, {}
    ledger.batch(now, full=True)
    ledger.forget("start")
    for step in script:
        ledger.update_host(host(zone=step["zone"]))
        ledger.update(step["update"])
        wanted |= step["update"]
        sent = send(
            ledger,
            backend,
            now,
            step["mood"],
            step["bad"],
            step["number"],
            step["meanwhile"],
            full=step["full"],
        )
        if sent:
            wanted |= step["meanwhile"]
        now += step["passes"]
    return ledger, backend, now, {name: one for name, one in wanted.items() if one is not None}


@MANY
@given(steps)
def test_failed_then_retried_converges(script):
    ledger, backend, now, wanted = play(script)
    stuck = {
        name: ledger.desired.get(name)
        for name, held in ledger.quarantined.items()
        if held.next_retry == math.inf
    }
    settle(ledger, backend, now)
    event(f"held for good: {len(stuck)}")
    ledger.update(dict.fromkeys(stuck))
    ledger.update({name: one for name, one in stuck.items() if one is not None})
    settle(ledger, backend, now + 1e6)
    assert backend.in_force == wanted == ledger.acknowledged == ledger.desired
    assert backend.unsure == set()
    assert backend.host == (host(zone=script[-1]["zone"]) if script else None)
    assert ledger.pending == frozenset()
    assert ledger.quarantined == {}


@MANY
@given(
    steps, st.frozensets(st.sampled_from(NAMES), max_size=2), st.sampled_from(("names", "silent", "failed"))
)
def test_bad_services_hold_up_nobody_and_keep_their_last_state(script, bad, mood):
    ledger, backend, now, _ = play(script)
    now = settle(ledger, backend, now)
    ledger.update({name: state(name, 9) for name in NAMES})
    before = {name: backend.in_force.get(name) for name in bad}
    settle(ledger, backend, now, bad, mood, until=now + 2000)
    assert backend.in_force == {
        **{name: state(name, 9) for name in NAMES if name not in bad},
        **{name: known for name, known in before.items() if known is not None},
    }
    assert set(ledger.quarantined) == bad == ledger.pending
    settle(ledger, backend, now + 2000)
    assert backend.in_force == {name: state(name, 9) for name in NAMES}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.lists(strategies.events(), max_size=4), moods, st.integers(0, 7)), max_size=8),
    strategies.hosts(),
)
def test_objects_come_into_force_through_any_trouble(script, facts):
    desired, ledger, backend, now = Desired(NODE), Ledger(), Backend(), 0.0
    desired.handle([], facts)
    ledger.update_host(facts)
    for happened, mood, number in script:
        desired.handle(happened)
        ledger.update(desired.take(), desired.oldest_trigger_time)
        bad = frozenset(list(desired.states)[number : number + 2])
        send(ledger, backend, now, mood if mood != "unsupported" else "failed", bad, number, full=number == 7)
        now += number
    settle(ledger, backend, now)
    assert backend.in_force == desired.states
    assert backend.host == facts
