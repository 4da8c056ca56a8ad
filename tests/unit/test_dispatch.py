"""Threads on which plugins run.  Nothing here waits for time to pass: hooks block on events, clocks are set by hand."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest

from proxycore import logs
from proxycore.api import (
    ApplyResult,
    BackendContext,
    BackendInfo,
    ChangeBatch,
    HostState,
    KernelError,
    ObserverContext,
    PluginError,
    Started,
    Verification,
    hookimpl,
)
from proxycore.cell import BackendCell, Cell
from proxycore.dispatch import START_AGAIN_SECONDS, BackendReply, BackendRunner, ObserverRunner
from proxycore.hookspecs import BackendSpec, ObserverSpec

SECONDS = 10.0
"""Only how long a failing test may hang."""
LOG = logs.get("test")
INFO = BackendInfo(name="b", summary="", api="", capabilities=frozenset())
HOST = HostState(node_name="n")


def batch(generation: int, *, full: bool = False) -> ChangeBatch:
    return ChangeBatch(generation=generation, changes=(), full=full)


class Clock:
    """Time that only the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Backend:
    """Does with a batch what the test says."""

    def __init__(self, apply: Callable[[ChangeBatch], object]) -> None:
        self.apply = apply
        self.threads: set[str] = set()

    @hookimpl
    def proxycore_backend_describe(self) -> BackendInfo:
        return INFO

    @hookimpl
    def proxycore_backend_start(self, context: BackendContext) -> Started:
        self.threads.add(threading.current_thread().name)
        return Started(adopted="the last run's")

    @hookimpl
    def proxycore_backend_apply(self, batch: ChangeBatch) -> object:
        self.threads.add(threading.current_thread().name)
        return self.apply(batch)


class Bench:
    """A backend runner and its answers."""

    def __init__(self, apply: Callable[[ChangeBatch], object]) -> None:
        self.clock = Clock()
        self.replies: SimpleQueue[BackendReply] = SimpleQueue()
        self.plugin = Backend(apply)
        cell = BackendCell(self.plugin, BackendSpec, name="b", distribution="d 1")
        self.runner = BackendRunner(
            cell, self.replies.put, log=LOG, deadlines={"apply": 5.0}, clock=self.clock
        )

    def reply(self) -> BackendReply:
        return self.replies.get(timeout=SECONDS)


def accept(batch: ChangeBatch) -> ApplyResult:
    return ApplyResult(generation=batch.generation)


