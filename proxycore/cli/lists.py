"""Bodies of the commands that print something and end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..backend import BackendContext
from ..cell import BackendCell, Trace
from ..config import Loaded, dump, load
from ..config.kubeproxy import MODES
from ..errors import ConfigError, KernelError, PluginError, ProxyError, SourceError
from ..host import InterfaceAddress
from ..kernel import presence
from ..kernel.families import usable_families
from ..model import HostState
from ..offline import Offline, context_of, families_for, load_states
from ..options import RunOptions, config_files
from ..plugins import Listed, check_backend, check_source, list_plugins, load_backend, load_source
from ..source import SourceContext
from .exits import Exit, printable, say
from .output import Column, Format, Row, emit, show

BACKEND_COLUMNS = (
    Column("name"),
    Column("state"),
    Column("api"),
    Column("distribution"),
    Column("summary"),
    Column("conntrack", wide=True),
    Column("requiresRoot", wide=True),
    Column("needs", wide=True),
    Column("capabilities", wide=True),
)
PROBLEMS = Column("problems")
FACTS = Column("facts", wide=True)
PLAN_COLUMNS = (Column("verb"), Column("service"), Column("operation"))
CLEANUP_COLUMNS = (Column("backend"), Column("removed"))
CONFIG_COLUMNS = (Column("field"), Column("value"), Column("origin"))
PLACE = Column("place")


def show_backends(probe: bool, format: Format) -> None:
    """`proxyctl backends`."""
    rows = [_backend_row(listed, probe) for listed in list_plugins()]
    told = any(row["problems"] for row in rows)
    columns = BACKEND_COLUMNS + ((FACTS,) if probe else ())
    if probe or told or format in (Format.JSON, Format.YAML):
        columns += (PROBLEMS,)
    show(rows, columns, format, "no backend is installed: try `pip install proxycore-nft`")


def _backend_row(listed: Listed, probe: bool) -> Row:
    facts = listed.facts
    problems = [listed.problem] if listed.problem else []
    state: str = "broken" if facts is None or problems else facts.state
    seen: Mapping[str, str] = {}
    if probe and state == "available":
        try:
            probed = load_backend(listed.found.name).probe(_bare_context())
            problems += probed.problems
            seen = probed.facts
            state = "unfit" if problems else "fit"
        except ConfigError as error:
            problems += error.lines
            state = "unfit"
        except ProxyError as error:
            problems.append(str(error))
            state = "broken"
    return {
        "name": listed.found.name,
        "state": state,
        "api": facts.api if facts else None,
        "distribution": listed.found.distribution,
        "summary": facts.summary if facts else None,
        "conntrack": facts.conntrack if facts else None,
        "requiresRoot": facts.requires_root if facts else None,
        "needs": list(facts.needs) if facts else [],
        "capabilities": sorted(facts.capabilities) if facts else [],
        "facts": [f"{key}={value}" for key, value in seen.items()],
        "problems": problems,
    }


def _bare_context() -> BackendContext:
    """Context for questions that no Service and no setting matter to."""
    host = HostState(node_name="localhost")
    return BackendContext(host=host, families=host.families)


def show_rendered(options: RunOptions) -> None:
    """`proxyctl render`."""
    cell, offline = _load(options)
    text = cell.render(offline.context, offline.batch)
    emit(text if text.endswith("\n") or not text else f"{text}\n")


def show_plan(options: RunOptions, format: Format) -> Exit:
    """`proxyctl plan`."""
    from ..kernel.addresses import AddressWatch

    with AddressWatch() as watch:
        cell, offline = _load(options, watch.current())
    operations = cell.plan(offline.context, offline.batch)
    rows = [
        {"verb": operation.verb, "service": operation.service, "operation": operation.native}
        for operation in operations
    ]
    show(rows, PLAN_COLUMNS, format, "nothing to do: the kernel already holds it")
    return Exit.DIFFERENT if operations else Exit.OK


def _load(
    options: RunOptions, addresses: Sequence[InterfaceAddress] | None = None
) -> tuple[BackendCell, Offline]:
    """The backend and the states, those of this node as it is now if its addresses are given.

    Half of what was asked for would mislead: what cannot be read is an error.
    """
    warn(options)
    check_source(options.source)
    cell = load_backend(options.backend, trace_of(options))
    source = load_source(options.source_name, trace_of(options)).open(
        SourceContext(
            argument=options.source_argument, node_name=options.node_name, api_server=options.api_server
        )
    )
    families = families_for(cell.info)
    if addresses is not None:
        families = tuple(family for family in families if family in usable_families())
    offline = load_states(source, options.config.config, options.node_name, families, addresses)
    for reason in offline.ignored:
        say(f"warning: {reason}")
    for trouble in offline.troubles:
        say(f"error: {trouble}")
    if offline.troubles:
        raise SourceError(
            f"{len(offline.troubles)} of the source's objects or files cannot be read; nothing was done"
        )
    return cell, offline


def clean_up(options: RunOptions, backend: str | None, format: Format) -> None:
    """`proxyctl cleanup`: every backend gets its turn, also after another's failure."""
    warn(options)
    at_work = presence.holder()
    if at_work is not None and at_work.uid == os.geteuid():
        raise KernelError(
            f"a proxyctl run{f' (pid {at_work.pid})' if at_work.pid else ''} is at work here and would bring back what is "
            "removed: stop it first; nothing was touched"
        )
    names = [backend] if backend else sorted(_available())
    rows: list[Row] = []
    failures: list[ProxyError] = []
    for name in names:
        try:
            removed = load_backend(name, trace_of(options)).cleanup(_cleanup_context(options)).removed
        except ProxyError as error:
            failures.append(error)
        else:
            rows += [{"backend": name, "removed": line} for line in removed]
    show(rows, CLEANUP_COLUMNS, format, "" if failures else "nothing of ours was there")
    for failure in failures[:-1]:
        say(f"error: {failure}")
    if failures:
        raise failures[-1]


