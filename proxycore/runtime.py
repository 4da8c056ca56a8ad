"""`proxyctl run`: the parts put together, started in order, ended in order."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Sequence

from .backend import BackendContext, Capability
from .cell import BackendCell
from .changes import ChangeBatch
from .dispatch import BackendReply, BackendRunner, ObserverRunner
from .engine import Engine
from .errors import KernelError, SourceError
from .host import InterfaceAddress, reserved_ports, resolve_host
from .inbox import EngineSettings
from .kernel import presence
from .kernel.addresses import AddressWatch
from .kernel.families import usable_families
from .logs import Log, get
from .model import HostState
from .objects import Node, ServiceCIDR
from .options import RunOptions
from .plugins import load_backend, load_observers, load_source
from .signals import stopping
from .source import Source, SourceContext

BUILT_IN_OBSERVERS = ("conntrack", "health-check-ports")
SWITCH_INTERVAL_SECONDS = 0.0005
"""How long a thread may keep the interpreter while another waits; Python's default of 5 ms would delay each hand-over."""


class _Host:
    """The node's facts, worked out from configuration, Node object and the newest addresses."""

    def __init__(self, options: RunOptions, addresses: tuple[InterfaceAddress, ...], log: Log) -> None:
        self._options = options
        self._log = log
        self._said: set[str] = set()
        self.addresses = addresses
        self.families = usable_families()

    def __call__(self, node: Node | None, service_cidrs: Sequence[ServiceCIDR]) -> HostState:
        resolution = resolve_host(
            self._options.config.config,
            self._options.node_name,
            node,
            self.addresses,
            service_cidrs,
            self.families,
        )
        for warning in resolution.warnings:
            if warning not in self._said:
                self._said.add(warning)
                self._log.warning("configuration", warning=warning)
        return resolution.state


def run_proxy(options: RunOptions) -> int:
    """Run until a signal ends it; the process's exit status.

    Raises ConfigError, PluginError, SourceError or KernelError before anything was touched.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    config = options.config.config
    log = get("engine")
    trace = get("hooks").info if options.trace_hooks else None
    cell = load_backend(options.backend, trace=trace)
    observers = load_observers(
        BUILT_IN_OBSERVERS if options.safe else config.observers_enabled,
        {*config.observers_disabled, *(() if cell.info.conntrack else ("conntrack",))},
        trace=trace,
    )
    for problem in observers.problems:
        log.error("observer left out", error=problem)
    source = load_source(options.source_name, trace=trace).open(
        SourceContext(argument=options.source_argument, node_name=options.node_name, pace=options.pace)
    )
    watch = AddressWatch()
    host = _Host(options, watch.current(), log)
    first = host(None, ())
    context = BackendContext(
        host=first,
        families=first.families,
        options=config.backend_options,
        takeover=options.takeover,
    )
    probe(cell, context, log)
    sign = presence.claim()
    if sign is None:
        log.warning(
            "a process of another user has the name by which proxies see each other; going on without it"
        )

    if (
        "localhost" in config.node_port_addresses
        and Capability.LOCALHOST_NODE_PORT not in cell.info.capabilities
    ):
        log.warning(
            "configuration", warning=f"the {cell.name} backend serves no node ports on loopback addresses"
        )

    def observer_runners(snapshot: Callable[[], ChangeBatch | None]) -> list[ObserverRunner]:
        return [ObserverRunner(observer, snapshot, log=get("observer")) for observer in observers.cells]

    def backend_runner(deliver: Callable[[BackendReply], None]) -> BackendRunner:
        return BackendRunner(cell, deliver, log=get("backend"))

    engine = Engine(
        settings=EngineSettings(
            node_name=options.node_name,
            families=first.families,
            sync_period_seconds=config.sync_period_seconds,
            min_sync_period_seconds=config.min_sync_period_seconds,
            verify_interval_seconds=config.verify_interval_seconds,
            backend_options=dict(config.backend_options),
            takeover=options.takeover,
            reserved_ports=reserved_ports(config),
            observer_options={name: dict(values) for name, values in config.observer_options.items()},
        ),
        host_of=host,
        backend=backend_runner,
        backend_info=cell.info,
        observers=observer_runners,
        log=log,
    )

    def addresses_changed(addresses: tuple[InterfaceAddress, ...]) -> None:
        host.addresses = addresses
        engine.host_may_have_changed()

    stopping_now = threading.Event()
    log.info(
        "starting",
        backend=cell.name,
        distribution=cell.distribution,
        source=options.source,
        node=options.node_name,
        families=list(first.families),
    )
    threads = [
        threading.Thread(
            target=_follow_addresses,
            args=(watch, addresses_changed, stopping_now, log),
            name="addresses",
            daemon=True,
        ),
        threading.Thread(target=_run_source, args=(source, engine, log), name="source", daemon=True),
    ]
    with stopping(engine.stop):
        for thread in threads:
            thread.start()
        # Objects of the start live as long as the process; the collector need not look at them again and again.
        gc.freeze()
        engine.run()
    source.stop()
    stopping_now.set()
    watch.stop()
    for thread in threads:
        thread.join(timeout=1.0)
    if sign is not None:
        presence.let_go(sign)
    return 0


def probe(cell: BackendCell, context: BackendContext, log: Log) -> None:
    """Ask the backend whether this host can carry it.  Raises KernelError naming what is missing."""
    found = cell.probe(context)
    if found.facts:
        log.info("host", **{key.replace(" ", "_"): value for key, value in found.facts.items()})
    for warning in found.warnings:
        log.warning("host", warning=warning)
    if found.problems:
        raise KernelError(f"this host cannot carry the {cell.name} backend: {'; '.join(found.problems)}")


def _follow_addresses(
    watch: AddressWatch,
    callback: Callable[[tuple[InterfaceAddress, ...]], None],
    stopping_now: threading.Event,
    log: Log,
) -> None:
    """Follow the node's addresses whatever happens: a table in motion cannot always be read at the first try."""
    pause = 0.1
    while not stopping_now.is_set():
        try:
            watch.run(callback)
        except Exception as error:  # noqa: BLE001  the next look reads everything again
            log.warning("cannot follow the node's addresses, trying again", error=error, pause_seconds=pause)
            stopping_now.wait(pause)
            pause = min(pause * 2, 30.0)


def _run_source(source: Source, engine: Engine, log: Log) -> None:
    try:
        source.run(engine.sink)
    except SourceError as error:
        log.error("source ended; what it delivered stays in force", error=error)
    except Exception as error:  # a source's bug must not end the proxy
        log.exception("source failed; what it delivered stays in force", error)
