"""The contract between a source of Kubernetes objects and the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, runtime_checkable

import msgspec

from .objects import APIObject, Kind


class Applied(msgspec.Struct, frozen=True):
    """An object is there now, new or changed; it replaces the one of its kind, namespace and name."""

    object: APIObject


class Deleted(msgspec.Struct, frozen=True):
    """An object is gone."""

    kind: Kind
    namespace: str
    name: str


class Replaced(msgspec.Struct, frozen=True):
    """The complete set of objects of one kind: what is not in it is gone."""

    kind: Kind
    objects: tuple[APIObject, ...]


class Listed(msgspec.Struct, frozen=True):
    """All objects of one kind that there are, by namespace and name, every one delivered: what is not named is gone.

    For sources that deliver a long list in pieces.
    """

    kind: Kind
    names: frozenset[tuple[str, str]]


class Synced(msgspec.Struct, frozen=True):
    """Everything that was there at the start has been delivered.  Nothing is programmed before."""


class Trouble(msgspec.Struct, frozen=True):
    """Something could not be read; what it last said stays in force.  `subject` names file and line, or the object.

    An empty `reason` says that the trouble with this subject is over.  `harmless`: nothing is missing because of it.
    `tolerable`: something is, but a start need not wait for it, although rules of an earlier run may still have it.
    `kind`: nothing of this kind can be had.
    """

    subject: str
    reason: str
    harmless: bool = False
    tolerable: bool = False
    kind: Kind | None = None


class Health(msgspec.Struct, frozen=True):
    """The source's own state: `stale` while it may be missing changes, `failed` when it ended by a bug.

    Tell it when it changes; that a watch ends and is taken up again at once is no change.  `since`: of when the newest
    of what was delivered is, in seconds since the epoch, where that is older than this word.
    """

    state: Literal["live", "stale", "ended", "failed"]
    reason: str = ""
    since: float | None = None


Event = Applied | Deleted | Replaced | Listed | Synced | Trouble | Health


class Sink(Protocol):
    """Where a source puts events; may be called from any thread, never blocks for long."""

    def put(self, events: list[Event]) -> None: ...


class APIServer(msgspec.Struct, frozen=True, kw_only=True):
    """How the Kubernetes API server is reached; empty texts: as the `kubernetes` source finds it.

    `master`: URL that overrules the one of the kubeconfig.  `qps`, `burst`: limits of our own requests, watches apart;
    0 or less: no limit.
    """

    kubeconfig: str = ""
    context: str = ""
    master: str = ""
    qps: float = 5.0
    burst: int = 10


class SourceContext(msgspec.Struct, frozen=True, kw_only=True):
    """`argument` is what stands behind the colon of `--source NAME:ARGUMENT`."""

    argument: str
    node_name: str
    api_server: APIServer = APIServer()
    pace: float | None = None
    """Speed of a recording: 1.0 as it was, None at once."""


class Source(Protocol):
    """A source runs on one thread of its own.

    One whose objects come from afar may have an attribute `origin`, text that says from where (the API server's URL): then
    what it delivered is kept on disk, for a start at which it is out of reach.
    """

    def run(self, sink: Sink) -> None:
        """Deliver events until stop(); returns early when a finite source has ended.

        Raises SourceError: it cannot go on; what was delivered stays in force.
        """

    def stop(self) -> None:
        """End run() within a second.  From any thread, also before run() and twice."""


@runtime_checkable
class Heard(Protocol):
    """What a source may have beside: when it last heard of each of the things that it follows."""

    def heard(self) -> Mapping[str, float]:
        """Seconds since the epoch, by a short name (`services`); from any thread."""
