"""A source that has a saved state to fall back on, and the source `saved:FILE`, which is that state alone.

    source --> Fallback --> engine      everything passes as it comes
               ^
    saved -----+                        what the source has not spoken of, when it has not come to its Synced in time

A kind of object that the source has listed completely is the source's alone; of the others, each object is as the source
said last, else as it was saved.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from ..decode import describe, key_of
from ..errors import SourceError
from ..hookspecs import hookimpl
from ..logs import Log
from ..objects import API_VERSIONS, Kind
from ..savedstate import Saved, check_owner
from ..source import (
    Applied,
    Deleted,
    Event,
    Health,
    Listed,
    Replaced,
    Sink,
    Source,
    SourceContext,
    Synced,
    Trouble,
)
from ..statefile import can_be_marked, read


class Fallback:
    """Runs `source`; serves what `path` holds if that is not synced within `wait_seconds`, or is out of reach before.

    A state of another node or another origin is refused, and so is a damaged file: then there is nothing to fall back on, and
    `problem` says why.  At the source's Synced, what it could not read or list at all is as it was saved.
    """

    def __init__(
        self,
        source: Source,
        path: str,
        *,
        node: str,
        origin: str,
        wait_seconds: float,
        log: Log,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.live = threading.Event()
        """The source has come to its Synced."""
        self.problem = ""
        self.origin = origin
        self._source = source
        self.path = path
        self._node = node
        self._wait_seconds = wait_seconds
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        """Held while something is handed over, until the source is live: what is saved must not come after what is newer."""
        self._hurry = threading.Event()
        """There is nothing to wait for: the source is live, out of reach, or over."""
        self._spoken_of: dict[Kind, set[tuple[str, str]]] = {}
        self._listed: set[Kind] = set()
        self._troubles: dict[str, Trouble] = {}
        self._fallen_back: Saved | None = None
        self._source_is_stale = False
        self._stopped = False

    def run(self, sink: Sink) -> None:
        """Deliver until stop(); see `Source.run`."""
        waiter = threading.Thread(target=self._fall_back, args=(sink,), name="saved-state", daemon=True)
        waiter.start()
        try:
            self._source.run(_Gate(self, sink))
        finally:
            self._hurry.set()
            waiter.join(timeout=5.0)

    def stop(self) -> None:
        """End run(); see `Source.stop`."""
        self._stopped = True
        self._hurry.set()
        self._source.stop()

    # -- the saved state -------------------------------------------------------------------------------------------

    def _fall_back(self, sink: Sink) -> None:
        self._hurry.wait(self._wait_seconds)
        if self._stopped or self.live.is_set():
            return
        saved = self._read()
        if saved is None:
            return
        with self._lock:
            if self._stopped or self.live.is_set():
                return
            self._fallen_back = saved
            complete = bool(saved.header.complete) and can_be_marked(self.path)
            self._log.warning(
                "serving the last known good state",
                file=self.path,
                age_seconds=round(self._clock() - saved.header.saved_at),
                complete=complete,
            )
            events: list[Event] = [*self._missing(saved, API_VERSIONS.keys() - self._listed), self._stale()]
            if not complete:
                events.append(
                    Trouble(self._subject(), "changes that came after it was written are not in it")
                )
            sink.put([*events, Synced()])

    def _read(self) -> Saved | None:
        try:
            saved = read(self.path)
            if saved is not None:
                check_owner(saved.header, self.path, self._node, self.origin)
        except (SourceError, OSError, MemoryError) as error:
            self.problem = str(error)
            self._log.error(
                "the last known good state cannot be used; waiting for the API server", error=error
            )
            return None
        return saved

    def _missing(self, saved: Saved, kinds: Collection[Kind]) -> Iterator[Applied]:
        """What is saved of these kinds and the source has not spoken of."""
        for found in saved.lists:
            if found.kind in kinds:
                known = self._spoken_of.get(found.kind, set())
                for item in found.objects:
                    if key_of(item)[1:] not in known:
                        yield Applied(item)

    def _subject(self) -> str:
        return f"saved state {self.path}"

    def _stale(self, reason: str = "") -> Health:
        assert self._fallen_back is not None
        saved_at = self._fallen_back.header.saved_at
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(saved_at))
        text = f"serving the state that was saved at {when}{f'; {reason}' if reason else ''}"
        return Health("stale", text, saved_at)

    # -- the live source -------------------------------------------------------------------------------------------

    def put(self, sink: Sink, events: list[Event]) -> None:
        """What the source delivers; from any of its threads."""
        if self.live.is_set():
            sink.put(events)
            return
        with self._lock:
            if self.live.is_set():
                sink.put(events)
                return
            now: list[Event] = []
            for place, event in enumerate(events):
                match event:
                    case Synced():
                        sink.put([*now, *self._settled(), *events[place:]])
                        # Last: from here on other threads do not wait for the lock.
                        self.live.set()
                        self._hurry.set()
                        return
                    case Health():
                        self._source_is_stale = event.state == "stale"
                        if event.state != "live":
                            self._hurry.set()
                        stale = self._source_is_stale and self._fallen_back is not None
                        now.append(self._stale(event.reason) if stale else event)
                    case Trouble():
                        self._troubles[event.subject] = event
                    case _:
                        self._note(event)
                        now.append(event)
            if now:
                sink.put(now)

    def _note(self, event: Applied | Deleted | Replaced | Listed) -> None:
        match event:
            case Applied(item):
                kind, *names = key_of(item)
                self._spoken_of.setdefault(kind, set()).add((names[0], names[1]))
            case Deleted(kind, namespace, name):
                self._spoken_of.setdefault(kind, set()).add((namespace, name))
            case _:
                self._listed.add(event.kind)

    def _settled(self) -> list[Event]:
        """What has to be delivered before the source's Synced: the rest of what is known."""
        troubles = [trouble for trouble in self._troubles.values() if trouble.reason]
        unavailable = {trouble.kind for trouble in troubles if trouble.kind} - self._listed
        events: list[Event] = []
        saved = self._fallen_back or (self._read() if troubles else None)
        if self._fallen_back is not None:
            events += (
                Listed(kind, frozenset(self._spoken_of.get(kind, ())))
                for kind in API_VERSIONS.keys() - self._listed - unavailable
            )
            events.append(Trouble(self._subject(), ""))
            if not self._source_is_stale:
                events.append(Health("live"))
        elif saved is not None:
            events += self._missing(saved, unavailable)
        known = {describe(key_of(item)): item for item in saved.objects} if saved and troubles else {}
        for trouble in troubles:
            if trouble.subject in known:
                events.append(Applied(known[trouble.subject]))
                trouble = Trouble(trouble.subject, trouble.reason, harmless=True)
            events.append(trouble)
        self._fallen_back = None
        self._spoken_of.clear()
        self._troubles.clear()
        return events


