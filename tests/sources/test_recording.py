"""Recordings: written, cut, foreign, replayed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxycore.errors import SourceError
from proxycore.objects import (
    ClientIPConfig,
    EndpointSlice,
    Metadata,
    Node,
    Service,
    ServiceCIDR,
    ServicePort,
    ServiceSpec,
    SessionAffinityConfig,
    SliceEndpoint,
    SlicePort,
)
from proxycore.record import Recorder, record
from proxycore.source import (
    Applied,
    Deleted,
    Health,
    Listed,
    Replaced,
    SourceContext,
    Synced,
    Trouble,
)
from proxycore.sources.files import FileSource
from proxycore.sources.recording import (
    RecordingSource,
    event_line,
    header_line,
    plugin,
    read_header,
    read_recording,
)

HEADER = b'{"proxycoreRecording": 1}\n'
SYNCED = b'{"t": 0, "event": "synced"}\n'
PAST = [Applied(Service(Metadata("a", "default"))), Synced()]


def write(path, *lines):
    path.write_bytes(b"".join(lines))
    return str(path)


def events_of(path):
    return [event for _, event in read_recording(str(path))]


def open_source(argument, pace=None):
    context = SourceContext(argument=str(argument), node_name="n", pace=pace)
    return plugin().proxycore_source_open(context=context)


# What a source can deliver: names and texts are any Unicode, numbers within the API's limits.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
PORT = st.integers(1, 65535)
LABELS = st.none() | st.dictionaries(TEXT, TEXT, max_size=2)
NAMESPACED = st.builds(Metadata, NAME, NAME, LABELS, LABELS, st.none() | TEXT)
CLUSTER_SCOPED = st.builds(Metadata, NAME, st.just(""), LABELS)
SLICES = st.builds(
    EndpointSlice,
    NAMESPACED,
    st.sampled_from(["IPv4", "IPv6", "FQDN"]),
    st.none()
    | st.lists(st.builds(SliceEndpoint, st.none() | st.lists(TEXT).map(tuple)), max_size=2).map(tuple),
    st.none() | st.lists(st.builds(SlicePort, st.none() | TEXT, st.none(), st.none() | PORT)).map(tuple),
)
TEXTS = st.none() | st.lists(TEXT, max_size=2).map(tuple)
PORTS = st.builds(
    ServicePort,
    PORT,
    st.none() | TEXT,
    st.sampled_from([None, "TCP", "UDP", "SCTP"]),
    st.none() | st.just(0) | PORT,
)
AFFINITY = st.builds(
    SessionAffinityConfig, st.none() | st.builds(ClientIPConfig, st.none() | st.integers(1, 86400))
)
SPECS = st.builds(
    ServiceSpec,
    type=st.none() | TEXT,
    cluster_ip=st.none() | TEXT,
    cluster_ips=TEXTS,
    ports=st.none() | st.lists(PORTS, max_size=2).map(tuple),
    external_ips=TEXTS,
    health_check_node_port=st.none() | PORT,
    session_affinity_config=st.none() | AFFINITY,
)
SERVICES = st.builds(Service, NAMESPACED, st.none() | SPECS)
NODES = st.builds(Node, CLUSTER_SCOPED)
CIDRS = st.builds(ServiceCIDR, CLUSTER_SCOPED)
EVENTS = st.one_of(
    st.builds(Applied, SERVICES | SLICES | NODES | CIDRS),
    st.builds(Deleted, st.sampled_from(["Service", "EndpointSlice"]), NAME, NAME),
    st.builds(Deleted, st.sampled_from(["Node", "ServiceCIDR"]), st.just(""), NAME),
    st.builds(Replaced, st.just("Service"), st.lists(SERVICES, max_size=3).map(tuple)),
    st.builds(Replaced, st.just("Node"), st.lists(NODES, max_size=3).map(tuple)),
    st.builds(Listed, st.sampled_from(["Service", "Node"]), st.frozensets(st.tuples(NAME, NAME), max_size=3)),
    st.just(Synced()),
    st.builds(Trouble, TEXT, TEXT),
    st.builds(Health, st.sampled_from(["live", "stale", "ended"]), TEXT),
)


@settings(max_examples=150, deadline=None)
@given(batches=st.lists(st.lists(EVENTS, min_size=1, max_size=4), max_size=5), source=TEXT)
def test_what_is_recorded_is_what_is_replayed(tmp_path_factory, batches, source):
    path = str(tmp_path_factory.getbasetemp() / "round-trip.jsonl")
    with Recorder(path, source=source) as recorder:
        for batch in batches:
            recorder.put(batch)
    assert read_header(path).source == source
    assert events_of(path) == [event for batch in batches for event in batch]
    assert recorder.count == sum(map(len, batches))


def test_lines_are_api_json(tmp_path):
    path = tmp_path / "r"
    with Recorder(str(path), source="file:x") as recorder:
        recorder.put([Applied(Service(Metadata("a\n", "default"))), Deleted("Node", "", "n")])
    header, applied, deleted = map(json.loads, path.read_text().splitlines())
    assert header["proxycoreRecording"] == 1
    assert header["source"] == "file:x"
    assert applied.pop("t") == deleted.pop("t") >= 0
    assert applied == {
        "event": "applied",
        "object": {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "a\n", "namespace": "default"},
        },
    }
    assert deleted == {
        "event": "deleted",
        "object": {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"}},
    }


def test_texts_that_are_not_unicode_are_escaped(tmp_path):
    with Recorder(str(tmp_path / "r"), source="file:\udcff") as recorder:
        recorder.put([Trouble("\udcff", "x")])
    assert events_of(tmp_path / "r") == [Trouble("\\udcff", "x")]


def test_every_cut_of_a_recording_is_a_recording(tmp_path):
    """kill -9 and full disks cut anywhere: all whole lines are replayed, and the cut is told."""
    events = [Applied(Service(Metadata("ä", "default"))), Synced(), Deleted("Service", "default", "ä")]
    header = header_line("x", "now")
    lines = [event_line(0.5, event) for event in events]
    whole = header + b"".join(lines)
    path = tmp_path / "r"
    for size in range(len(header), len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = 0
        while complete < 3 and len(header) + sum(map(len, lines[: complete + 1])) - 1 <= size:
            complete += 1
        rest = size - len(header) - sum(map(len, lines[:complete]))
        cut = (
            [Trouble(f"{path}:{complete + 2}", "the last line was cut short and is left out")]
            if rest > 0
            else []
        )
        assert events_of(path) == events[:complete] + cut, size
    for size in range(len(header) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(SourceError, match=":1: "):
            events_of(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "r:1: the file is empty"),
        (b"apiVersion: v1\n", "r:1: is not a recording"),
        (b"{}\n", "r:1: is not a recording"),
        (b"[]\n", "r:1: is not a recording"),
        (b'{"proxycoreRecording": "1"}\n', "r:1: is not a recording"),
        (b"\x00\xff" * 100, "r:1: is not a recording"),
        (b'{"proxycoreRecording": 2}\n', "r:1: is a recording of version 2; this proxycore reads version 1"),
    ],
)
def test_foreign_files_and_versions_are_refused(tmp_path, content, message):
    path = write(tmp_path / "r", content)
    with pytest.raises(SourceError) as caught:
        open_source(path)
    assert message in str(caught.value)
    assert path in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(SourceError, match="No such file"):
        open_source(tmp_path / "missing")
    with pytest.raises(SourceError, match="not a regular file"):
        open_source(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SourceError, match="not a regular file"):
        open_source(tmp_path / "fifo")


@pytest.mark.parametrize("argument", ["", "a\0b"])
def test_arguments_that_cannot_be_a_path(argument):
    with pytest.raises(SourceError):
        open_source(argument)


@pytest.mark.parametrize("pace", [0, -1.0, float("nan")])
def test_pace_must_be_above_zero(tmp_path, pace):
    with pytest.raises(SourceError, match="pace"):
        open_source(write(tmp_path / "r", HEADER), pace)


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense\n",
        b"\n",
        b'{"t": 0, "event": "exploded"}\n',
        b'{"event": "synced"}\n',
        b'{"t": -1, "event": "synced"}\n',
    ],
)
def test_a_damaged_line_ends_the_replay_by_name(tmp_path, line, sink):
    path = write(tmp_path / "r", HEADER, SYNCED, line, SYNCED)
    with pytest.raises(SourceError, match=r"r:3: is not an event of a recording"):
        open_source(path).run(sink)
    assert sink.events == [Synced()]


def test_an_object_that_cannot_be_understood_is_trouble(tmp_path, sink):
    bad = b'{"t":0,"event":"applied","object":{"kind":"Service","metadata":{"name":"a"},"spec":{"ports":[{"port":"x"}]}}}\n'
    odd = b'{"t":0,"event":"applied","object":{"kind":"Pod","metadata":{"name":"a"}}}\n'
    path = write(tmp_path / "r", HEADER, bad, odd, SYNCED)
    open_source(path).run(sink)
    assert sink.troubles[f"{path}:2"] == "Service default/a: spec.ports[0].port: expected `int`, got `str`"
    assert "Pod" in sink.troubles[f"{path}:3"]
    assert sink.synced


def test_events_of_one_moment_are_delivered_together_then_the_end_is_told(tmp_path, sink):
    path = str(tmp_path / "r")
    one, two = PAST[0], Deleted("Service", "default", "a")
    write(
        tmp_path / "r", HEADER, *(event_line(t, event) for t, event in ((0, one), (0, Synced()), (9e9, two)))
    )
    open_source(path).run(sink)
    assert sink.batches == [[one, Synced()], [two], [Health("ended", f"the recording {path} is over")]]


def test_a_recording_without_synced_says_so(tmp_path, sink):
    path = write(tmp_path / "r", HEADER, event_line(0, PAST[0]))
    open_source(path).run(sink)
    assert not sink.synced
    assert "before its source was synced" in sink.troubles[path]


def test_an_ended_source_ends_once(tmp_path, sink):
    ended = Health("ended", "before")
    path = write(tmp_path / "r", HEADER, SYNCED, event_line(0, ended))
    open_source(path).run(sink)
    assert sink.events == [Synced(), ended]


class Clock:
    """Stands in for time and for waiting on the stop event."""

    def __init__(self):
        self.now = 100.0

    def wait(self, seconds):
        self.now += seconds
        return False


@pytest.mark.parametrize(
    ("pace", "at"), [(1.0, [0.0, 1.5, 4.0]), (10.0, [0.0, 0.15, 0.4]), (None, [0.0] * 3)]
)
def test_pace(tmp_path, monkeypatch, pace, at):
    path = write(tmp_path / "r", HEADER, *(event_line(t, Synced()) for t in (0, 1.5, 4)))
    clock, seen = Clock(), []
    source = RecordingSource(path, pace)
    monkeypatch.setattr("proxycore.sources.recording.time.monotonic", lambda: clock.now)
    monkeypatch.setattr(source._stopped, "wait", clock.wait)

    class Timing:
        def put(self, events):
            seen.extend(clock.now - 100.0 for event in events if isinstance(event, Synced))

    source.run(Timing())
    assert seen == pytest.approx(at)


def test_stop_ends_the_longest_pause(tmp_path, sink):
    path = write(tmp_path / "r", HEADER, SYNCED, event_line(1e6, Synced()))
    source = open_source(path, 1.0)
    thread = threading.Thread(target=source.run, args=(sink,), daemon=True)
    thread.start()
    sink.until(lambda s: s.synced)
    source.stop()
    thread.join(20)
    assert not thread.is_alive()
    assert sink.events == [Synced()]


def test_stop_before_run(tmp_path, sink):
    source = open_source(write(tmp_path / "r", HEADER, SYNCED))
    source.stop()
    source.stop()
    source.run(sink)
    assert sink.events == []


def test_record_follows_a_source_until_stopped(tmp_path, sink, service):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.yaml").write_text(service("a"))
    stop, path, counts = threading.Event(), str(tmp_path / "r"), []
    thread = threading.Thread(
        target=lambda: counts.append(
            record(FileSource(str(folder)), path, stop, name=f"file:{folder}", forward=sink)
        )
    )
    thread.start()
    sink.until(lambda s: s.synced)
    (folder / "b.yaml").write_text(service("b"))
    sink.until(lambda s: s.names == {"a", "b"})
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert counts == [len(sink.events)]
    assert events_of(path) == sink.events
    assert read_header(path).source == f"file:{folder}"


def test_record_ends_with_a_finite_source(tmp_path):
    first = write(tmp_path / "r", HEADER, *(event_line(0, event) for event in PAST))
    assert record(open_source(first), str(tmp_path / "copy"), threading.Event()) == 3
    assert events_of(tmp_path / "copy")[:2] == PAST


def test_record_tells_the_failure_of_its_source(tmp_path):
    source = open_source(write(tmp_path / "r", HEADER, SYNCED, b"x\n"))
    with pytest.raises(SourceError, match="r:3"):
        record(source, str(tmp_path / "copy"), threading.Event())
    assert events_of(tmp_path / "copy") == [Synced()]


def test_only_recordings_are_overwritten(tmp_path):
    path = tmp_path / "precious"
    path.write_text("apiVersion: v1\n")
    with pytest.raises(SourceError, match="will not be overwritten"):
        Recorder(str(path))
    assert path.read_text() == "apiVersion: v1\n"
    path.write_bytes(HEADER + SYNCED)
    Recorder(str(path)).close()
    assert events_of(path) == []
    with pytest.raises(SourceError, match="No such file or directory"):
        Recorder(str(tmp_path / "no" / "where"))


def test_full_disk_is_a_source_error():
    with pytest.raises(SourceError, match="/dev/full failed: No space left"):
        Recorder("/dev/full")


CHILD = """
import os, sys
from proxycore.record import Recorder
from proxycore.source import Synced, Trouble
recorder = Recorder(sys.argv[1])
recorder.put([Synced()])
for number in range(int(sys.argv[2])):
    recorder.put([Trouble("x", "y" * 1000)])
