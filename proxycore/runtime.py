"""`proxyctl run`: the parts put together, started in order, ended in order.

    configuration --> NodeFacts --+            +--> Servers (health, metrics)
         ^   |                    v            |
    Reloader +-- pace ---------> Engine --facts+--> observers
                                  ^    \\
    source --> Fallback ----------+     +--> Saver --> the last known good state on disk
"""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
from collections.abc import Callable

from . import hostsetup, logs
from .backend import BackendContext, Capability
from .cell import BackendCell
from .changes import ChangeBatch
from .config import Difference, Loaded
from .config.configz import configz
from .dispatch import BackendReply, BackendRunner, ObserverRunner
from .engine import Engine
from .errors import ConfigError, KernelError, SourceError
from .health import judge
from .host import reserved_ports
from .inbox import EngineSettings
from .kernel import presence
from .logs import Log, get
from .metrics.exposition import Registry
from .nodefacts import NodeFacts
from .options import API_SOURCE, RunOptions
from .plugins import Observers, load_backend, load_observers, load_source
from .reload import Reloader
from .saver import Saver
from .servers import Servers
from .signals import stopping
from .source import APIServer, Health, Heard, Source, SourceContext
from .sources.lastgood import Fallback
from .statefile import DEFAULT_PATH
from .status import Facts, SavedStatus
from .takeover import Takeover, reason_to_wait

BUILT_IN_OBSERVERS = ("conntrack", "events", "health-check-ports", "metrics")
NO_STATE = "none"
SWITCH_INTERVAL_SECONDS = 0.0005
"""How long a thread may keep the interpreter while another waits; Python's default of 5 ms would delay each hand-over."""


