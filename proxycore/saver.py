"""Keeping the last known good state on disk, on a thread of its own.

A change is written once things have been quiet for a moment, and while changes go on, from time to time: the dearer a state is
to write, the rarer.  In between the file says that it is not complete, which matters to a run that finds rules of ours in the
kernel: those are newer than such a file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .errors import SourceError
from .logs import Log
from .savedstate import check_owner, dump
from .statefile import mark_incomplete, read_header, set_aside, write
from .status import SavedStatus
from .store import Contents

QUIET_SECONDS = 0.3
LONGEST_WAIT_SECONDS = 10.0
"""So long after a change it is written though others keep coming."""
REST_PER_COST = 50.0
"""Writing takes 2 % of a processor at most."""
RETRY_SECONDS = (5.0, 300.0)


class Saver:
    """`read` gives all objects, from any thread; `live` says that they are what the source says now.

    A file that is found there and could not be used (damaged, another node's) is kept under another name.
    """

    def __init__(
        self,
        path: str,
        *,
        node: str,
        origin: str,
        read: Callable[[], Contents],
        live: threading.Event,
        log: Log,
    ) -> None:
        self._path = path
        self._node = node
        self._origin = origin
        self._read = read
        self._live = live
        self._log = log
        self._condition = threading.Condition()
        self._dirty = self._stopping = False
        self._first = True
        self._saved_at: float | None = None
        self._problem = ""
        self._pause = RETRY_SECONDS[0]
        self._thread = threading.Thread(target=self._run, name="saver", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def changed(self) -> None:
        """Something is not in the file; returns at once."""
        with self._condition:
            if not self._dirty:
                self._dirty = True
                self._condition.notify()

    def status(self) -> SavedStatus:
        """How it is doing, from any thread."""
        return SavedStatus(path=self._path, saved_at=self._saved_at, problem=self._problem)

    def stop(self, timeout: float = 5.0) -> None:
        """Write what is not written yet, and end."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        rest_until = 0.0
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._dirty or self._stopping)
                if not self._dirty:
                    return
            if not self._live.is_set():
                # What is in the file is better than what is known now.
                if self._stopped_within(0.2):
                    return
                continue
            self._mark()
            self._stopped_within(rest_until - time.monotonic())
            self._wait_for_quiet()
            rest_until = time.monotonic() + self._save()
            if self._stopping:
                return

    def _stopped_within(self, seconds: float) -> bool:
        with self._condition:
            return self._condition.wait_for(lambda: self._stopping, max(0.0, seconds))

    def _wait_for_quiet(self) -> None:
        end = time.monotonic() + LONGEST_WAIT_SECONDS
        while time.monotonic() < end:
            self._dirty = False
            if self._stopped_within(QUIET_SECONDS) or not self._dirty:
                return

    def _mark(self) -> None:
        try:
            if self._first:
                self._make_way()
                self._first = False
            mark_incomplete(self._path, self._node, self._origin)
        except OSError as error:
            if not self._problem:
                self._fail(error)

    def _make_way(self) -> None:
        """Before the first touch: what is there may be somebody's last good state, though not ours."""
        try:
            header = read_header(self._path)
            if header is not None:
                check_owner(header, self._path, self._node, self._origin)
        except SourceError as error:
            name = set_aside(self._path)
            self._log.warning("a saved state that cannot be used is kept", file=name, error=error)

    def _save(self) -> float:
        """Write; how long to rest then."""
        self._dirty = False
        cost = time.thread_time()
        try:
            now = time.time()
            data = dump(self._read(), node=self._node, origin=self._origin, saved_at=now)
            write(self._path, data)
        except Exception as error:  # noqa: BLE001  a full disk must not cost more than the file
            self._fail(error)
            self._dirty = True
            pause, self._pause = self._pause, min(2 * self._pause, RETRY_SECONDS[1])
            return pause
        if self._problem:
            self._log.info("the state can be saved again", file=self._path)
        self._problem, self._saved_at, self._pause = "", now, RETRY_SECONDS[0]
        return REST_PER_COST * (time.thread_time() - cost)

    def _fail(self, error: Exception) -> None:
        why = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
        if why != self._problem:
            self._log.error(
                "the state cannot be saved: a start without the API server will have to do with an older one",
                file=self._path,
                error=why,
            )
        self._problem = why