if sys.argv[2] == "3":
    os.kill(os.getpid(), 9)
"""


def test_killed_recorder_leaves_all_it_was_given(tmp_path):
    path = str(tmp_path / "r")
    result = subprocess.run([sys.executable, "-c", CHILD, path, "3"], check=False)
    assert result.returncode == -signal.SIGKILL
    assert events_of(path) == [Synced(), *[Trouble("x", "y" * 1000)] * 3]


def test_recording_to_stdout(tmp_path):
    result = subprocess.run([sys.executable, "-c", CHILD, "-", "1"], check=True, capture_output=True)
    (tmp_path / "r").write_bytes(result.stdout)
    assert events_of(tmp_path / "r") == [Synced(), Trouble("x", "y" * 1000)]


def test_closed_pipe_is_a_source_error():
    child = CHILD + "\n"
    process = subprocess.Popen(
        [sys.executable, "-c", child, "-", "1000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(10)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == 1
    assert b"SourceError: recording to stdout failed: Broken pipe" in error


def test_unknown_fields_of_later_minor_versions_are_skipped(tmp_path):
    path = write(
        tmp_path / "r", b'{"proxycoreRecording": 1, "node": "n"}\n', b'{"t": 0, "event": "synced", "by": 1}\n'
    )
    assert events_of(path) == [Synced()]


def test_lines_stay_lines():
    line = event_line(0.1234567, Trouble("a\nb", "\u2028"))
    assert line.count(b"\n") == 1
    assert msgspec.json.decode(line)["t"] == 0.123457
