"""The file source on a real folder, followed live."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from proxycore.source import Applied, Deleted, Health, Synced, Trouble
from proxycore.sources import files, inotify, manifests
from proxycore.sources.files import FileSource


def addresses(sink):
    return {name: item.spec.cluster_ip for (_, _, name), item in sink.objects.items()}


def synced(sink):
    return sink.synced


def test_first_everything_then_synced(tmp_path, follow, service):
    (tmp_path / "a.yaml").write_text(service("a") + "---\n" + service("b"))
    (tmp_path / "c.yml").write_text(service("c"))
    (tmp_path / "d.json").write_text(
        '{"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": "v1", "kind": "Service",'
        ' "metadata": {"name": "d"}}, {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "e"}}]}'
    )
    (tmp_path / "notes.txt").write_text("not: [read")
    (tmp_path / ".hidden.yaml").write_text(service("hidden"))
    (tmp_path / "sub.yaml").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "f.yaml").write_text(service("in-a-subdirectory"))
    sink = follow(tmp_path)
    sink.until(synced)
    assert sink.names == {"a", "b", "c", "d"}
    assert sink.troubles == {}
    assert [type(event) for event in sink.events] == [Applied] * 4 + [Synced, Health]


def test_an_empty_folder_is_synced(tmp_path, follow):
    sink = follow(tmp_path)
    sink.until(synced)
    assert sink.events == [Synced(), Health("live")]


def test_rename_into_place_emits_only_what_changed(tmp_path, follow, service, place):
    (tmp_path / "a.yaml").write_text(service("a") + "---\n" + service("b"))
    sink = follow(tmp_path)
    sink.until(synced)
    place(tmp_path / "a.yaml", service("a") + "---\n" + service("b", "10.0.0.2"))
    sink.until(lambda s: addresses(s)["b"] == "10.0.0.2")
    assert len(sink.batches) == 2
    assert [event.object.metadata.name for event in sink.batches[1]] == ["b"]


def test_one_changed_file_of_many_parses_one(tmp_path, follow, service, place, monkeypatch):
    for number in range(200):
        (tmp_path / f"{number:03}.yaml").write_text(service(f"s{number}"))
    parsed = []
    parse = manifests.parse
    monkeypatch.setattr("proxycore.sources.folder.parse", lambda data: parsed.append(data) or parse(data))
    sink = follow(tmp_path)
    sink.until(synced)
    assert len(parsed) == 200
    place(tmp_path / "007.yaml", service("s7", "10.9.9.9"))
    sink.until(lambda s: addresses(s)["s7"] == "10.9.9.9")
    assert len(parsed) == 201


def test_the_same_content_again_is_not_parsed(tmp_path, follow, service, place, monkeypatch):
    (tmp_path / "a.yaml").write_text(service("a"))
    parsed = []
    parse = manifests.parse
    monkeypatch.setattr("proxycore.sources.folder.parse", lambda data: parsed.append(data) or parse(data))
    sink = follow(tmp_path)
    sink.until(synced)
    place(tmp_path / "a.yaml", service("a"))
    place(tmp_path / "b.yaml", service("b"))
    sink.until(lambda s: "b" in s.names)
    assert len(parsed) == 2


def test_a_file_is_not_read_while_it_is_written(tmp_path, follow, service):
    (tmp_path / "a.yaml").write_text(service("a"))
    sink = follow(tmp_path)
    sink.until(synced)
    with open(tmp_path / "a.yaml", "w") as writer, open(tmp_path / "new.yaml", "w") as second:
        for file in (writer, second):
            file.write(service("torn")[:-20])
            file.flush()
        (tmp_path / "b.yaml").write_text(service("b"))
        sink.until(lambda s: "b" in s.names)
        assert sink.names == {"a", "b"}
        assert sink.troubles == {}
        writer.seek(0)
        writer.truncate()
        writer.write(service("a", "10.0.0.7"))
        second.seek(0)
        second.write(service("new"))
    sink.until(lambda s: s.names == {"a", "b", "new"} and addresses(s)["a"] == "10.0.0.7")


def test_unlink_deletes(tmp_path, follow, service):
    (tmp_path / "a.yaml").write_text(service("a"))
    (tmp_path / "b.yaml").write_text(service("b"))
    sink = follow(tmp_path)
    sink.until(synced)
    (tmp_path / "a.yaml").unlink()
    sink.until(lambda s: s.names == {"b"})
    assert sink.batches[-1] == [Deleted("Service", "default", "a")]


def test_renamed_manifest_keeps_its_objects(tmp_path, follow, service):
    (tmp_path / "a.yaml").write_text(service("a"))
    sink = follow(tmp_path)
    sink.until(synced)
    (tmp_path / "a.yaml").rename(tmp_path / "z.yaml")
    (tmp_path / "b.yaml").write_text(service("b"))
    sink.until(lambda s: "b" in s.names)
    (tmp_path / "z.yaml").rename(tmp_path / "z.bak")
    sink.until(lambda s: s.names == {"b"})
    assert [event for event in sink.events if isinstance(event, Deleted | Trouble)] == [
        Deleted("Service", "default", "a")
    ]


def test_an_editor_that_moves_the_file_away_first_deletes_nothing(tmp_path, follow, service):
    path = tmp_path / "a.yaml"
    path.write_text(service("a"))
    sink = follow(tmp_path)
    sink.until(synced)
    for number in range(2, 6):
        path.rename(tmp_path / "a.yaml~")
        path.write_text(service("a", f"10.0.0.{number}"))
        sink.until(lambda s, n=number: addresses(s).get("a") == f"10.0.0.{n}")
    for number in range(6, 9):
        path.unlink()
        path.write_text(service("a", f"10.0.0.{number}"))
        sink.until(lambda s, n=number: addresses(s).get("a") == f"10.0.0.{n}")
    assert not [event for event in sink.events if isinstance(event, Deleted)]


def test_hard_and_symbolic_links_appear_at_once(tmp_path, follow, service):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "hard").write_text(service("hard"))
    (elsewhere / "soft").write_text(service("soft"))
    sink = follow(folder)
    sink.until(synced)
    os.link(elsewhere / "hard", folder / "hard.yaml")
    os.symlink("../elsewhere/soft", folder / "soft.yaml")
    sink.until(lambda s: s.names == {"hard", "soft"})
    (elsewhere / "soft").write_text(service("softer"))
    sink.until(lambda s: s.names == {"hard", "softer"})


def test_configmap_volume_is_swapped_as_a_whole(tmp_path, follow, service):
    def publish(stamp, contents):
        (tmp_path / stamp).mkdir()
        for name, text in contents.items():
            (tmp_path / stamp / name).write_text(text)
        os.symlink(stamp, tmp_path / "..data_tmp")
        os.rename(tmp_path / "..data_tmp", tmp_path / "..data")
        for name in contents:
            if not os.path.lexists(tmp_path / name):
                os.symlink(f"..data/{name}", tmp_path / name)

    publish("..1", {"a.yaml": service("a"), "b.yaml": service("b")})
    sink = follow(tmp_path)
    sink.until(synced)
    assert sink.names == {"a", "b"}
    publish("..2", {"a.yaml": service("a", "10.0.0.2"), "b.yaml": service("b", "10.0.0.3")})
    sink.until(lambda s: set(addresses(s).values()) == {"10.0.0.2", "10.0.0.3"})
    shutil.rmtree(tmp_path / "..1")
    publish("..3", {"a.yaml": service("a", "10.0.0.4")})
    (tmp_path / "b.yaml").unlink()
    shutil.rmtree(tmp_path / "..2")
    sink.until(lambda s: addresses(s) == {"a": "10.0.0.4"} and not s.troubles)


def test_dangling_link_is_trouble_and_keeps_the_last_good_state(tmp_path, follow, service):
    target = tmp_path / "target"
    target.write_text(service("a"))
    folder = tmp_path / "folder"
    folder.mkdir()
    os.symlink("../target", folder / "a.yaml")
    sink = follow(folder)
    sink.until(synced)
    target.unlink()
    sink.until(lambda s: s.troubles)
    assert "leads nowhere" in sink.troubles[f"{folder}/a.yaml"]
    assert sink.names == {"a"}
    target.write_text(service("b"))
    sink.until(lambda s: s.names == {"b"} and not s.troubles)


def test_link_to_the_folder_is_swapped(tmp_path, follow, service):
    for release, address in (("r1", "10.0.0.1"), ("r2", "10.0.0.2")):
        (tmp_path / release).mkdir()
        (tmp_path / release / "a.yaml").write_text(service("a", address))
    os.symlink("r1", tmp_path / "current")
    sink = follow(tmp_path / "current")
    sink.until(synced)
    os.symlink("r2", tmp_path / "new")
    os.rename(tmp_path / "new", tmp_path / "current")
    sink.until(lambda s: addresses(s) == {"a": "10.0.0.2"})
    (tmp_path / "r2" / "b.yaml").write_text(service("b"))
    sink.until(lambda s: s.names == {"a", "b"})


def test_missing_folder_is_waited_for(tmp_path, follow, service):
    folder = tmp_path / "not" / "yet"
    sink = follow(folder)
    sink.until(lambda s: s.troubles)
    assert str(folder) in sink.troubles
    assert sink.health.state == "stale"
    assert not sink.synced
    (tmp_path / "not").mkdir()
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a.yaml").write_text(service("a"))
    (tmp_path / "made").rename(folder)
    sink.until(lambda s: s.synced and s.names == {"a"})
    assert sink.troubles == {}
    assert sink.health == Health("live")


def test_deleted_folder_keeps_the_last_good_state(tmp_path, follow, service):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(50):
        (folder / f"{number}.yaml").write_text(service(f"s{number}"))
    sink = follow(folder)
    sink.until(synced)
    shutil.rmtree(folder)
    sink.until(lambda s: s.troubles)
    assert len(sink.objects) == 50
    assert "stays in force" in sink.troubles[str(folder)]
    assert sink.health.state == "stale"
    folder.mkdir()
    (folder / "7.yaml").write_text(service("s7"))
    sink.until(lambda s: s.names == {"s7"})
    assert sink.troubles == {}
    assert sink.health == Health("live")


def test_folder_moved_away_and_another_put_in_its_place(tmp_path, follow, service):
    folder = tmp_path / "parent" / "folder"
    folder.mkdir(parents=True)
    (folder / "a.yaml").write_text(service("a"))
    sink = follow(folder)
    sink.until(synced)
    (tmp_path / "parent").rename(tmp_path / "old")
    folder.mkdir(parents=True)
    (folder / "b.yaml").write_text(service("b"))
    sink.until(lambda s: s.names == {"b"})
    (tmp_path / "old" / "folder" / "a.yaml").write_text(service("ghost"))
    (folder / "c.yaml").write_text(service("c"))
    sink.until(lambda s: "c" in s.names)
    assert sink.names == {"b", "c"}


def test_single_file(tmp_path, follow, service, place):
    path = tmp_path / "services"
    path.write_text(service("a"))
    (tmp_path / "other.yaml").write_text(service("other"))
    sink = follow(path)
    sink.until(synced)
    assert sink.names == {"a"}
    place(path, service("b"))
    sink.until(lambda s: s.names == {"b"})
    path.write_text(service("c"))
    sink.until(lambda s: s.names == {"c"})
    path.rename(tmp_path / "services~")
    path.write_text(service("d"))
    sink.until(lambda s: s.names == {"d"})
    assert not any(isinstance(event, Trouble) for event in sink.events)
    path.unlink()
    sink.until(lambda s: s.troubles)
    assert sink.names == {"d"}
    path.write_text(service("e"))
    sink.until(lambda s: s.names == {"e"} and not s.troubles)


def test_single_file_of_a_configmap(tmp_path, follow, service):
    (tmp_path / "..1").mkdir()
    (tmp_path / "..1" / "a.yaml").write_text(service("a"))
    os.symlink("..1", tmp_path / "..data")
    os.symlink("..data/a.yaml", tmp_path / "a.yaml")
    sink = follow(tmp_path / "a.yaml")
    sink.until(synced)
    (tmp_path / "..2").mkdir()
    (tmp_path / "..2" / "a.yaml").write_text(service("b"))
    os.symlink("..2", tmp_path / "..tmp")
    os.rename(tmp_path / "..tmp", tmp_path / "..data")
    sink.until(lambda s: s.names == {"b"})


def test_broken_file_keeps_its_objects_and_is_named_with_its_line(tmp_path, follow, service):
    path = tmp_path / "a.yaml"
    path.write_text(service("a"))
    sink = follow(tmp_path)
    sink.until(synced)
    path.write_text(service("b") + "spec: [\n")
    sink.until(lambda s: s.troubles)
    (subject,) = sink.troubles
    assert subject.startswith(f"{path}:1")
    assert sink.names == {"a"}
    path.write_text(service("b"))
    sink.until(lambda s: s.names == {"b"})
    assert sink.troubles == {}
    assert Trouble(subject, "") in sink.events


def test_broken_file_at_start_does_not_hold_up_the_others(tmp_path, follow, service):
    (tmp_path / "a.yaml").write_text("kind: a: b")
    (tmp_path / "b.yaml").write_text(service("b"))
    sink = follow(tmp_path)
    sink.until(synced)
    assert sink.names == {"b"}
    assert list(sink.troubles) == [f"{tmp_path}/a.yaml:1"]


def test_deleting_a_broken_file_ends_its_trouble(tmp_path, follow, service):
    path = tmp_path / "a.yaml"
    path.write_text(service("a"))
    sink = follow(tmp_path)
    sink.until(synced)
    path.write_text("kind: [")
    sink.until(lambda s: s.troubles)
    path.unlink()
    sink.until(lambda s: not s.objects and not s.troubles)


def test_fifo_does_not_hang_the_source(tmp_path, follow, service):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "a.yaml").write_text(service("a"))
    sink = follow(tmp_path)
    sink.until(synced)
    assert sink.names == {"a"}
    assert "not a regular file" in sink.troubles[f"{tmp_path}/pipe.yaml"]


def test_file_names_that_are_not_text(tmp_path, follow, service):
    (tmp_path / os.fsdecode(b"\xff\n.yaml")).write_text("kind: [")
    (tmp_path / os.fsdecode(b"\xfe.yaml")).write_text(service("a"))
    sink = follow(tmp_path)
    sink.until(synced)
    assert sink.names == {"a"}
    (subject,) = sink.troubles
    assert subject.isprintable()
    assert json.dumps(subject).encode()


def test_lost_events_lead_to_a_full_look(tmp_path, follow, service, monkeypatch):
    (tmp_path / "a.yaml").write_text(service("a"))
    (tmp_path / "b.yaml").write_text(service("b"))
    overflowed = threading.Event()
    read = inotify.Inotify.read

    def read_with_loss(self):
        events = read(self)
        if not events or overflowed.is_set():
            return events
        overflowed.set()
        return [inotify.InotifyEvent(-1, inotify.IN_Q_OVERFLOW, 0, "")]

    monkeypatch.setattr(inotify.Inotify, "read", read_with_loss)
    sink = follow(tmp_path)
    sink.until(synced)
    # All in one rename each, and the first wake-up loses whatever came by then.
    (tmp_path / "a.yaml").unlink()
    os.link(tmp_path / "b.yaml", tmp_path / "c.yaml")
    sink.until(lambda s: s.names == {"b"} and any("c.yaml" in reason for reason in s.troubles.values()))
    assert overflowed.is_set()


def test_real_queue_overflow(tmp_path, service, sink):
    """More events than the kernel's queue holds, before the source reads any."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 100_000:
        pytest.skip(f"max_queued_events is {limit}")
    (tmp_path / "a.yaml").write_text(service("a"))
    gate, at_gate = threading.Event(), threading.Event()

    class Slow:
        def put(self, events):
            sink.put(events)
            if not at_gate.is_set():
                at_gate.set()
                gate.wait(60)

    source = FileSource(str(tmp_path))
    thread = threading.Thread(target=source.run, args=(Slow(),), daemon=True)
    thread.start()
    try:
        assert at_gate.wait(20)
        noise, other = tmp_path / "noise", tmp_path / "esion"
        noise.touch()
        for _ in range(limit // 4 + 10):
            os.rename(noise, other)
            os.rename(other, noise)
        (tmp_path / "late.yaml").write_text(service("late"))
        (tmp_path / "a.yaml").unlink()
        gate.set()
        sink.until(lambda s: s.names == {"late"})
    finally:
        gate.set()
        source.stop()
        thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("number", "knob"), [(24, "max_user_instances"), (28, "max_user_watches")], ids=["EMFILE", "ENOSPC"]
)
def test_without_inotify_files_are_polled(tmp_path, follow, service, place, monkeypatch, number, knob):
    broken = threading.Event()
    broken.set()
    method = "__init__" if number == 24 else "add"
    original = getattr(inotify.Inotify, method)

    def refuse(self, *arguments):
        if broken.is_set():
            raise OSError(number, os.strerror(number))
        return original(self, *arguments)

    monkeypatch.setattr(inotify.Inotify, method, refuse)
    monkeypatch.setattr(files, "POLL_SECONDS", 0.02)
    (tmp_path / "a.yaml").write_text(service("a"))
    sink = follow(tmp_path)
    sink.until(synced)
    assert f"fs.inotify.{knob}" in sink.troubles["inotify"]
    place(tmp_path / "b.yaml", service("b"))
    (tmp_path / "a.yaml").unlink()
    sink.until(lambda s: s.names == {"b"})
    monkeypatch.undo()
    broken.clear()
    sink.until(lambda s: not s.troubles)
    place(tmp_path / "c.yaml", service("c"))
    sink.until(lambda s: s.names == {"b", "c"})


