"""A configuration that is followed while the proxy runs: read again when its files change, and when somebody asks.

A thread of its own: it waits for the kernel's word about the files' directories, and looks at the content now and then,
since not every file system gives it.

    files, request() --> read --> compare --> on_change(Difference, merged Loaded)
                          |
                          +--> refused: one log line an error; the configuration in force stays
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .config import Difference, FieldChange, Loaded, difference, fingerprint, merged
from .errors import ConfigError
from .logs import Log
from .options import RunOptions
from .sources.inotify import IN_CLOSE_WRITE, IN_MOVED_TO
from .sources.watches import CONTENTS, NAMES, Lookup, Watches, resolve
from .status import ConfigStatus

WATCHED_SECONDS = 10.0
"""Between two looks at the files' content while the kernel tells of changes: it does not for network file systems."""

POLL_SECONDS = 2.0
"""The same, where the kernel has no watch to give."""

SETTLE_SECONDS = 0.2
"""A content may be half written unless the kernel says that it is complete: it must be the same for so long first."""

_COMPLETE = IN_CLOSE_WRITE | IN_MOVED_TO

OnChange = Callable[[Difference, Loaded], None]


class Reloader:
    """Follows the configuration of a run.

    `on_change` is called on the reloader's thread with what differs from the configuration in force, and with the one
    that takes its place: the new one, but for the fields that need a restart.  If it raises, that is logged, and the
    new configuration counts as in force.
    """

    def __init__(
        self,
        options: RunOptions,
        on_change: OnChange,
        log: Log,
        *,
        watched_seconds: float = WATCHED_SECONDS,
        poll_seconds: float = POLL_SECONDS,
        watches: Callable[[], Watches] = Watches,
    ) -> None:
        self._options = options
        self._on_change = on_change
        self._log = log
        self._intervals = (watched_seconds, poll_seconds)
        self._make_watches = watches
        self._files = options.files
        self._seen = options.fingerprint
        self._in_force = options.config
        self._wanted = options.config
        self._status = ConfigStatus(loaded_at=time.time())
        self._watches: Watches | None = None
        self._lookups: frozenset[Lookup] = frozenset()
        self._stopped = False
        self._asked = False
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="configuration", daemon=True)

    def start(self) -> None:
        """Begin; what has changed since the options were made is noticed too."""
        self._thread.start()

    def request(self) -> None:
        """Read the files again, changed or not.  Never blocks; from any thread and any signal handler."""
        self._asked = True
        self._wake()

    def stop(self) -> None:
        """End the thread; a call of `on_change` that is under way is waited for, but not for ever.  Twice is once."""
        self._stopped = True
        self._wake()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=2.0)
        if not self._thread.is_alive():
            reader, writer = self._reader, self._writer
            self._reader = self._writer = -1
            for number in {reader, writer} - {-1}:
                os.close(number)

    def status(self) -> ConfigStatus:
        """The newest, an immutable value; from any thread."""
        return self._status

    def in_force(self) -> Loaded:
        """The configuration in force, an immutable value; from any thread."""
        return self._in_force

    # -- the thread ---------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._writer >= 0:
            with contextlib.suppress(BlockingIOError):  # full, so that the thread wakes anyway
                os.write(self._writer, b"!")

    def _run(self) -> None:
        self._open()
        try:
            self._look()
            while not self._stopped:
                told = self._wait()
                asked, self._asked = self._asked, False
                if self._stopped:
                    return
                if asked:
                    self._read()
                elif told is not None:
                    self._look(settle=not told)
        except Exception as error:  # noqa: BLE001  the proxy itself goes on
            self._log.exception("configuration is followed no more; a restart takes it up again", error)
            self._fail(f"is followed no more: {error}")
        finally:
            if self._watches is not None:
                self._watches.close()

    def _open(self) -> None:
        if not self._files:
            return
        try:
            self._watches = self._make_watches()
            self._follow()
        except OSError as error:
            self._poll_instead(error)

    def _poll_instead(self, error: OSError) -> None:
        self._log.warning(
            "no watch for the configuration's files; looking at them now and then",
            error=error,
            seconds=self._intervals[1],
        )
        if self._watches is not None:
            self._watches.close()
        self._watches = None

    def _follow(self, *, again: bool = False) -> None:
        """Watch every directory in which a name on the way to one of the files may come to stand for something else."""
        if self._watches is None:
            return
        for _ in range(3):
            wanted, self._lookups = ways(self._files)
            if self._watches.follow(wanted, again=again):
                return
            again = True

    def _wait(self) -> bool | None:
        """Until there may be something to see; True: complete, as the kernel says; None: there is not."""
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        watches = self._watches
        if watches is not None:
            poll.register(watches.fileno(), select.POLLIN)
        interval = self._intervals[watches is None] if self._files else None
        ready = {number for number, _ in poll.poll(None if interval is None else interval * 1000)}
        if self._reader in ready:
            os.read(self._reader, 4096)
        if watches is None or watches.fileno() not in ready:
            return None if ready else False
        changes = watches.read()
        ours = [entry for entry in changes.entries if (entry.directory, entry.name) in self._lookups]
        lost = bool(changes.lost or changes.overflow)
        if not ours and not lost:
            return None
        try:
            self._follow(again=lost)
        except OSError as error:
            self._poll_instead(error)
        return any(entry.mask & _COMPLETE for entry in ours)

    def _look(self, *, settle: bool = False) -> None:
        """Read the files if their content is another one than before."""
        now = fingerprint(self._files)
        while settle and now != self._seen and not self._stopped:
            time.sleep(SETTLE_SECONDS)
            before, now = now, fingerprint(self._files)
            settle = now != before
        if now != self._seen:
            self._read()

    # -- one look -----------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Take over what can be; whatever goes wrong, the configuration in force stays."""
        if self._options.reload is None:
            return
        self._seen = fingerprint(self._files)
        try:
            new = self._options.reload()
            said = difference(self._wanted, new)
            pending, next_ = difference(self._in_force, new), merged(self._in_force, new)
        except ConfigError as error:
            self._fail("; ".join(error.lines))
            for line in error.lines:
                self._log.error("configuration refused; the one in force stays", error=line)
            return
        except Exception as error:  # noqa: BLE001  a bug must not end what is followed
            self._fail(f"cannot be worked out: {error}")
            self._log.exception("configuration cannot be worked out; the one in force stays", error)
            return
        mended, known = bool(self._status.problem), self._wanted.warnings
        self._wanted, self._in_force = new, next_
        self._status = ConfigStatus(
            loaded_at=time.time(),
            refused_total=self._status.refused_total,
            needs_restart=pending.needs_restart,
        )
        for warning in new.warnings:
            if warning not in known:
                self._log.warning("configuration", warning=warning)
        for change in said.changes:
            self._say(change, pending)
        if mended:
            self._log.info("configuration can be read again")
        elif not said:
            self._log.debug("configuration read again; nothing changed")
        if not said:
            return
        try:
            self._on_change(pending, next_)
        except Exception as error:  # noqa: BLE001  whoever is told
            self._log.exception("a changed configuration could not be taken over", error)

    def _say(self, change: FieldChange, pending: Difference) -> None:
        """One line for a field, which says when it takes effect for a proxy with the configuration in force."""
        effects = {waiting.path: waiting.effect for waiting in pending.changes}
        effect = effects.get(change.path, "live" if change.effect == "live" else "in force")
        words = {
            "live": "at once",
            "restart": "needs a restart",
            "none": "none",
            "in force": "none: it is what is in force",
        }
        self._log.info(
            "configuration changed",
            field=change.path,
            old=change.old,
            new=change.new,
            origin=change.origin,
            effect=words[effect],
        )

    def _fail(self, problem: str) -> None:
        self._status = ConfigStatus(
            loaded_at=self._status.loaded_at,
            problem=problem,
            refused_total=self._status.refused_total + 1,
            needs_restart=self._status.needs_restart,
        )


def ways(files: Sequence[Path]) -> tuple[dict[str, int], frozenset[Lookup]]:
    """How the kernel comes to these files: directories with the events that matter there, and the names looked up.

    Semantics: a ConfigMap volume changes by the rename of a link `..data`, through which its files are links.
    """
    wanted: dict[str, int] = {}
    found: set[Lookup] = set()
    for file in files:
        lookups = resolve(os.path.join(os.getcwd(), file)).lookups
        found.update(lookups)
        for directory, _ in lookups:
            wanted.setdefault(directory, NAMES)
        if lookups:
            wanted[lookups[-1][0]] = CONTENTS
    return wanted, frozenset(found)