def _available() -> set[str]:
    return {
        listed.found.name
        for listed in list_plugins()
        if listed.facts is None or listed.facts.state == "available"
    }


def _cleanup_context(options: RunOptions) -> BackendContext:
    return context_of(options.config.config, HostState(node_name=options.node_name))


def show_config(
    files: Sequence[str],
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    format: Format,
    places: bool = False,
) -> None:
    """`proxyctl config show`; `places`: where a value was written, to the line."""
    loaded = load(config_files(files, environ), flags, environ)
    for warning in loaded.warnings:
        say(f"warning: {warning}")
    if format is Format.YAML:
        emit(dump(loaded, origins=True, places=places))
        return
    from ..config.dump import PRECEDENCE, text_of
    from ..config.duration import format_duration
    from ..config.fields import FIELDS

    rows = []
    for field in FIELDS:
        value = loaded.values.get(field.path, field.default)
        text: object = text_of(field, value)
        if format is Format.JSON:
            text = format_duration(value) if field.type == "duration" and isinstance(value, int) else value
        origin = loaded.origins.get(field.path, "default")
        rows.append(
            {"field": field.path, "value": text, "origin": origin, "place": loaded.places.get(field.path)}
        )
    show(rows, CONFIG_COLUMNS + ((PLACE,) if places else ()), format)
    if places and format is not Format.JSON:
        say(f"what goes before what: {PRECEDENCE}")


def check_config(files: Sequence[str]) -> None:
    """`proxyctl config validate`."""
    loaded = load([Path(file) for file in files])
    for warning in loaded.warnings:
        say(f"warning: {warning}")
    for warning in _not_available(loaded):
        say(f"warning: {warning}")
    print(f"{', '.join(printable(file) for file in files)}: valid", file=sys.stderr)


def _not_available(loaded: Loaded) -> Iterator[str]:
    """What the configuration chooses and `run` would refuse, unless a flag chooses otherwise."""
    try:
        check_backend(loaded.config.backend)
    except PluginError as error:
        path = "mode" if loaded.config.backend == MODES.get(loaded.config.mode) else "backend"
        origin = loaded.origins[path]
        where = f"{path}: not written, which means" if origin == "default" else f"{origin}: {path}:"
        yield f"{where} {loaded.values[path]}: {error.reason}"
    # The default stands in no file: a flag chooses the source as a rule.
    if loaded.origins["source"] != "default":
        try:
            check_source(loaded.config.source)
        except PluginError as error:
            yield f"{loaded.origins['source']}: source: {loaded.config.source}: {error.reason}"


def trace_of(options: RunOptions) -> Trace | None:
    """Where `--trace-hooks` prints to."""
    if not options.trace_hooks:
        return None
    return lambda line: print(printable(line), file=sys.stderr, flush=True)


def warn(options: RunOptions) -> None:
    """Say a configuration's warnings, where there is no log."""
    for warning in options.config.warnings:
        say(f"warning: {warning}")
