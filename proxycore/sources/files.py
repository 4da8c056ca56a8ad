"""The source `file:PATH`: manifests in a folder, or one file, followed live.

    inotify -> which files -> read and parse those -> what they say together -> events

A file is read when a writer has closed it or a rename has put it into place, not while it is being written.
A file that vanishes is held for a moment: editors and `git checkout` take files away before they write them anew,
and whoever deletes the whole folder deletes its files first.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import threading
import time
from collections.abc import Iterable, Sequence

from ..errors import ProxyError, SourceError
from ..hookspecs import hookimpl
from ..source import Health, Sink, Source, SourceContext, Synced, Trouble
from .folder import MISSING, Folder, is_manifest
from .inotify import IN_ATTRIB, IN_CLOSE_WRITE, IN_DELETE, IN_ISDIR, IN_MOVED_FROM, IN_MOVED_TO
from .manifests import Manifest, ManifestSet, News, event_of, printable
from .watches import Change, Changes, Lookup, Watches

GRACE_SECONDS = 0.05
"""How long a file must be gone before its objects go."""
MAX_GRACE_SECONDS = 0.5
"""The same while ever more files vanish."""
POLL_SECONDS = 1.0
"""How often everything is looked at when the kernel cannot tell us."""
PORTION = 500
"""Events that are delivered together at the start."""
_SETTLE_TRIES = 10


class FileSource:
    """Delivers what the manifests say, then their changes, until stopped; `argument` need not exist yet.

    Nothing is Synced before the folder has been read once.
    """

    def __init__(self, argument: str) -> None:
        self._stopped = threading.Event()
        self._folder = Folder(argument, self._stopped)
        self._manifests = ManifestSet()
        self._watches: Watches | None = None
        self._dependents: dict[Lookup, set[str]] = {}
        self._lost: dict[str, int] = {}
        self._lost_since = 0.0
        self._lost_due: float | None = None
        self._look_due: float | None = None
        self._troubles: dict[str, str] = {}
        self._blind = ""
        self._checking = False
        self._synced = False
        self._synced_told = False
        self._stale = False
        self._lock = threading.Lock()
        self._wake = -1

    def stop(self) -> None:
        """End run(); see `Source.stop`."""
        with self._lock:
            self._stopped.set()
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def run(self, sink: Sink) -> None:
        """Deliver until stop(); see `Source.run`."""
        with self._lock:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._deliver(sink, self._scan(settled=True))
            while not self._stopped.is_set():
                self._deliver(sink, self._step())
        except ProxyError:
            raise
        except Exception as error:
            name = printable(self._folder.argument)
            raise SourceError(f"file:{name} cannot be followed: {type(error).__name__}: {error}") from error
        finally:
            self._close()

    def _close(self) -> None:
        with self._lock:
            os.close(self._wake)
            self._wake = -1
        if self._watches is not None:
            self._watches.close()
            self._watches = None

    def _deliver(self, sink: Sink, events: Sequence[News]) -> None:
        """Hand over together what happened together.

        Once Synced is told each delivery may be programmed as it stands: cut in two, it would show a slice that was
        renamed as gone.  Before, portions keep few objects unpacked at a time.
        """
        portion = len(events) if self._synced_told else PORTION
        for start in range(0, len(events), portion or 1):
            if self._stopped.is_set():
                return
            sink.put([event_of(news) for news in events[start : start + portion]])
        self._synced_told = self._synced

    def _step(self) -> list[News]:
        """Wait for something to happen, or to fall due, and take it in."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if self._watches is not None:
            poll.register(self._watches.fileno(), select.POLLIN)
        due = [at for at in (self._lost_due, self._look_due) if at is not None]
        timeout = max(0.0, min(due) - time.monotonic()) * 1000 if due else None
        poll.poll(timeout)
        if self._stopped.is_set():
            return []
        events = self._take_in(self._watches.read()) if self._watches is not None else []
        now = time.monotonic()
        if self._look_due is not None and now >= self._look_due:
            events += self._look()
        if self._lost_due is not None and now >= self._lost_due:
            events += self._give_up_lost()
        return events

    def _look(self) -> list[News]:
        back = self._checking and self._watches is not None and not self._folder.locate()
        if back and self._folder.directory is None:
            # It is there again, and being written: read it when that is done, or has taken too long.
            self._checking = False
            self._look_due = time.monotonic() + POLL_SECONDS
            return []
        return self._scan(settled=True)

    def _take_in(self, changes: Changes) -> list[News]:
        """What a batch of inotify events amounts to."""
        root = set(self._folder.root.lookups)
        settled = [change for change in changes.entries if self._is_settled(change)]
        if changes.overflow or changes.lost or any((c.directory, c.name) in root for c in settled):
            return self._scan()
        touched: dict[str, None] = {}
        renamed: list[str] = []
        for change in settled:
            for key in self._dependents.get((change.directory, change.name), ()):
                touched[key] = None
            if change.directory == self._folder.directory and is_manifest(change.name):
                self._note(change, touched, renamed)
        return self._read(touched, renamed) if touched or renamed else []

    def _is_settled(self, change: Change) -> bool:
        """Is what the event speaks of complete, rather than about to be written?"""
        if change.mask & (IN_ISDIR | IN_CLOSE_WRITE | IN_MOVED_TO | IN_MOVED_FROM | IN_DELETE):
            return True
        if change.mask & IN_ATTRIB:
            seen = self._folder.seen.get(self._folder.key(change.name))
            return self._folder.directory is None or (seen is not None and seen.digest is None)
        try:
            status = os.lstat(os.path.join(change.directory, change.name))
        except OSError:
            return False
        return stat.S_ISLNK(status.st_mode) or status.st_nlink > 1

    def _note(self, change: Change, touched: dict[str, None], renamed: list[str]) -> None:
        """Sort one event about a file into those to be read, those renamed, and those lost."""
        key = self._folder.key(change.name)
        if change.mask & (IN_DELETE | IN_MOVED_FROM):
            touched.pop(key, None)
            if key in self._folder.seen:
                self._lose(key, change.cookie)
            return
        touched[key] = None
        if change.mask & IN_MOVED_TO:
            for lost, cookie in list(self._lost.items()):
                if cookie == change.cookie and lost != key:
                    del self._lost[lost]
                    renamed.append(lost)

    def _lose(self, key: str, cookie: int = 0) -> None:
        """A file is not there: give it a moment to come back."""
        now = time.monotonic()
        if not self._lost:
            self._lost_since = now
        self._lost[key] = cookie
        self._lost_due = min(now + GRACE_SECONDS, self._lost_since + MAX_GRACE_SECONDS)

    def _give_up_lost(self) -> list[News]:
        gone = [key for key in self._lost if not self._folder.exists(key)]
        self._lost.clear()
        self._lost_due = None
        return self._read((), gone)

    def _read(self, keys: Iterable[str], gone: Iterable[str] = ()) -> list[News]:
        """Read files and drop others; the events that follow from all of it together."""
        folder = self._folder
        updates: dict[str, Manifest | None] = {}
        for key in gone:
            if not folder.exists(key):
                folder.seen.pop(key, None)
                updates[key] = None
        for key in self._present(keys):
            if self._stopped.is_set():
                return []
            self._lost.pop(key, None)
            manifest = folder.read(key)
            if manifest is not None:
                updates[key] = manifest
        return self._manifests.news(updates)

    def _present(self, keys: Iterable[str]) -> list[str]:
        """Those of the files that are there; where they are links, everything on the way is watched by now."""
        folder = self._folder
        keys = list(keys)
        for _ in range(_SETTLE_TRIES):
            before = {key: folder.links.get(key) for key in keys}
            present = [key for key in keys if folder.exists(key)]
            if all(folder.links.get(key) == link for key, link in before.items()):
                break
            self._dependents = folder.dependents()
            self._follow()
        for key in before.keys() - set(present):
            if key in folder.seen:
                self._lose(key)
        return present

    def _scan(self, *, settled: bool = False) -> list[News]:
        """Look at everything anew: where the argument leads, which files there are, which of them changed.

        `settled`: what is missing now has been missing for a moment.
        """
        self._look_due = None
        self._checking = False
        reason = self._locate()
        keys: list[str] = []
        if not reason:
            try:
                keys = self._folder.list()
            except OSError as error:
                reason = f"cannot be listed: {error.strerror}"
        if reason:
            return self._miss(reason, settled) + self._tell_blindness()
        self._dependents = self._folder.dependents()
        self._follow()
        for key in sorted(self._folder.seen.keys() - set(keys)):
            if key not in self._lost:
                self._lose(key)
        events = self._read([key for key in keys if key in self._lost or not self._folder.unchanged(key)])
        if self._stopped.is_set():
            return []
        return events + self._found() + self._tell_blindness()

    def _locate(self) -> str:
        """Find the folder and watch the way to it; why it cannot be had, else empty."""
        if self._watches is None:
            self._open_watches()
        folder = self._folder
        folder.links.clear()
        for _ in range(_SETTLE_TRIES):
            reason = folder.locate()
            root = folder.root
            complete = self._follow(again=True)
            if complete and folder.locate() == reason and folder.root == root:
                break
        else:
            self._look_due = time.monotonic() + POLL_SECONDS
        return reason

    def _open_watches(self) -> None:
        try:
            self._watches = Watches()
        except OSError as error:
            self._blind = _blindness(error)
        else:
            self._blind = ""

    def _follow(self, *, again: bool = False) -> bool:
        """Watch what has to be watched; without inotify everything is looked at once a second."""
        if self._watches is None:
            return True
        try:
            return self._watches.follow(self._folder.wanted(), again=again)
        except OSError as error:
            self._blind = _blindness(error)
            self._watches.close()
            self._watches = None
            return True

    def _tell_blindness(self) -> list[News]:
        if self._blind:
            self._look_due = time.monotonic() + POLL_SECONDS
        return self._say("inotify", self._blind)

    def _say(self, subject: str, reason: str) -> list[News]:
        """Trouble of the source itself, if that is news."""
        if self._troubles.get(subject, "") == reason:
            return []
        self._troubles[subject] = reason
        return [Trouble(subject, reason)]

    def _found(self) -> list[News]:
        """The folder is there and has been read."""
        events = self._say(printable(self._folder.argument), "")
        if not self._synced:
            events.append(Synced())
        if not self._synced or self._stale:
            events.append(Health("live"))
        self._synced = True
        self._stale = False
        return events

    def _miss(self, reason: str, settled: bool) -> list[News]:
        """The folder is not there, or cannot be read: what was delivered stays in force."""
        self._lost.clear()
        self._lost_due = None
        self._dependents = {}
        if not settled and not self._stale:
            self._checking = True
            self._look_due = time.monotonic() + GRACE_SECONDS
            return []
        if reason != MISSING:
            self._look_due = time.monotonic() + POLL_SECONDS
        name = printable(self._folder.argument)
        hold = (
            "what it last said stays in force"
            if self._synced
            else "nothing is programmed before it can be read"
        )
        events = self._say(name, f"{reason}; {hold}")
        if not self._stale:
            self._stale = True
            events.append(Health("stale", f"{name} {reason}"))
        return events


def _blindness(error: OSError) -> str:
    """Why inotify does not serve, and what to do."""
    knob = {errno.EMFILE: "max_user_instances", errno.ENOSPC: "max_user_watches"}.get(error.errno or 0)
    cure = f" (raise the sysctl fs.inotify.{knob})" if knob else ""
    return f"cannot be used: {error.strerror}{cure}; files are looked at every second instead"


class FilesPlugin:
    """The plugin object of the source `file`."""

    @hookimpl
    def proxycore_source_open(self, context: SourceContext) -> Source:
        """Manifests in the folder, or the file, that the argument names.

        Raises SourceError when the argument cannot be a path; one that does not exist yet is waited for.
        """
        if not context.argument or "\0" in context.argument:
            raise SourceError("source file needs a folder or a file: --source file:DIR")
        return FileSource(context.argument)


def plugin() -> FilesPlugin:
    """Entry point of `file`."""
    return FilesPlugin()
