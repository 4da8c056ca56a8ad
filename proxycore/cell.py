"""A cell: one plugin behind a plugin manager of its own, so that what it does wrong stays with it.

Everything that a plugin raises, `SystemExit` included, becomes a `PluginError` that names plugin,
distribution, version and cause; errors of proxycore's own (`KernelError`, `SourceError`, ...) pass, being
part of the contract.  What a hook returns is checked against the contract before anyone relies on it.
"""

from __future__ import annotations

import difflib
import reprlib
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pluggy

from .backend import (
    ApplyResult,
    BackendContext,
    BackendInfo,
    Cleanup,
    Counters,
    KernelObject,
    Operation,
    Probe,
    Started,
    Verification,
)
from .changes import ChangeBatch
from .errors import PluginError, ProxyError
from .hookspecs import PROJECT, BackendSpec, ObserverSpec, SourceSpec
from .source import Source, SourceContext

Trace = Callable[[str], None]
"""Receives one line for each hook call."""


class Result(NamedTuple):
    """What a hook has to return: a value of `kind`, or a tuple of such; `default` if it is missing."""

    kind: type
    many: bool = False
    default: object = None


RESULTS: dict[str, Result] = {
    "proxycore_backend_describe": Result(BackendInfo),
    "proxycore_backend_probe": Result(Probe, default=Probe()),
    "proxycore_backend_start": Result(Started),
    "proxycore_backend_apply": Result(ApplyResult),
    "proxycore_backend_render": Result(str),
    "proxycore_backend_plan": Result(Operation, many=True),
    "proxycore_backend_verify": Result(Verification, default=Verification(checked=False)),
    "proxycore_backend_inspect": Result(KernelObject, many=True, default=()),
    "proxycore_backend_counters": Result(Counters, many=True, default=()),
    "proxycore_backend_cleanup": Result(Cleanup),
}
"""Hooks that return something.  Those without a default fail when they are called and missing."""

REQUIRED: dict[type, tuple[str, ...]] = {
    BackendSpec: ("proxycore_backend_describe", "proxycore_backend_start", "proxycore_backend_apply"),
    ObserverSpec: (),
    SourceSpec: ("proxycore_source_open",),
}


