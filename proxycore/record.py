"""Writing what any source delivers into a recording, the file that the source `recording` replays."""

from __future__ import annotations

import os
import stat
import threading
import time
from datetime import UTC, datetime
from types import TracebackType

from .errors import ProxyError, SourceError
from .source import Event, Sink, Source
from .sources.manifests import printable
from .sources.recording import event_line, header_line, read_header

STDOUT = "-"
_STOP_SECONDS = 5.0


class Recorder:
    """A sink that writes every event to a file as it comes; each put() is one write to the kernel.

    Nothing is buffered here, so that kill -9 costs the last line at most.  `forward` gets every event too.
    Raises SourceError when the file cannot be made, or holds something that is not a recording.
    """

    def __init__(self, path: str, *, source: str = "", forward: Sink | None = None) -> None:
        self._name = "stdout" if path == STDOUT else printable(path)
        self._forward = forward
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self.count = 0
        """Events written so far."""
        self._descriptor = _create(path)
        try:
            self._write(header_line(source, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")))
        except SourceError:
            self.close()
            raise

    def put(self, events: list[Event]) -> None:
        """Write events down; from any thread.

        Raises SourceError when the file takes no more (disk full, closed pipe): what it holds is complete but
        for its last line.
        """
        with self._lock:
            t = time.monotonic() - self._start
            self._write(b"".join(event_line(t, event) for event in events))
            self.count += len(events)
        if self._forward is not None:
            self._forward.put(events)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            raise SourceError(f"recording to {self._name} failed: {error.strerror}") from None

    def close(self) -> None:
        """Give back the file; twice does no harm."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _create(path: str) -> int:
    """A descriptor to write a recording to; an older recording is overwritten, anything else is not."""
    try:
        if path == STDOUT:
            return os.dup(1)
        status = os.stat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise SourceError(f"recording to {printable(path)} failed: {error.strerror}") from None
    else:
        if stat.S_ISREG(status.st_mode) and status.st_size:
            try:
                read_header(path)
            except SourceError as error:
                raise SourceError(f"will not be overwritten: {error}") from None
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise SourceError(f"recording to {printable(path)} failed: {error.strerror}") from None


def record(
    source: Source, path: str, stop: threading.Event, *, name: str = "", forward: Sink | None = None
) -> int:
    """Record a source until `stop` is set or the source ends; how many events were written.

    `path` may be `-`, standard output.  `name` says in the header what was recorded.
    Raises SourceError when the source fails or the file takes no more; what was written stays.
    """
    failure: list[ProxyError] = []
    with Recorder(path, source=name, forward=forward) as recorder:

        def run() -> None:
            try:
                source.run(recorder)
            except ProxyError as error:
                failure.append(error)

        thread = threading.Thread(target=run, name="source", daemon=True)
        thread.start()
        while thread.is_alive() and not stop.wait(0.05):
            pass
        source.stop()
        thread.join(_STOP_SECONDS)
        if thread.is_alive():
            raise SourceError(f"the source did not stop within {_STOP_SECONDS:.0f} seconds")
        if failure:
            raise failure[0]
        return recorder.count
