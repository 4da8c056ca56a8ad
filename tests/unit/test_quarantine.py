"""What is set aside comes back in time, and asking for it is cheap."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from proxycore.backend import ApplyResult, Failure
from proxycore.delta import Ledger
from proxycore.model import ServicePortName, ServiceState
from proxycore.quarantine import Quarantine

NAMES = [ServicePortName("default", f"s{number}", "", "TCP", "IPv4") for number in range(5)]


class Counting(dict):
    """Counts how often it is asked for one of its items, and refuses to be gone through."""

    asked = 0

    def get(self, key, default=None):
        self.asked += 1
        return super().get(key, default)

    def values(self):
        raise AssertionError("all are gone through")

    items = __iter__ = values


actions = st.lists(
    st.tuples(
        st.sampled_from(("hold", "forever", "at once", "release", "hurry", "clear", "wait")),
        st.sampled_from(NAMES),
        st.sampled_from((0.0, 0.5, 3.0, 400.0)),
    ),
    max_size=40,
)


@given(actions)
def test_the_answers_are_those_of_looking_at_all(script):
    quarantine, now = Quarantine(), 0.0
    for action, name, seconds in script:
        before, version = dict(quarantine.view), quarantine.version
        match action:
            case "hold" | "forever" | "at once":
                quarantine.hold(name, "no", now, forever=action == "forever", patient=action != "at once")
            case "release":
                quarantine.release(name)
            case "hurry":
                quarantine.hurry(NAMES[:3], now)
            case "clear":
                quarantine.clear()
            case "wait":
                now += seconds
        times = {name: held.next_retry for name, held in quarantine.view.items()}
        due = quarantine.due(now)
        assert len(due) == len(set(due))
        assert set(due) == {name for name, time in times.items() if time <= now}
        assert [times[name] for name in due] == sorted(times[name] for name in due)
        earliest = min(times.values(), default=inf)
        assert quarantine.next_retry() == (None if earliest == inf else earliest)
        assert quarantine.version >= version
        assert (quarantine.version != version) == (quarantine.view != before)


def test_asking_does_not_look_at_all():
    quarantine = Quarantine()
    names = [NAMES[0]._replace(name=f"n{number}") for number in range(1000)]
    for number, name in enumerate(names):
        quarantine.hold(name, "no", float(number))
    held = quarantine._held = Counting(quarantine._held)
    assert quarantine.next_retry() == 1.0
    assert quarantine.due(3.5) == names[:3]
    assert held.asked < 10


def test_what_is_over_is_forgotten():
    quarantine = Quarantine()
    quarantine.hold(NAMES[0], "no", 0.0)
    for _ in range(10_000):
        quarantine.hold(NAMES[1], "no", 1.0)
        quarantine.release(NAMES[1])
    assert len(quarantine._times) < 200


def test_the_ledger_tells_when_what_is_set_aside_changes():
    ledger = Ledger()
    good, bad = NAMES[:2]
    ledger.update({name: ServiceState(name=name) for name in (good, bad)})
    batch = ledger.batch(0.0)
    version = ledger.version
    failed = (Failure(name=bad, why="no"),)
    ledger.acknowledge(batch, ApplyResult(generation=batch.generation, failed=failed), 0.0)
    assert set(ledger.quarantined) == {bad}
    assert ledger.version > version
    version = ledger.version
    ledger.update({good: None})
    batch = ledger.batch(0.0)
    ledger.acknowledge(batch, ApplyResult(generation=batch.generation), 0.0)
    assert ledger.version == version
    ledger.update({bad: None})
    assert ledger.quarantined == {}
    assert ledger.version > version