class _Gate:
    """The sink that the source gets."""

    def __init__(self, owner: Fallback, sink: Sink) -> None:
        self._owner = owner
        self._sink = sink

    def put(self, events: list[Event]) -> None:
        self._owner.put(self._sink, events)


class SavedSource:
    """A saved state, delivered once, as if it were live."""

    def __init__(self, saved: Saved, path: str) -> None:
        self._events: list[Event] = [*saved.lists, Synced(), Health("ended", f"{path} holds no more")]

    def run(self, sink: Sink) -> None:
        """Deliver everything; see `Source.run`."""
        sink.put(self._events)

    def stop(self) -> None:
        """Nothing is ever under way."""


class SavedPlugin:
    """The plugin object of the source `saved`."""

    @hookimpl
    def proxycore_source_open(self, context: SourceContext) -> Source:
        """The state that the argument names.  Raises SourceError: it is not there, damaged, or none of ours."""
        if not context.argument or "\0" in context.argument:
            raise SourceError("source saved needs a file: --source saved:FILE")
        path = str(Path(context.argument))
        saved = read(path)
        if saved is None:
            raise SourceError(f"{path}: there is no such file")
        return SavedSource(saved, path)


def plugin() -> SavedPlugin:
    """Entry point of `saved`."""
    return SavedPlugin()