def slices(suffix, names):
    """A List of one EndpointSlice per Service, its name ending in `suffix`."""
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "List",
            "items": [
                {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "name": f"{name}-{suffix}",
                        "namespace": "default",
                        "labels": {"kubernetes.io/service-name": name},
                    },
                    "addressType": "IPv4",
                    "endpoints": [{"addresses": ["10.1.0.1"]}],
                    "ports": [{"port": 80}],
                }
                for name in names
            ],
        }
    )


def test_renamed_slices_are_never_missing(tmp_path, follow, place, monkeypatch):
    monkeypatch.setattr(files, "PORTION", 10)
    names = [f"s{number}" for number in range(40)]
    (tmp_path / "a.json").write_text(slices("old", names))
    sink = follow(tmp_path)
    sink.until(synced)
    started = len(sink.batches)
    assert started > 1, "the start comes in portions"
    place(tmp_path / "a.json", slices("new", names))
    sink.until(lambda s: s.names == {f"{name}-new" for name in names})
    assert len(sink.batches) == started + 1
    assert [type(event) for event in sink.batches[-1]] == [Applied] * 40 + [Deleted] * 40


def test_a_folder_that_appears_late_is_portioned_too(tmp_path, follow, place, monkeypatch):
    monkeypatch.setattr(files, "PORTION", 10)
    folder, names = tmp_path / "folder", [f"s{number}" for number in range(40)]
    sink = follow(folder)
    sink.until(lambda s: s.health == Health("stale", f"{folder} does not exist"))
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a.json").write_text(slices("old", names))
    (tmp_path / "made").rename(folder)
    sink.until(synced)
    assert max(map(len, sink.batches)) == 10
    place(folder / "a.json", slices("new", names))
    sink.until(lambda s: s.names == {f"{name}-new" for name in names})
    assert len(sink.batches[-1]) == 80


