"""One resource, listed and then watched for ever, on a thread of its own.

    list --portions--> Applied --complete--> Listed --> watch --events--> Applied, Deleted
     ^                                                    |  ended, cut: again from the last version, at once
     +------------------- too old (410) ------------------+  refused, unreachable: again after a pause

What was delivered is forgotten but for the names, which tell what a later list has lost.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import msgspec

from ..apiclient import CONNECT_SECONDS, APIClient, allow_silence, chunks, discard, jittered, read
from ..errors import SourceError
from ..logs import Log
from ..objects import APIObject
from ..source import Applied, Deleted, Event, Listed, Trouble
from .listing import ListReader, Misfit, Names, NotUnderstood, Skipped, WatchReader
from .watchhealth import Board, Resource

if TYPE_CHECKING:
    from urllib3.response import HTTPResponse

LIMIT = 500
LIST_SILENCE_SECONDS = 30.0
"""A list that sends nothing for so long is given up; so is a watch before its headers."""
WATCH_SECONDS = (300, 600)
"""A watch is asked to end after a random time between these."""
WATCH_SILENCE_SECONDS = 15.0
"""It is given up so long after that: there may be no event for all of its time."""
BACK_OFF_SECONDS = (0.1, 30.0)
RARELY_SECONDS = 300.0
"""Between two looks for what the server does not serve, or does not show us, and we do without."""
SHORT_SECONDS = 5.0
"""A watch that ended sooner, and said nothing, is no success."""
REFUSALS = 3
"""So many refused watches in a row lead to a new list."""
SHORT_WATCHES = 3
"""So many in a row count as a failure."""
MAX_RETRY_AFTER_SECONDS = 300.0
DENIED_SECONDS = 120.0
"""So long somebody may be about to admit us."""
DENIED_PAUSE_SECONDS = 10.0
_READ_BYTES = 1 << 18
_SHOWN = 200


class _Refused(SourceError):
    """The server answered, and not with what was asked for."""

    def __init__(self, code: int, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class _Status(msgspec.Struct):
    message: str | None = None
    reason: str | None = None


class Reflector:
    """See the module.  `run()` is its thread; it ends when `stopping` is set and the client is closed."""

    def __init__(
        self,
        resource: Resource,
        client: APIClient,
        board: Board,
        put: Callable[[list[Event]], None],
        stopping: threading.Event,
        log: Log,
    ) -> None:
        self._resource = resource
        self._client = client
        self._board = board
        self._put = put
        self._stopping = stopping
        self._log = log.bind(resource=resource.plural)
        self._version = ""
        """From which the next watch goes on; empty: a list comes first."""
        self._exact = False
        """The next list is to be the newest, rather than what the server has at hand."""
        self._known: set[Names] = set()
        """Objects that were delivered and are not deleted."""
        self._bad: dict[Names, Trouble] = {}
        self._nameless = 0
        self._failures = 0
        self._short = 0
        self._refusals = 0
        """Watches in a row that a server has refused."""
        self._denied_at: float | None = None
        self._skipped: set[str] = set()
        self.lists_total = 0
        self.watches_total = 0
        self.skipped_total = 0

    def run(self) -> None:
        """List and watch until stopped, whatever happens."""
        while not self._stopping.is_set():
            try:
                if not self._version:
                    self._list()
                self._watch()
            except SourceError as error:
                if not self._stopping.is_set():
                    self._stopping.wait(self._failed(error))
            except Exception as error:  # noqa: BLE001  a bug must not leave this node blind: all is read anew
                self._log.exception("cannot follow, reading everything anew", error)
                self._version = ""
                self._stopping.wait(self._failed(SourceError(f"cannot be followed: {type(error).__name__}")))

    # -- lists --

    def _list(self) -> None:
        """Deliver everything.  Raises SourceError: what was delivered so far is true, and not all."""
        # What a server has at hand may be older than what another one has told us: that is good enough for a start only.
        exact = self._exact or bool(self._known)
        try:
            present, misfits, version = self._pages("" if exact else "0")
        except _Refused as error:
            if error.code == 410 and not exact:
                self._exact = True
                present, misfits, version = self._pages("")
            else:
                # A server that is behind, or an old one, cannot answer for the version that was asked for.
                self._exact = not self._exact if error.code in (400, 410, 500, 504) else self._exact
                raise
        if self._stopping.is_set():
            raise SourceError("is ending")
        self.lists_total += 1
        self._log.debug("listed", objects=len(present), unread=len(misfits), version=version)
        self._finish_list(present, misfits)
        self._board.complete(self._resource.kind)
        self._version = version
        self._exact = False

    def _pages(self, version: str) -> tuple[set[Names], list[Misfit], str]:
        """Deliver all pages of one list, or the whole if the server knows no pages; what there is, and the version."""
        query = [("limit", str(LIMIT)), *self._selectors()]
        follow = [("resourceVersion", version)] if version else []
        present: set[Names] = set()
        misfits: list[Misfit] = []
        while True:
            # Pages after the first are the same request: the limit is there to keep us from asking again and again.
            response = self._get(
                [*query, *follow], (CONNECT_SECONDS, LIST_SILENCE_SECONDS), limited=not present
            )
            reader = ListReader(self._resource.kind)
            try:
                for data in chunks(response, _READ_BYTES):
                    reader.feed(data)
                    self._deliver_portion(reader.take(), present)
            except BaseException:
                discard(response)
                raise
            listed, token = reader.finish()
            self._board.heard(self._resource.kind)
            self._deliver_portion(reader.take(), present)
            misfits += reader.misfits
            if not token:
                return present, misfits, listed
            follow = [("continue", token)]

    def _deliver_portion(self, objects: list[APIObject], present: set[Names]) -> None:
        """What has arrived of a list: not kept until the end, which would be all of the cluster at once."""
        if not objects or self._stopping.is_set():
            return
        names = [(item.metadata.namespace, item.metadata.name) for item in objects]
        present.update(names)
        self._known.update(names)
        self._put([Applied(item) for item in objects])

    def _finish_list(self, present: set[Names], misfits: list[Misfit]) -> None:
        events = self._judge(present, misfits)
        unread = {misfit.names for misfit in misfits}
        if None not in unread:
            # What cannot be read now is there, and its last good state stays.
            names = present | {names for names in unread if names is not None}
            self._known &= names
            events.append(Listed(self._resource.kind, frozenset(names)))
        self._put(events)

    def _judge(self, present: set[Names], misfits: list[Misfit]) -> list[Event]:
        """Troubles that a list begins and ends."""
        events: list[Event] = []
        bad = {misfit.names: misfit for misfit in misfits if misfit.names is not None}
        for names in [names for names in self._bad if names not in bad]:
            events.append(self._mended(names))
        for misfit in bad.values():
            events += self._spoilt(misfit)
        nameless = sum(misfit.names is None for misfit in misfits)
        if nameless != self._nameless:
            self._nameless = nameless
            subject = f"{self._resource.plural} without a name"
            events.append(Trouble(subject, f"{nameless} of the list cannot be read" if nameless else ""))
        return events

    # -- watches --

    def _watch(self) -> None:
        """Follow changes until the watch ends, for whatever reason that is no failure.  Raises SourceError."""
        seconds = random.randint(*WATCH_SECONDS)
        query = [
            ("watch", "1"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", self._version),
            ("timeoutSeconds", str(seconds)),
            *self._selectors(),
        ]
        try:
            response = self._get(query, (CONNECT_SECONDS, LIST_SILENCE_SECONDS), limited=False)
        except _Refused as error:
            self._take_refusal(error)
            return
        allow_silence(response, seconds + WATCH_SILENCE_SECONDS)
        self.watches_total += 1
        began, start = time.monotonic(), self._version
        reader = WatchReader(self._resource.kind, start)
        proof = None
        if self._short < SHORT_WATCHES:
            self._lasted(self._short)
        else:
            # It may be as short as those before it; if nothing happens nobody else would notice that it is not.
            proof = threading.Timer(SHORT_SECONDS, self._lasted)
            proof.daemon = True
            proof.start()
        try:
            self._read(response, reader)
        finally:
            if proof is not None:
                proof.cancel()
            discard(response)
        if self._version != start or time.monotonic() - began >= SHORT_SECONDS:
            self._short = 0
        if reader.refusal is not None:
            self._take_refusal(_Refused(reader.refusal.code, reader.refusal.message))
        else:
            self._ended("its watches end as soon as they begin")

    def _read(self, response: HTTPResponse, reader: WatchReader) -> None:
        """Deliver what comes, until nothing more does."""
        try:
            for data in chunks(response):
                seen = reader.feed(data)
                self._board.heard(self._resource.kind)
                if seen:
                    self._deliver_changes(seen)
                if reader.version != self._version:
                    self._version = reader.version
                    if self._short:
                        self._lasted()
                if reader.refusal is not None:
                    return
        except NotUnderstood as error:
            # What came before it counts; the rest is asked for again.
            self._version = reader.version
            self._log.warning("watch is broken off", reason=str(error))
        except SourceError as error:
            self._log.debug("watch was cut", reason=str(error))

    def _deliver_changes(self, seen: list[Applied | Deleted | Misfit | Skipped]) -> None:
        events: list[Event] = []
        known, bad = self._known, self._bad
        for item in seen:
            match item:
                case Applied(found):
                    names = (found.metadata.namespace, found.metadata.name)
                    known.add(names)
                    if bad and names in bad:
                        events.append(self._mended(names))
                    events.append(item)
                case Deleted(_, namespace, name):
                    names = (namespace, name)
                    # Of one that we could never read, others may still know what it said once.
                    if names in known or names in bad:
                        known.discard(names)
                        events.append(item)
                    if names in bad:
                        events.append(self._mended(names))
                case Misfit():
                    if item.names is None:
                        self._skip(f"an object without a name: {item.reason}")
                    else:
                        events += self._spoilt(item)
                case Skipped(what):
                    self._skip(what)
        if events:
            self._put(events)

    def _take_refusal(self, error: _Refused) -> None:
        """The server will not watch from our version.  Raises it where that is no matter of versions."""
        if error.code == 410:
            self._log.info(
                "changes since then are no longer known, reading everything anew", version=self._version
            )
            self._version = ""
            self._exact = True
            self._ended("it forgets changes faster than they can be followed")
            return
        self._refusals += 1
        if error.code in (400, 405, 422) or (error.code >= 500 and self._refusals >= REFUSALS):
            # It answers, and not for this version: perhaps it has never heard of it, after a restore.
            self._version = ""
            self._exact = True
            self._refusals = 0
        raise error

    def _lasted(self, short: int = 0) -> None:
        """The watch is a success."""
        self._failures, self._short, self._refusals = 0, short, 0
        self._denied_at = None
        self._board.watched(self._resource.kind)

    def _ended(self, problem: str) -> None:
        """Pause, unless this was the first to end soon."""
        self._short += 1
        if self._short >= SHORT_WATCHES and not self._stopping.is_set():
            self._board.failed(self._resource.kind, problem)
        if self._short > 1:
            self._stopping.wait(_pause(self._short - 2))

    # -- both --

    def _selectors(self) -> list[tuple[str, str]]:
        pairs = (("labelSelector", self._resource.labels), ("fieldSelector", self._resource.fields))
        return [(key, value) for key, value in pairs if value]

    def _get(
        self, query: list[tuple[str, str]], timeout: tuple[float, float], *, limited: bool = True
    ) -> HTTPResponse:
        """The answer, its body unread.  Raises SourceError: there is none, or none that serves."""
        response = self._client.get(self._resource.path, query, timeout, limited=limited)
        if response.status == 200:
            return response
        retry_after = _seconds(response.headers.get("Retry-After"))
        body = read(response)
        try:
            status = msgspec.json.decode(body, type=_Status)
            said = status.message or status.reason or ""
        except (msgspec.DecodeError, ValueError):
            said = ""
        said = " ".join(said.split())[:_SHOWN]
        message = f"answers {response.status} for {self._resource.plural}{f': {said}' if said else ''}"
        raise _Refused(response.status, message, retry_after)

    def _failed(self, error: SourceError) -> float:
        """Report a failure; how long to pause."""
        resource, code = self._resource, error.code if isinstance(error, _Refused) else 0
        pause = _pause(self._failures)
        self._failures += 1
        self._log.debug("failed", reason=str(error), pause_seconds=pause)
        if isinstance(error, _Refused):
            pause = max(pause, min(error.retry_after, MAX_RETRY_AFTER_SECONDS))
        if not resource.essential and code == 403:
            # A server that has just started refuses everybody until it knows its roles.
            now = time.monotonic()
            self._denied_at = self._denied_at or now
            if now - self._denied_at >= DENIED_SECONDS:
                self._board.excuse(
                    resource.kind,
                    f"the API server does not show us any: {error}; going on without, and the role of deploy/rbac.yaml would "
                    "admit us",
                )
                return jittered(RARELY_SECONDS)
            pause = min(pause, DENIED_PAUSE_SECONDS)
        if resource.kind == "ServiceCIDR" and code == 404:
            self._known.clear()
            self._put([Listed(resource.kind, frozenset())])
            self._board.excuse(resource.kind, "")
            return jittered(RARELY_SECONDS)
        self._board.failed(resource.kind, str(error))
        return pause

    def _spoilt(self, misfit: Misfit) -> list[Event]:
        assert misfit.names is not None
        # One object must not hold all others back, at a start least of all.
        trouble = Trouble(misfit.subject, misfit.reason, tolerable=True)
        if self._bad.get(misfit.names) == trouble:
            return []
        self._bad[misfit.names] = trouble
        return [trouble]

    def _mended(self, names: Names) -> Trouble:
        return Trouble(self._bad.pop(names).subject, "")

    def _skip(self, what: str) -> None:
        """Count what is none of ours; log the first of its kind."""
        self.skipped_total += 1
        if what not in self._skipped and len(self._skipped) < 20:
            self._skipped.add(what)
            self._log.warning("skipped; more of this kind are only counted", what=what)


def _pause(failures: int) -> float:
    shortest, longest = BACK_OFF_SECONDS
    return jittered(min(longest, shortest * 2.0 ** min(failures, 20)))


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header: a number, or a date."""
    if not retry_after:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return max(0.0, when.timestamp() - time.time())
