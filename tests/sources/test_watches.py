"""The layers under the file source: inotify, watches of directories, what a folder holds."""

from __future__ import annotations

import os
import shutil
import threading
import time

import pytest

from proxycore.sources import inotify
from proxycore.sources.folder import Folder, is_manifest
from proxycore.sources.watches import CONTENTS, NAMES, Watches


@pytest.fixture
def watches():
    instance = Watches()
    yield instance
    instance.close()


def seen(changes):
    return [(os.path.basename(change.directory), change.name) for change in changes.entries]


def test_inotify_tells_names_masks_and_renames(tmp_path):
    notify = inotify.Inotify()
    wd = notify.add(str(tmp_path), CONTENTS)
    odd = os.fsdecode(b"\xff\n" + b"x" * 200)
    (tmp_path / odd).write_text("x")
    (tmp_path / odd).rename(tmp_path / "b")
    created, closed, moved_from, moved_to = notify.read()
    assert created == (wd, inotify.IN_CREATE, 0, odd)
    assert closed == (wd, inotify.IN_CLOSE_WRITE, 0, odd)
    assert (moved_from.mask, moved_from.name) == (inotify.IN_MOVED_FROM, odd)
    assert (moved_to.mask, moved_to.name) == (inotify.IN_MOVED_TO, "b")
    assert moved_from.cookie == moved_to.cookie != 0
    assert notify.read() == []
    notify.remove(wd)
    assert [event.mask for event in notify.read()] == [inotify.IN_IGNORED]
    notify.close()
    notify.close()


def test_inotify_errors_carry_number_and_path(tmp_path):
    notify = inotify.Inotify()
    with pytest.raises(FileNotFoundError, match="missing"):
        notify.add(str(tmp_path / "missing"), CONTENTS)
    notify.close()


def test_directories_are_watched_as_long_as_wanted(tmp_path, watches):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert watches.follow({str(one): NAMES, str(two): CONTENTS})
    (one / "a").write_text("x")
    (two / "b").write_text("x")
    assert seen(watches.read()) == [("one", "a"), ("two", "b"), ("two", "b")]
    assert watches.follow({str(two): NAMES})
    (one / "c").touch()
    (two / "d").touch()
    assert seen(watches.read()) == [("two", "d")]


def test_a_directory_that_went_is_lost_and_watched_again_on_demand(tmp_path, watches):
    folder = tmp_path / "folder"
    folder.mkdir()
    wanted = {str(folder): NAMES}
    assert watches.follow(wanted)
    shutil.rmtree(folder)
    assert watches.read().lost == {str(folder)}
    assert not watches.follow(wanted)
    folder.mkdir()
    assert watches.follow(wanted)
    (folder / "a").touch()
    assert seen(watches.read()) == [("folder", "a")]


def test_a_directory_that_was_moved_away_is_lost(tmp_path, watches):
    folder = tmp_path / "folder"
    folder.mkdir()
    watches.follow({str(folder): NAMES})
    folder.rename(tmp_path / "away")
    assert watches.read().lost == {str(folder)}
    folder.mkdir()
    assert watches.follow({str(folder): NAMES}, again=True)
    (tmp_path / "away" / "ghost").touch()
    (folder / "a").touch()
    assert seen(watches.read()) == [("folder", "a")]


def test_two_paths_to_one_directory_share_their_masks(tmp_path, watches):
    folder, alias = tmp_path / "folder", tmp_path / "alias"
    folder.mkdir()
    alias.symlink_to("folder")
    assert watches.follow({str(folder): CONTENTS, str(alias): NAMES})
    (folder / "a").write_text("x")
    assert sorted(set(seen(watches.read()))) == [("alias", "a"), ("folder", "a")]


def test_which_entries_are_manifests():
    assert [name for name in ("a.yaml", "a.yml", "a.json") if not is_manifest(name)] == []
    odd = (".a.yaml", ".#a.yaml", "a.yaml~", "a.yaml.swp", "#a.yaml#", "4913", "a.txt", "yaml", "..data")
    assert [name for name in odd if is_manifest(name)] == []


def test_a_file_that_just_changed_is_not_trusted_by_its_times(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# x")
    folder = Folder(str(tmp_path), threading.Event())
    assert folder.locate() == ""
    (key,) = folder.list()
    folder.read(key)
    assert not folder.unchanged(key)
    long_ago = time.time() - 60
    os.utime(path, (long_ago, long_ago))
    folder.read(key)
    assert folder.unchanged(key)
    path.write_text("# y")
    os.utime(path, (long_ago, long_ago))
    assert not folder.unchanged(key)