def test_deliveries_come_from_one_thread(tmp_path, follow, service, place):
    sink = follow(tmp_path)
    sink.until(synced)
    for number in range(5):
        place(tmp_path / f"{number}.yaml", service(f"s{number}"))
    sink.until(lambda s: len(s.objects) == 5)
    assert len(sink.threads) == 1


def test_stop_before_run_and_twice(tmp_path, sink):
    source = FileSource(str(tmp_path))
    source.stop()
    source.stop()
    source.run(sink)
    source.stop()
    assert sink.events == []


def test_stop_does_not_wait_for_a_large_file(tmp_path, sink, service, monkeypatch):
    (tmp_path / "a.yaml").write_text(service("a") + "# padding\n" * 500_000)
    parsing, go_on = threading.Event(), threading.Event()

    def endless(data):
        parsing.set()
        go_on.wait(60)
        return manifests.Manifest()

    monkeypatch.setattr("proxycore.sources.folder.parse", endless)
    source = FileSource(str(tmp_path))
    thread = threading.Thread(target=source.run, args=(sink,), daemon=True)
    thread.start()
    assert parsing.wait(20)
    source.stop()
    thread.join(20)
    assert not thread.is_alive()
    go_on.set()
    assert sink.events == []


def test_large_file_is_read_like_any_other(tmp_path, follow, service):
    (tmp_path / "a.yaml").write_text(service("a") + "# padding\n" * 500_000 + "---\n" + service("b"))
    sink = follow(tmp_path)
    sink.until(synced)
    assert sink.names == {"a", "b"}