def run_proxy(options: RunOptions) -> int:
    """Run until a signal ends it; the process's exit status.

    Raises ConfigError, PluginError, SourceError or KernelError before anything was touched.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    # Until there is somebody who reads the configuration again: a change is noticed then, too.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    config = options.config.config
    trace = get("hooks").info if options.trace_hooks else None
    cell = load_backend(options.backend, trace=trace)
    if options.init_only:
        served = Capability.LOCALHOST_NODE_PORT in cell.info.capabilities and config.localhost_node_ports
        guard = hostsetup.loopback_guard(log=get("host")) if served else ""
        return 0 if hostsetup.prepare(config, log=get("host"), strict=True, guard=guard) else 1
    observers = load_observers(
        BUILT_IN_OBSERVERS if options.safe else config.observers_enabled,
        {*config.observers_disabled, *(() if cell.info.conntrack else ("conntrack",))},
        trace=trace,
    )
    source = load_source(options.source_name, trace=trace).open(
        SourceContext(
            argument=options.source_argument,
            node_name=options.node_name,
            api_server=options.api_server,
            pace=options.pace,
        )
    )
    return _Proxy(options, cell, observers, source).run()


class _Proxy:
    """One run.  Making it touches nothing but reads the kernel; raises KernelError, ConfigError."""

    def __init__(self, options: RunOptions, cell: BackendCell, observers: Observers, source: Source) -> None:
        config = options.config.config
        self._options = options
        self._loaded = options.config
        self._configz = configz(options.config)
        self._cell = cell
        self._found = observers
        self._log = get("engine")
        for problem in observers.problems:
            self._log.error("observer left out", error=problem)
        self._node = NodeFacts(config, options.node_name, self._log)
        first = self._node(None, ())
        self._context = BackendContext(
            host=first,
            families=first.families,
            options=config.backend_options,
            takeover=options.takeover,
        )
        self._takeover = Takeover(
            options.takeover,
            backend=cell.name,
            node_name=options.node_name,
            without=cell.info.adopts,
            holds=lambda: self._engine.begun.holds if self._engine.begun else (),
            exclude_cidrs=options.config.values.get("ipvs.excludeCIDRs", ()),  # type: ignore[arg-type]
            log=get("takeover"),
            hold=lambda: reason_to_wait(self._engine.status),
        )
        self._takeover.refuse_if_needed()
        probe(cell, self._context, self._log)
        self._source = source
        self._fallback = self._with_fallback(source)
        self._feed: Source = self._fallback or source
        self._registry = Registry()
        self._engine = Engine(
            settings=self._settings(),
            host_of=self._node,
            backend=self._backend_runner,
            backend_info=cell.info,
            observers=self._observer_runners,
            log=self._log,
            changed=self._object_changed,
            in_force=self._first_in_force,
            for_observers={
                "healthy": self.healthy,
                "facts": self.facts,
                "registry": self._registry,
                "mode": config.mode,
                "api_server": self._api_server(),
            },
        )
        self._saver = self._make_saver()
        self._reloader = Reloader(options, self._config_changed, get("config"))
        self._servers = Servers(
            self.facts,
            self._registry,
            mode=lambda: self._loaded.config.mode,
            configz=lambda: self._configz,
        )

    # -- parts --

    def _with_fallback(self, source: Source) -> Fallback | None:
        """Only what comes from afar is worth keeping: such a source says where from."""
        config = self._loaded.config
        origin = str(getattr(source, "origin", "") or "")
        path = config.saved_state_file or DEFAULT_PATH
        if not origin or path == NO_STATE:
            return None
        return Fallback(
            source,
            path,
            node=self._options.node_name,
            origin=origin,
            wait_seconds=config.saved_state_wait_seconds,
            log=get("saved-state"),
        )

    def _make_saver(self) -> Saver | None:
        if self._fallback is None:
            return None
        return Saver(
            self._fallback.path,
            node=self._options.node_name,
            origin=self._fallback.origin,
            read=self._engine.contents,
            live=self._fallback.live,
            log=get("saved-state"),
        )

    def _saved(self) -> SavedStatus | None:
        if self._saver is None or self._fallback is None:
            return None
        status = self._saver.status()
        if status.saved_at is None and not status.problem and self._fallback.problem:
            return SavedStatus(path=status.path, problem=self._fallback.problem)
        return status

    def _api_server(self) -> APIServer | None:
        return self._options.api_server if self._options.source_name == API_SOURCE else None

    def _settings(self) -> EngineSettings:
        config = self._loaded.config
        return EngineSettings(
            node_name=self._options.node_name,
            families=self._context.families,
            sync_period_seconds=config.sync_period_seconds,
            min_sync_period_seconds=config.min_sync_period_seconds,
            verify_interval_seconds=config.verify_interval_seconds,
            backend_options=dict(config.backend_options),
            takeover=self._options.takeover,
            reserved_ports=reserved_ports(config),
            observer_options={name: dict(values) for name, values in config.observer_options.items()},
        )

    def _backend_runner(self, deliver: Callable[[BackendReply], None]) -> BackendRunner:
        return BackendRunner(self._cell, deliver, log=get("backend"))

    def _observer_runners(self, snapshot: Callable[[], ChangeBatch | None]) -> list[ObserverRunner]:
        return [ObserverRunner(observer, snapshot, log=get("observer")) for observer in self._found.cells]

    # -- what others ask and tell, from their threads --

    def facts(self) -> Facts:
        """Everything that health and metrics judge by, as of now."""
        config = self._loaded.config
        return Facts(
            now=time.time(),
            monotonic=time.monotonic(),
            status=self._engine.status,
            engine_silent_seconds=time.monotonic() - self._engine.beat,
            backend_overdue=self._engine.backend_overdue(),
            backend_overdue_total=self._engine.backend_overdue_total(),
            observers=self._engine.observers(),
            left_out=tuple(map(str, self._found.problems)),
            saved=self._saved(),
            config=self._reloader.status(),
            servers=self._servers.status(),
            sync_period_seconds=config.sync_period_seconds,
            stale_after_seconds=config.stale_after_seconds,
            source_name=self._options.source,
            heard=self._source.heard() if isinstance(self._source, Heard) else {},
            takeover=self._takeover.problem or "",
        )

    def healthy(self) -> bool:
        """Is the proxy itself well, whatever may be with its node?"""
        return judge(self.facts()).proxy_healthy

    def _object_changed(self) -> None:
        if self._saver is not None:
            self._saver.changed()

    def _first_in_force(self) -> None:
        threading.Thread(target=self._settle_in, name="takeover", daemon=True).start()

    def _settle_in(self) -> None:
        """What has to wait for rules in force; on a thread of its own."""
        begun = self._engine.begun
        if begun is not None and begun.holds:
            # Only now: what guards loopback addresses against other hosts is in force.
            hostsetup.route_loopback(
                self._loaded.config, begun.holds, guarded=begun.loopback_node_ports, log=get("host")
            )
        self._takeover.after_first_sync()

    def _config_changed(self, difference: Difference, loaded: Loaded) -> None:
        """Take over what can change while we run; called on the reloader's thread."""
        before, config = self._loaded.config, loaded.config
        self._loaded, self._configz = loaded, configz(loaded)
        logs.configure(config.log_format, config.log_verbosity)
        if (config.conntrack, config.oom_score_adj) != (before.conntrack, before.oom_score_adj):
            hostsetup.prepare(config, log=get("host"), strict=False)
        self._engine.set_settings(self._settings())
        self._node.config = config
        self._engine.host_may_have_changed()
        try:
            self._servers.serve(config.healthz_bind_address, config.metrics_bind_address, hard_fail=False)
        except ConfigError as error:
            self._log.error("addresses stay as they are", error=error)

    # -- life --

    def run(self) -> int:
        """From the first thread to the last; the exit status."""
        config = self._loaded.config
        if (other := presence.holder()) is not None:
            self._log.info("waiting for another proxy in this network namespace to end", pid=other.pid)
        sign = presence.claim()
        if sign is None:
            self._log.warning(
                "a process of another user has the name by which proxies see each other; going on without it"
            )
        self._say_what_is_missing()
        self._log.info(
            "starting",
            backend=self._cell.name,
            chosen_by=self._loaded.origin_and_place("backend"),
            distribution=self._cell.distribution,
            source=self._options.source,
            node=self._options.node_name,
            families=list(self._context.families),
        )
        hostsetup.prepare(config, log=get("host"), strict=False)
        self._servers.serve(
            config.healthz_bind_address, config.metrics_bind_address, hard_fail=config.bind_address_hard_fail
        )
        source = threading.Thread(target=self._run_source, name="source", daemon=True)
        with stopping(self._engine.stop, self._reloader.request):
            if self._saver is not None:
                self._saver.start()
            self._node.follow(self._engine.host_may_have_changed)
            source.start()
            self._reloader.start()
            # Objects of the start live as long as the process; the collector need not look at them again and again.
            gc.freeze()
            self._engine.run()
        self._feed.stop()
        self._takeover.stop()
        self._reloader.stop()
        if self._saver is not None:
            self._saver.stop()
        self._servers.close()
        self._node.stop()
        source.join(timeout=1.0)
        if sign is not None:
            presence.let_go(sign)
        return 0

    def _run_source(self) -> None:
        """The source's thread.  However it ends, others must know that nothing more comes."""
        try:
            self._feed.run(self._engine.sink)
        except SourceError as error:
            self._log.error("source ended; what it delivered stays in force", error=error)
            self._engine.sink.put([Health("stale", f"the source has ended: {error}")])
        except BaseException as error:  # noqa: BLE001  a source's bug must not end the proxy
            self._log.exception("source failed; what it delivered stays in force", error)
            self._engine.sink.put([Health("failed", f"the source has ended by a bug: {error}")])

    def _say_what_is_missing(self) -> None:
        if (
            "localhost" in self._loaded.config.node_port_addresses
            and Capability.LOCALHOST_NODE_PORT not in self._cell.info.capabilities
        ):
            self._log.warning(
                "configuration",
                warning=f"the {self._cell.name} backend serves no node ports on loopback addresses",
            )


def probe(cell: BackendCell, context: BackendContext, log: Log) -> None:
    """Ask the backend whether this host can carry it.

    Raises KernelError naming what is missing; ConfigError: the backend's options are wrong.
    """
    found = cell.probe(context)
    if found.facts:
        log.info("host", **{key.replace(" ", "_"): value for key, value in found.facts.items()})
    for warning in found.warnings:
        log.warning("host", warning=warning)
    if found.problems:
        raise KernelError(f"this host cannot carry the {cell.name} backend: {'; '.join(found.problems)}")
