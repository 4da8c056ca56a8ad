"""The file source under random work on a folder, and at its ends."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxycore.errors import SourceError
from proxycore.source import SourceContext
from proxycore.sources import manifests
from proxycore.sources import watches as watches_module
from proxycore.sources.files import FileSource, plugin


def addresses(sink):
    return {name: item.spec.cluster_ip for (_, _, name), item in sink.objects.items()}


def synced(sink):
    return sink.synced


class Writer:
    """Does to a folder what people, editors and tools do, as fast as it can."""

    def __init__(self, folder, service):
        self.folder, self.service = folder, service
        self.folder.mkdir()

    def contents(self, name, address):
        return self.service(name, f"10.0.0.{address}")

    def write(self, file, name, address):
        self.remove_link(file)
        (self.folder / file).write_text(self.contents(name, address))

    def replace(self, file, name, address):
        (self.folder / ".new").write_text(self.contents(name, address))
        os.rename(self.folder / ".new", self.folder / file)

    def editor(self, file, name, address):
        if os.path.lexists(self.folder / file):
            os.rename(self.folder / file, self.folder / f"{file}~")
        self.write(file, name, address)

    def link(self, file, name, address):
        (self.folder.parent / f"target{address}").write_text(self.contents(name, address))
        (self.folder / ".new").symlink_to(f"../target{address}")
        os.rename(self.folder / ".new", self.folder / file)

    def through_link(self, file, name, address):
        if (self.folder / file).is_symlink():
            (self.folder / file).write_text(self.contents(name, address))

    def move(self, file, name, address):
        if os.path.lexists(self.folder / file):
            os.rename(self.folder / file, self.folder / f"{address}.yaml")

    def remove(self, file, name, address):
        (self.folder / file).unlink(missing_ok=True)

    def remove_link(self, file):
        if (self.folder / file).is_symlink():
            (self.folder / file).unlink()

    def swap_folder(self, file, name, address):
        copy = self.folder.parent / "copy"
        shutil.copytree(self.folder, copy, symlinks=True)
        (copy / file).unlink(missing_ok=True)
        (copy / file).write_text(self.contents(name, address))
        os.rename(self.folder, self.folder.parent / "old")
        os.rename(copy, self.folder)
        shutil.rmtree(self.folder.parent / "old")

    def expected(self):
        found = {}
        for path in sorted(self.folder.glob("*.yaml")):
            for key, item in manifests.parse(path.read_bytes()).objects.items():
                found[key] = item.object
        return found


ACTIONS = ["write", "replace", "editor", "link", "through_link", "move", "remove", "swap_folder"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(ACTIONS),
            st.sampled_from(["1.yaml", "2.yaml", "3.yaml"]),
            st.sampled_from("abc"),
            st.integers(1, 5),
        ),
        max_size=25,
    )
)
def test_whatever_is_done_to_the_folder_the_end_is_what_stands_there(service, new_sink, actions):
    with tempfile.TemporaryDirectory() as scratch:
        writer, sink = Writer(Path(scratch) / "folder", service), new_sink()
        source = FileSource(str(writer.folder))
        thread = threading.Thread(target=source.run, args=(sink,), daemon=True)
        thread.start()
        try:
            for action, *arguments in actions:
                getattr(writer, action)(*arguments)
            writer.replace("last.yaml", "last", 1)
            expected = writer.expected()
            sink.until(lambda s: s.synced and s.objects == expected)
        finally:
            source.stop()
            thread.join(20)
        assert not thread.is_alive()


def test_run_gives_everything_back(tmp_path, sink):
    before = os.listdir("/proc/self/fd")
    source = FileSource(str(tmp_path))
    thread = threading.Thread(target=source.run, args=(sink,))
    thread.start()
    sink.until(synced)
    source.stop()
    thread.join(20)
    assert os.listdir("/proc/self/fd") == before


def test_a_failure_comes_out_as_source_error(tmp_path, service):
    class Refusing:
        def put(self, events):
            raise RuntimeError("no")

    with pytest.raises(SourceError, match="RuntimeError: no"):
        FileSource(str(tmp_path)).run(Refusing())


@pytest.mark.parametrize("argument", ["", "a\0b"])
def test_arguments_that_cannot_be_a_path(argument):
    with pytest.raises(SourceError):
        plugin().proxycore_source_open(context=SourceContext(argument=argument, node_name="n"))


def test_resolve_follows_links_as_the_kernel_does(tmp_path):
    real = tmp_path / "a" / "b"
    real.mkdir(parents=True)
    (real / "f").touch()
    os.symlink("a", tmp_path / "x")
    os.symlink("b/../b/./f", tmp_path / "a" / "y")
    os.symlink("loop", tmp_path / "loop")
    os.symlink(str(real), real / "absolute")
    root = os.path.realpath(tmp_path)
    for path in ("x/y", "x/b/absolute/absolute/f", "a/b/../b/f"):
        assert watches_module.resolve(str(tmp_path / path)).path == os.path.realpath(real / "f")
    resolved = watches_module.resolve(f"{tmp_path}/x/y")
    assert resolved.lookups[-6:] == (
        (root, "x"),
        (root, "a"),
        (f"{root}/a", "y"),
        (f"{root}/a", "b"),
        (f"{root}/a", "b"),
        (f"{root}/a/b", "f"),
    )
    assert watches_module.resolve(str(tmp_path / "loop")).path is None
    missing = watches_module.resolve(str(tmp_path / "no" / "where"))
    assert missing.path is None
    assert missing.lookups[-1] == (root, "no")