class TestBackendRunner:
    def test_calls_run_in_order_on_one_thread_of_their_own(self) -> None:
        bench = Bench(accept)
        bench.runner.submit("start", BackendContext(host=HOST, families=("IPv4",)))
        for generation in range(3):
            bench.runner.submit("apply", batch(generation))
        answers = [bench.reply() for _ in range(4)]
        assert [answer.kind for answer in answers] == ["start", "apply", "apply", "apply"]
        assert answers[0].value == Started(adopted="the last run's")
        assert [answer.value.generation for answer in answers[1:]] == [0, 1, 2]
        assert answers[3].args == (batch(2),)
        assert all(answer.error is None for answer in answers)
        assert bench.plugin.threads == {"backend-b"}
        assert bench.runner.close(SECONDS)

    def test_a_missing_hook_is_answered_with_its_default(self) -> None:
        bench = Bench(accept)
        bench.runner.submit("verify", True)
        assert bench.reply().value == Verification(checked=False)
        bench.runner.close(SECONDS)

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (KernelError("no", errno=105), KernelError),
            (ZeroDivisionError(), PluginError),
            (SystemExit(), PluginError),
            (KeyboardInterrupt(), PluginError),
        ],
    )
    def test_whatever_is_raised_is_the_answer_and_the_thread_goes_on(
        self, error: BaseException, expected: type[Exception]
    ) -> None:
        def fail_once(batch: ChangeBatch) -> object:
            if batch.generation == 1:
                raise error
            return accept(batch)

        bench = Bench(fail_once)
        bench.runner.submit("apply", batch(1))
        bench.runner.submit("apply", batch(2))
        first, second = bench.reply(), bench.reply()
        assert type(first.error) is expected
        assert first.value is None
        assert second.value.generation == 2
        bench.runner.close(SECONDS)

    def test_an_answer_for_another_generation_is_an_error(self) -> None:
        bench = Bench(lambda batch: ApplyResult(generation=batch.generation - 1))
        bench.runner.submit("apply", batch(8))
        assert "answered for generation 7 instead of 8" in str(bench.reply().error)
        bench.runner.close(SECONDS)

    def test_busy_until_just_before_the_answer(self) -> None:
        go = threading.Event()
        bench = Bench(lambda batch: accept(batch) if go.wait(SECONDS) else None)
        assert not bench.runner.busy
        bench.runner.submit("apply", batch(1))
        assert bench.runner.busy
        go.set()
        bench.reply()
        assert not bench.runner.busy
        bench.runner.close(SECONDS)

    def test_a_late_call_is_named_counted_once_and_still_answered(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        begun, go = threading.Event(), threading.Event()

        def hang(batch: ChangeBatch) -> object:
            begun.set()
            go.wait(SECONDS)
            return accept(batch)

        bench = Bench(hang)
        bench.runner.submit("apply", batch(1))
        assert begun.wait(SECONDS)
        assert bench.runner.overdue() is None
        bench.clock.now += 6
        assert bench.runner.overdue() == "apply of b has been running for 6 s, past its deadline of 5 s"
        assert bench.runner.overdue() is not None
        assert not bench.runner.close(0)
        go.set()
        assert bench.reply().seconds == 6
        assert bench.runner.close(SECONDS)
        assert bench.runner.overdue_total == 1
        assert [record.message for record in caplog.records] == [
            "call is past its deadline",
            "late call returned",
        ]

    def test_a_late_call_that_nobody_noticed_is_counted_too(self) -> None:
        bench = Bench(accept)
        bench.plugin.apply = lambda batch: (setattr(bench.clock, "now", 1000.0), accept(batch))[1]
        bench.runner.submit("apply", batch(1))
        bench.reply()
        assert bench.runner.overdue_total == 1
        assert bench.runner.overdue() is None
        bench.runner.close(SECONDS)

    def test_close_lets_what_was_submitted_run_and_takes_nothing_more(self) -> None:
        bench = Bench(accept)
        bench.runner.submit("apply", batch(1))
        bench.runner.submit("stop")
        assert bench.runner.close(SECONDS)
        assert [bench.reply().kind, bench.reply().kind] == ["apply", "stop"]
        with pytest.raises(RuntimeError, match="closed"):
            bench.runner.submit("stop")

    def test_a_wrong_call_is_refused_at_once(self) -> None:
        bench = Bench(accept)
        with pytest.raises(TypeError, match="apply takes 1 arguments"):
            bench.runner.submit("apply")
        with pytest.raises(KeyError):
            bench.runner.submit("cleanup")
        assert not bench.runner.busy
        bench.runner.close(SECONDS)


class Observer:
    """Writes down what it is told; blocks or fails where the test says."""

    def __init__(self) -> None:
        self.told: SimpleQueue[object] = SimpleQueue()
        self.gate = threading.Event()
        self.gate.set()
        self.failing: list[BaseException] = []

    def _tell(self, what: object) -> None:
        self.told.put(what)
        assert self.gate.wait(SECONDS)
        if self.failing:
            raise self.failing.pop(0)

    @hookimpl
    def proxycore_observer_start(self) -> None:
        self._tell("start")

    @hookimpl
    def proxycore_observer_applied(self, batch: ChangeBatch, result: ApplyResult) -> None:
        assert result.generation == batch.generation
        self._tell(("full" if batch.full else "applied", batch.generation))

    @hookimpl
    def proxycore_observer_failed(self, batch: ChangeBatch) -> None:
        self._tell(("failed", batch.generation))

    @hookimpl
    def proxycore_observer_drift(self) -> None:
        self._tell("drift")

    @hookimpl
    def proxycore_observer_health(self, healthy: bool) -> None:
        self._tell(("health", healthy))

    @hookimpl
    def proxycore_observer_stop(self) -> None:
        self._tell("stop")


class Watching:
    """An observer's runner."""

    def __init__(self, observer: object, queue_size: int = 4) -> None:
        self.clock = Clock()
        self.in_force: ChangeBatch | None = None
        self.snapshots = 0
        cell = Cell(observer, ObserverSpec, name="o", distribution="d 1")
        self.runner = ObserverRunner(
            cell, self.snapshot, log=LOG, queue_size=queue_size, deadline=5.0, clock=self.clock
        )

    def snapshot(self) -> ChangeBatch | None:
        self.snapshots += 1
        return self.in_force

    def start(self) -> None:
        self.runner.start(ObserverContext(host=HOST, backend=INFO, healthy=lambda: True))

    def applied(self, *generations: int) -> None:
        for generation in generations:
            self.runner.applied(batch(generation), ApplyResult(generation=generation))


class TestObserverRunner:
    @pytest.fixture
    def observer(self) -> Observer:
        return Observer()

    @pytest.fixture
    def watching(self, observer: Observer) -> Iterator[Watching]:
        watching = Watching(observer)
        yield watching
        observer.gate.set()
        assert watching.runner.close(SECONDS)

    def told(self, observer: Observer) -> object:
        return observer.told.get(timeout=SECONDS)

    def test_every_event_reaches_it_in_order(self, observer: Observer, watching: Watching) -> None:
        watching.start()
        assert self.told(observer) == "start"
        watching.applied(1)
        watching.runner.failed(batch(2), ApplyResult(generation=2, outcome="rejected"))
        watching.runner.drift(Verification(checked=True))
        watching.runner.health(False, "late")
        expected = [("applied", 1), ("failed", 2), "drift", ("health", False)]
        assert [self.told(observer) for _ in expected] == expected
        assert watching.runner.close(SECONDS)
        assert self.told(observer) == "stop"
        assert watching.runner.dropped_total == 0

    def test_overflow_is_counted_and_ends_with_all_that_is_in_force(
        self, observer: Observer, watching: Watching
    ) -> None:
        watching.start()
        watching.runner.health(True, "")
        assert [self.told(observer), self.told(observer)] == ["start", ("health", True)]
        observer.gate.clear()
        watching.applied(1)
        assert self.told(observer) == ("applied", 1)
        watching.in_force = batch(7, full=True)
        watching.applied(2, 3, 4, 5, 6, 7)
        assert watching.runner.dropped_total == 6
        observer.gate.set()
        assert [self.told(observer), self.told(observer)] == [("full", 7), ("health", True)]
        watching.applied(7, 8)
        assert self.told(observer) == ("applied", 8)
        assert watching.snapshots == 1

    def test_overflow_before_its_start_starts_it_first(self, observer: Observer) -> None:
        watching = Watching(observer, queue_size=0)
        watching.in_force = batch(3, full=True)
        watching.start()
        assert [self.told(observer), self.told(observer)] == ["start", ("full", 3)]
        assert watching.runner.close(SECONDS)

    def test_failures_of_one_kind_are_logged_once_and_all_counted(
        self, observer: Observer, watching: Watching, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        watching.start()
        self.told(observer)
        observer.failing = [ValueError("a"), ValueError("b"), SystemExit(), KeyError("c")]
        watching.applied(1, 2, 3)
        assert [self.told(observer) for _ in range(3)] == [("applied", 1), ("applied", 2), ("applied", 3)]
        watching.applied(4, 5)
        assert [self.told(observer) for _ in range(2)] == [("applied", 4), ("applied", 5)]
        assert watching.runner.close(SECONDS)
        assert watching.runner.failed_total == 4
        fields = [record.__dict__["fields"] for record in caplog.records]
        assert [field["plugin"] for field in fields] == ["o"] * 3
        told = [str(field["error"]) for field in fields]
        for kind, text in zip(("ValueError: a", "SystemExit", "KeyError"), told, strict=True):
            assert kind in text

    def test_one_that_cannot_start_is_started_again_later_and_then_told_all(
        self, observer: Observer, watching: Watching
    ) -> None:
        observer.failing = [OSError("port is taken")]
        watching.start()
        assert self.told(observer) == "start"
        watching.applied(1)
        watching.in_force = batch(2, full=True)
        watching.clock.now += START_AGAIN_SECONDS - 1
        watching.applied(1)
        watching.clock.now += 1
        watching.applied(2)
        expected = ["start", ("full", 2)]
        assert [self.told(observer) for _ in expected] == expected
        watching.applied(3)
        assert self.told(observer) == ("applied", 3)

    def test_a_hanging_one_is_named_and_left_behind(self, observer: Observer, watching: Watching) -> None:
        watching.start()
        self.told(observer)
        observer.gate.clear()
        watching.applied(1)
        assert self.told(observer) == ("applied", 1)
        watching.clock.now += 6
        watching.applied(2)
        assert watching.runner.overdue_total == 1
        overdue = watching.runner.overdue()
        assert overdue is not None
        assert overdue.startswith("proxycore_observer_applied of o has been running for 6 s")
        assert not watching.runner.close(0)

    def test_what_it_does_not_implement_takes_no_place_in_its_queue(self) -> None:
        class Silent:
            @hookimpl
            def proxycore_observer_failed(self) -> None:
                pass

        watching = Watching(Silent(), queue_size=1)
        watching.start()
        watching.applied(*range(100))
        assert watching.runner.dropped_total == 0
        assert watching.runner.close(SECONDS)

    def test_without_anything_in_force_there_is_nothing_to_be_told(self, observer: Observer) -> None:
        watching = Watching(observer, queue_size=0)
        watching.start()
        assert self.told(observer) == "start"
        watching.runner.health(False, "")
        assert self.told(observer) == ("health", False)
        assert watching.runner.close(SECONDS)
