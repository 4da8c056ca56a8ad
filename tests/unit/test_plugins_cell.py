"""What one plugin does wrong stays in its cell."""

from __future__ import annotations

import pytest

from proxycore.api import (
    ApplyResult,
    BackendContext,
    BackendInfo,
    ChangeBatch,
    HostState,
    KernelError,
    Operation,
    PluginError,
    Started,
    Verification,
    hookimpl,
)
from proxycore.cell import RESULTS, BackendCell, Cell, hooks_of
from proxycore.hookspecs import BackendSpec, ObserverSpec

BATCH = ChangeBatch(generation=1, changes=())
CONTEXT = BackendContext(host=HostState(node_name="n"), families=("IPv4",))


class Backend:
    def __init__(self, outcome: object = None) -> None:
        self.outcome = outcome

    @hookimpl
    def proxycore_backend_describe(self) -> BackendInfo:
        return BackendInfo(name="b", summary="", api="", capabilities=frozenset())

    @hookimpl
    def proxycore_backend_start(self) -> Started:
        return Started()

    @hookimpl
    def proxycore_backend_apply(self) -> object:
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


class Planner(Backend):
    @hookimpl
    def proxycore_backend_plan(self) -> object:
        return self.outcome


def cell(outcome: object = None, kind: type = Backend, trace: list[str] | None = None) -> BackendCell:
    return BackendCell(
        kind(outcome),
        BackendSpec,
        name="b",
        distribution="dist 1.0",
        trace=None if trace is None else trace.append,
    )


def test_errors_of_the_contract_pass_unchanged() -> None:
    error = KernelError("refused", errno=16)
    with pytest.raises(KernelError) as caught:
        cell(error).call("proxycore_backend_apply", batch=BATCH)
    assert caught.value is error


@pytest.mark.parametrize("error", [ValueError("odd\nvalue"), SystemExit(1), GeneratorExit(), MemoryError()])
def test_everything_else_becomes_a_plugin_error_with_its_cause_and_place(error: BaseException) -> None:
    with pytest.raises(PluginError) as caught:
        cell(error).call("proxycore_backend_apply", batch=BATCH)
    message = str(caught.value)
    assert message.startswith(
        f"plugin 'b' (from dist 1.0): proxycore_backend_apply failed: {type(error).__name__}"
    )
    assert "test_plugins_cell.py" in message
    assert "in proxycore_backend_apply" in message
    assert "\n" not in message
    assert caught.value.__cause__ is error


def test_the_users_interrupt_passes() -> None:
    with pytest.raises(KeyboardInterrupt):
        cell(KeyboardInterrupt()).call("proxycore_backend_apply", batch=BATCH)


@pytest.mark.parametrize(("value", "said"), [(None, "nothing"), ({}, "dict")])
def test_a_wrong_return_value_is_refused(value: object, said: str) -> None:
    with pytest.raises(PluginError, match=f"proxycore_backend_apply returned {said}, not ApplyResult"):
        cell(value).call("proxycore_backend_apply", batch=BATCH)


def test_a_list_will_do_for_a_tuple_if_its_items_are_right() -> None:
    operation = Operation(verb="add", native="x")
    assert cell([operation], Planner).plan(CONTEXT, BATCH) == (operation,)
    with pytest.raises(PluginError, match="returned str where Operation belongs"):
        cell([operation, "x"], Planner).plan(CONTEXT, BATCH)
    with pytest.raises(PluginError, match="returned nothing where Operation belongs"):
        cell(None, Planner).plan(CONTEXT, BATCH)


def test_a_missing_hook_gives_its_default_or_an_error_that_names_it() -> None:
    lacking = cell()
    assert not lacking.implements("proxycore_backend_verify")
    assert lacking.call("proxycore_backend_verify", deep=True) == Verification(checked=False)
    assert lacking.call("proxycore_backend_counters") == ()
    assert lacking.call("proxycore_backend_stop") is None
    for call in (lacking.plan, lacking.render):
        with pytest.raises(PluginError, match="does not implement proxycore_backend_"):
            call(CONTEXT, BATCH)


def test_every_hook_that_returns_something_is_checked() -> None:
    assert set(hooks_of(BackendSpec)) - set(RESULTS) == {"proxycore_backend_stop"}


def test_a_trace_line_for_each_call_without_the_batch_itself() -> None:
    lines: list[str] = []
    traced = cell(ApplyResult(generation=1), trace=lines)
    traced.call("proxycore_backend_apply", batch=BATCH)
    traced._callers["proxycore_backend_apply"].get_hookimpls()[0].plugin.outcome = KernelError("no\nspace")
    with pytest.raises(KernelError):
        traced.call("proxycore_backend_apply", batch=BATCH)
    assert lines[0].startswith(
        "b: proxycore_backend_apply(batch=<batch 1: 0 changes>) -> ApplyResult(generation=1"
    )
    assert "!! KernelError: no space" in lines[1]
    assert len(lines) == 2


def test_cells_do_not_share_hooks() -> None:
    seen: list[str] = []

    class Observer:
        def __init__(self, name: str) -> None:
            self.name = name

        @hookimpl
        def proxycore_observer_stop(self) -> None:
            seen.append(self.name)

    cells = [Cell(Observer(name), ObserverSpec, name=name, distribution="d") for name in ("a", "b")]
    cells[0].call("proxycore_observer_stop")
    assert seen == ["a"]