class Cell:
    """One loaded plugin.

    `name` is its entry point's, `distribution` the package and version that brings it.
    """

    def __init__(
        self, plugin: object, spec: type, *, name: str, distribution: str, trace: Trace | None = None
    ) -> None:
        """Register the plugin object.

        Raises PluginError: it is no plugin of this kind; the message names the hook at fault.
        """
        self.name = name
        self.distribution = distribution
        self.trace = trace
        self._spec = spec
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(spec)
        try:
            self._register(plugin)
        except (KeyboardInterrupt, ProxyError):
            raise
        except BaseException as error:
            raise self.error(f"cannot be registered: {cause_of(error)}") from error
        self._callers = {
            hook: getattr(self._manager.hook, hook)
            for hook in hooks_of(spec)
            if getattr(self._manager.hook, hook).get_hookimpls()
        }
        for hook in REQUIRED[spec]:
            if hook not in self._callers:
                raise self.error(f"does not implement {hook}, which every plugin of its kind needs")

    def implements(self, hook: str) -> bool:
        """Does the plugin have this hook?"""
        return hook in self._callers

    def error(self, reason: str) -> PluginError:
        """An error that names this plugin and where it comes from."""
        return PluginError(self.name, reason, distribution=self.distribution)

    def call(self, hook: str, **arguments: object) -> Any:
        """Call one hook; a missing one gives its default.

        Raises ProxyError as the plugin raised it, PluginError for anything else that it raised or wrongly
        returned.
        """
        caller = self._callers.get(hook)
        if caller is None:
            return self._missing(hook)
        began = time.perf_counter()
        try:
            value = caller(**arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._traced(hook, arguments, f"!! {cause_of(error)}", began)
            if isinstance(error, ProxyError):
                raise
            raise self.error(f"{hook} failed: {cause_of(error)}") from error
        self._traced(hook, arguments, value, began)
        return self._checked(hook, value)

    def _register(self, plugin: object) -> None:
        if plugin is None:
            raise self.error("its factory returned None instead of the plugin object")
        if isinstance(plugin, type):
            raise self.error(
                f"its factory returned the class {plugin.__name__}; it must return an object of it"
            )
        known = hooks_of(self._spec)
        for attribute in dir(plugin):
            if attribute.startswith(f"{PROJECT}_") and callable(getattr(plugin, attribute, None)):
                if attribute not in known:
                    raise self.error(f"there is no hook {attribute}{_nearest(attribute, known)}")
                if self._manager.parse_hookimpl_opts(plugin, attribute) is None:
                    raise self.error(f"{attribute} lacks the decorator @hookimpl")
        try:
            self._manager.register(plugin, self.name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise self.error(" ".join(str(error).split())) from error

    def _missing(self, hook: str) -> object:
        result = RESULTS.get(hook)
        if result is not None and result.default is None:
            raise self.error(f"does not implement {hook}")
        return result.default if result else None

    def _checked(self, hook: str, value: object) -> object:
        result = RESULTS.get(hook)
        if result is None:
            return value
        if result.many:
            odd = [value]
            if isinstance(value, tuple | list):
                odd = [item for item in value if not isinstance(item, result.kind)]
            if not odd:
                return tuple(value) if isinstance(value, list) else value
            raise self.error(f"{hook} returned {_kind(odd[0])} where {result.kind.__name__} belongs")
        if not isinstance(value, result.kind):
            raise self.error(f"{hook} returned {_kind(value)}, not {result.kind.__name__}")
        return value

    def _traced(self, hook: str, arguments: dict[str, object], value: object, began: float) -> None:
        if self.trace is not None:
            milliseconds = (time.perf_counter() - began) * 1000
            inside = ", ".join(f"{key}={summary(item)}" for key, item in arguments.items())
            outcome = value if isinstance(value, str) and value.startswith("!! ") else f"-> {summary(value)}"
            self.trace(f"{self.name}: {hook}({inside}) {outcome} [{milliseconds:.2f} ms]")


class BackendCell(Cell):
    """A backend, its hooks with their types given back.  `info` is set by the loader."""

    info: BackendInfo

    def describe(self) -> BackendInfo:
        info: BackendInfo = self.call("proxycore_backend_describe")
        return info

    def probe(self, context: BackendContext) -> Probe:
        probe: Probe = self.call("proxycore_backend_probe", context=context)
        return probe

    def render(self, context: BackendContext, batch: ChangeBatch) -> str:
        text: str = self.call("proxycore_backend_render", context=context, batch=batch)
        return text

    def plan(self, context: BackendContext, batch: ChangeBatch) -> tuple[Operation, ...]:
        operations: tuple[Operation, ...] = self.call("proxycore_backend_plan", context=context, batch=batch)
        return operations

    def cleanup(self, context: BackendContext) -> Cleanup:
        cleanup: Cleanup = self.call("proxycore_backend_cleanup", context=context)
        return cleanup


class SourceCell(Cell):
    """A source's opener."""

    def open(self, context: SourceContext) -> Source:
        """The source, ready to run.  Raises SourceError: the argument cannot be used."""
        source: Source = self.call("proxycore_source_open", context=context)
        for method in ("run", "stop"):
            if not callable(getattr(source, method, None)):
                raise self.error(f"proxycore_source_open returned {_kind(source)}, which has no {method}()")
        return source


def hooks_of(spec: type) -> tuple[str, ...]:
    """Names of the hooks that a specification declares."""
    return tuple(name for name in vars(spec) if name.startswith(f"{PROJECT}_"))


def cause_of(error: BaseException) -> str:
    """What was raised, and the deepest place in the code: `KeyError: 'x' at program.py:12 in run`."""
    text = " ".join(str(error).split())
    place = ""
    for frame in _frames(error.__traceback__):
        code = frame.tb_frame.f_code
        place = f" at {code.co_filename}:{frame.tb_lineno} in {code.co_name}"
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


def _frames(traceback: types.TracebackType | None) -> Iterator[types.TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _nearest(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = 160


def summary(value: object) -> str:
    """A value for a trace line: short, without line breaks, a batch by its counts."""
    if isinstance(value, ChangeBatch):
        full = ", full" if value.full else ""
        host = ", host" if value.host else ""
        return f"<batch {value.generation}: {len(value.changes)} changes{full}{host}>"
    if isinstance(value, tuple) and len(value) > 3:
        return f"<{len(value)} items>"
    return _SHORT.repr(value)
