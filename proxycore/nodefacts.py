"""The node's facts, kept up with: from configuration, Node object, ServiceCIDRs and the interfaces' addresses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from .config import Config
from .host import InterfaceAddress, resolve_host
from .kernel.addresses import AddressWatch
from .kernel.families import usable_families
from .logs import Log
from .model import HostState
from .objects import Node, ServiceCIDR

_RETRY_SECONDS = (0.1, 30.0)


class NodeFacts:
    """The engine's host function.  `config` may be replaced while it is in use.

    Made in the network namespace that it is about.  Raises KernelError when that cannot be read.
    """

    def __init__(self, config: Config, node_name: str, log: Log) -> None:
        self.config = config
        self.families = usable_families()
        self._node_name = node_name
        self._log = log
        self._said: set[str] = set()
        self._watch = AddressWatch()
        self._addresses: tuple[InterfaceAddress, ...] = self._watch.current()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self, node: Node | None, service_cidrs: Sequence[ServiceCIDR]) -> HostState:
        resolution = resolve_host(
            self.config, self._node_name, node, self._addresses, service_cidrs, self.families
        )
        for warning in resolution.warnings:
            if warning not in self._said:
                self._said.add(warning)
                self._log.warning("configuration", warning=warning)
        return resolution.state

    def follow(self, changed: Callable[[], None]) -> None:
        """Call back whenever the interfaces' addresses have changed, on a thread of its own, until stop()."""

        def take(addresses: tuple[InterfaceAddress, ...]) -> None:
            self._addresses = addresses
            changed()

        self._thread = threading.Thread(target=self._follow, args=(take,), name="addresses", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End following."""
        self._stopping.set()
        self._watch.stop()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def _follow(self, take: Callable[[tuple[InterfaceAddress, ...]], None]) -> None:
        """Whatever happens: a table in motion cannot always be read at the first try."""
        pause, longest = _RETRY_SECONDS
        while not self._stopping.is_set():
            try:
                self._watch.run(take)
            except Exception as error:  # noqa: BLE001  the next look reads everything again
                self._log.warning(
                    "cannot follow the node's addresses, trying again", error=error, pause_seconds=pause
                )
                self._stopping.wait(pause)
                pause = min(pause * 2, longest)
