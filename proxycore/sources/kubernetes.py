"""The source `kubernetes`, or `kubernetes:CONTEXT`: Services, EndpointSlices, this Node and ServiceCIDRs from the API server.

    reflector of Services ------+
    reflector of EndpointSlices +--> sink
    reflector of this Node -----+      ^
    reflector of ServiceCIDRs --+      |
              |                        |
              +--> board --------------+  Synced, Health

Selectors are kube-proxy's.  A server that does not serve ServiceCIDRs, or an account that may not see them or the Node,
does not keep the rest from being served.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Mapping

import msgspec

from .. import __version__
from ..apiclient import APIClient, connect
from ..errors import SourceError
from ..hookspecs import hookimpl
from ..logs import get
from ..objects import LABEL_HEADLESS, LABEL_PROXY_NAME
from ..source import Event, Sink, Source, SourceContext
from .reflector import Reflector
from .watchhealth import Board, Resource

USER_AGENT = f"proxycore/{__version__} ({platform.system().lower()}/{platform.machine()})"
OURS = f"!{LABEL_PROXY_NAME},!{LABEL_HEADLESS}"
"""Label selector: neither another proxy's nor headless."""
JOIN_SECONDS = 0.8


def resources(node_name: str) -> tuple[Resource, ...]:
    """What is listed and watched."""
    slices = "/apis/discovery.k8s.io/v1/endpointslices"
    return (
        Resource("Service", "/api/v1/services", "services", True, OURS, "spec.clusterIP!=None"),
        Resource("EndpointSlice", slices, "endpointslices", True, OURS),
        Resource("Node", "/api/v1/nodes", "nodes", False, fields=f"metadata.name={node_name}"),
        Resource("ServiceCIDR", "/apis/networking.k8s.io/v1/servicecidrs", "servicecidrs", False, OURS),
    )


class _Outlet:
    """The sink, whose failure ends the source: what could not be delivered is missing for ever."""

    def __init__(self, sink: Sink, source: KubernetesSource) -> None:
        self._sink = sink
        self._source = source
        self.error: Exception | None = None

    def put(self, events: list[Event]) -> None:
        """Raises SourceError: the sink took nothing, and the source is ending."""
        try:
            self._sink.put(events)
        except Exception as error:
            self.error = self.error or error
            self._source.stop()
            raise SourceError("what was received cannot be delivered") from error


class KubernetesSource:
    """Lists and watches until stopped.  `origin`: URL of the API server, by which its objects are known for its own."""

    def __init__(self, client: APIClient, node_name: str) -> None:
        self.origin = client.identity
        self._client = client
        self._node_name = node_name
        self._stopping = threading.Event()
        self._board: Board | None = None

    def heard(self) -> Mapping[str, float]:
        """See `Heard`."""
        return self._board.heard_at() if self._board else {}

    def stop(self) -> None:
        """End run(); see `Source.stop`."""
        self._stopping.set()
        self._client.close()

    def run(self, sink: Sink) -> None:
        """Deliver until stop(); see `Source.run`.  Raises SourceError only when the sink fails."""
        outlet = _Outlet(sink, self)
        log = get("kubernetes")
        followed = resources(self._node_name)
        board = self._board = Board(followed, self._client.server, outlet.put)
        threads = [
            threading.Thread(
                target=Reflector(resource, self._client, board, outlet.put, self._stopping, log).run,
                name=f"watch-{resource.plural}",
                daemon=True,
            )
            for resource in followed
        ]
        for thread in threads:
            thread.start()
        while not self._stopping.wait(board.tick()):
            pass
        self._client.close()
        deadline = time.monotonic() + JOIN_SECONDS
        for thread in threads:
            # One that resolves a name, or is in the sink, cannot be woken; it ends by itself and delivers nothing more.
            thread.join(max(0.0, deadline - time.monotonic()))
        if isinstance(outlet.error, SourceError):
            raise outlet.error
        if outlet.error is not None:
            raise SourceError(f"kubernetes: cannot deliver: {outlet.error}") from outlet.error


class KubernetesPlugin:
    """The plugin object of the source `kubernetes`."""

    @hookimpl
    def proxycore_source_open(self, context: SourceContext) -> Source:
        """The API server's objects, by the kubeconfig context that the argument names, if it names one.

        Raises SourceError when no way to an API server is configured, or the configuration is wrong; that the server is
        not there is no error.
        """
        settings = context.api_server
        if context.argument:
            settings = msgspec.structs.replace(settings, context=context.argument)
        return KubernetesSource(connect(settings, user_agent=USER_AGENT), context.node_name)


def plugin() -> KubernetesPlugin:
    """Entry point of `kubernetes`."""
    return KubernetesPlugin()
