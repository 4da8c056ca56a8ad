"""The source `recording:FILE`, and the format that it reads.

A recording is JSON, one value a line.  The first line is the header, `{"proxycoreRecording": 1, ...}`; every other
one an event, `{"t": 0.25, "event": "applied", "object": {...}}`, `t` being seconds since the recording began.
Events that came together have the same `t` and are delivered together.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Annotated, BinaryIO, Literal, NamedTuple

import msgspec

from ..decode import NAMESPACED, decode_bytes, encode
from ..errors import DecodeError, ProxyError, SourceError
from ..hookspecs import hookimpl
from ..objects import API_VERSIONS, Kind
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
from .manifests import printable

VERSION = 1
MAX_LINE_BYTES = 256 << 20
"""A line may hold every object of one kind."""

_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Header(msgspec.Struct, frozen=True, rename="camel"):
    """First line of a recording.  `source` is what was recorded, `started_at` when, in UTC."""

    proxycore_recording: int
    source: str = ""
    started_at: str = ""


class _Line(msgspec.Struct, frozen=True, tag_field="event"):
    t: _Seconds


class _Applied(_Line, frozen=True, tag="applied"):
    object: msgspec.Raw


class _Deleted(_Line, frozen=True, tag="deleted"):
    object: msgspec.Raw


class _Replaced(_Line, frozen=True, tag="replaced"):
    kind: Kind
    objects: list[msgspec.Raw]


class _Listed(_Line, frozen=True, tag="listed"):
    kind: Kind
    names: list[tuple[str, str]]


class _Synced(_Line, frozen=True, tag="synced"):
    pass


class _Trouble(_Line, frozen=True, tag="trouble"):
    subject: str
    reason: str


class _Health(_Line, frozen=True, tag="health"):
    state: Literal["live", "stale", "ended", "failed"]
    reason: str = ""


_ENCODER = msgspec.json.Encoder()
_HEADER = msgspec.json.Decoder(Header)
_LINE = msgspec.json.Decoder(_Applied | _Deleted | _Replaced | _Listed | _Synced | _Trouble | _Health)


class Timed(NamedTuple):
    """An event and when it came, in seconds since the recording began."""

    t: float
    event: Event


def header_line(source: str, started_at: str) -> bytes:
    """The first line of a recording."""
    return _ENCODER.encode(Header(VERSION, _text(source), started_at)) + b"\n"


def event_line(t: float, event: Event) -> bytes:
    """The line of one event."""
    return _ENCODER.encode(_line(round(t, 6), event)) + b"\n"


def _line(t: float, event: Event) -> _Line:
    match event:
        case Applied(item):
            return _Applied(t, msgspec.Raw(encode(item)))
        case Deleted(kind, namespace, name):
            metadata = {"name": name, "namespace": namespace} if namespace else {"name": name}
            return _Deleted(
                t,
                msgspec.Raw(
                    _ENCODER.encode({"apiVersion": API_VERSIONS[kind], "kind": kind, "metadata": metadata})
                ),
            )
        case Replaced(kind, items):
            return _Replaced(t, kind, [msgspec.Raw(encode(item)) for item in items])
        case Listed(kind, names):
            return _Listed(t, kind, sorted(names))
        case Synced():
            return _Synced(t)
        case Trouble(subject, reason):
            return _Trouble(t, _text(subject), _text(reason))
        case Health(state, reason, _):
            return _Health(t, state, _text(reason))


def _text(text: str) -> str:
    """What JSON can hold of a text: file names need not be Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


class _ReferenceMetadata(msgspec.Struct):
    name: str
    namespace: str = ""


class _Reference(msgspec.Struct):
    """Of a deleted object, what says which one it was."""

    kind: Kind
    metadata: _ReferenceMetadata


class _Typed(msgspec.Struct):
    kind: Kind


_REFERENCE = msgspec.json.Decoder(_Reference)
_TYPED = msgspec.json.Decoder(_Typed)


def _event(line: _Line) -> Event:
    """Raises DecodeError, or msgspec's error, for an object that cannot be understood."""
    match line:
        case _Applied(object=raw):
            return Applied(decode_bytes(_TYPED.decode(raw).kind, raw))
        case _Deleted(object=raw):
            reference = _REFERENCE.decode(raw)
            namespace = ""
            if reference.kind in NAMESPACED:
                namespace = reference.metadata.namespace or "default"
            return Deleted(reference.kind, namespace, reference.metadata.name)
        case _Replaced(kind=kind, objects=objects):
            return Replaced(kind, tuple(decode_bytes(kind, raw) for raw in objects))
        case _Listed(kind=kind, names=names):
            return Listed(kind, frozenset(names))
        case _Trouble(subject=subject, reason=reason):
            return Trouble(subject, reason)
        case _Health(state=state, reason=reason):
            return Health(state, reason)
        case _:
            return Synced()


def read_header(path: str) -> Header:
    """The header of a recording.  Raises SourceError naming file and line when it is none that we can read."""
    with _opened(path) as file:
        return _header(path, file)


def read_recording(path: str) -> Iterator[Timed]:
    """Every event of a recording, in its order.

    An event whose object cannot be understood, and a last line that was cut short, come as Trouble.
    Raises SourceError naming file and line: what stands from there on cannot be trusted.
    """
    name = printable(path)
    with _opened(path) as file:
        _header(path, file)
        number, t = 1, 0.0
        while data := file.readline(MAX_LINE_BYTES):
            number += 1
            where = f"{name}:{number}"
            try:
                line = _LINE.decode(data)
            except (msgspec.DecodeError, ValueError, RecursionError) as error:
                if data.endswith(b"\n") or len(data) == MAX_LINE_BYTES:
                    raise SourceError(f"{where}: is not an event of a recording: {error}") from None
                yield Timed(t, Trouble(where, "the last line was cut short and is left out"))
                return
            t = max(t, line.t)
            try:
                yield Timed(t, _event(line))
            except DecodeError as error:
                yield Timed(t, Trouble(where, str(error)))
            except (msgspec.DecodeError, ValueError) as error:
                yield Timed(t, Trouble(where, f"object: {error}"))


def _opened(path: str) -> BinaryIO:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"{printable(path)}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SourceError(f"{printable(path)}: is not a regular file")
    return open(descriptor, "rb")


def _header(path: str, file: BinaryIO) -> Header:
    where = f"{printable(path)}:1"
    data = file.readline(1 << 20)
    if not data:
        raise SourceError(f"{where}: the file is empty; a recording begins with its header")
    try:
        header = _HEADER.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise SourceError(
            f'{where}: is not a recording: the first line must be {{"proxycoreRecording": {VERSION}, ...}}'
        ) from None
    if header.proxycore_recording != VERSION:
        raise SourceError(
            f"{where}: is a recording of version {header.proxycore_recording}; this proxycore reads version {VERSION}"
        )
    return header


def _moments(timed: Iterable[Timed]) -> Iterator[tuple[float, list[Event]]]:
    """Events of the same moment together; those before a failure come before it is raised."""
    together: list[Event] = []
    at = 0.0
    try:
        for t, event in timed:
            if together and t != at:
                yield at, together
                together = []
            at = t
            together.append(event)
    except SourceError:
        if together:
            yield at, together
        raise
    if together:
        yield at, together


class RecordingSource:
    """Replays a recording: at once, or `pace` times as fast as it was, then ends.

    A recording that was cut before its source was synced ends without Synced, as the source did.
    """

    def __init__(self, path: str, pace: float | None = None) -> None:
        self._path = path
        self._pace = pace
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End run(); see `Source.stop`."""
        self._stopped.set()

    def run(self, sink: Sink) -> None:
        """Deliver to the end or until stop(); see `Source.run`."""
        try:
            self._replay(sink)
        except ProxyError:
            raise
        except Exception as error:
            name = printable(self._path)
            raise SourceError(f"{name}: cannot be replayed: {type(error).__name__}: {error}") from error

    def _replay(self, sink: Sink) -> None:
        name = printable(self._path)
        start = time.monotonic()
        synced = False
        last: Event | None = None
        for t, events in _moments(read_recording(self._path)):
            delay = start + t / self._pace - time.monotonic() if self._pace else 0.0
            if self._stopped.wait(delay) if delay > 0 else self._stopped.is_set():
                return
            sink.put(events)
            last = events[-1]
            synced = synced or any(isinstance(event, Synced) for event in events)
        closing: list[Event] = []
        if not synced:
            closing.append(Trouble(name, "ends before its source was synced; nothing of it is programmed"))
        if not (isinstance(last, Health) and last.state == "ended"):
            closing.append(Health("ended", f"the recording {name} is over"))
        if closing:
            sink.put(closing)


class RecordingPlugin:
    """The plugin object of the source `recording`."""

    @hookimpl
    def proxycore_source_open(self, context: SourceContext) -> Source:
        """A replay of the file that the argument names, at the pace of the context.

        Raises SourceError when it cannot be read, is no recording, or the pace is not above 0.
        """
        if not context.argument or "\0" in context.argument:
            raise SourceError("source recording needs a file: --source recording:FILE")
        if context.pace is not None and not context.pace > 0:
            raise SourceError(f"the pace of a recording must be above 0, not {context.pace}")
        read_header(context.argument)
        return RecordingSource(context.argument, context.pace)


def plugin() -> RecordingPlugin:
    """Entry point of `recording`."""
    return RecordingPlugin()
