"""A configuration that is followed: what is noticed, what is taken over, what is said."""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from proxycore.config import Difference, Loaded
from proxycore.logs import get
from proxycore.options import RunOptions, resolve
from proxycore.reload import Reloader, ways
from proxycore.sources.watches import CONTENTS, NAMES

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n"
SECONDS = 30.0
"""Only how long a failing test may hang."""
NEVER = 3600.0

Entry = tuple[str, str, dict[str, object]]
"""Level, message and fields."""


class Lines(logging.Handler):
    """Log entries, in a queue to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: queue.Queue[Entry] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.queue.put((record.levelname, record.getMessage(), dict(getattr(record, "fields", {}))))

    def until(self, message: str, count: int = 1) -> list[Entry]:
        """Entries up to the count-th that starts so."""
        found = []
        while count:
            found.append(self.queue.get(timeout=SECONDS))
            count -= found[-1][1].startswith(message)
        return found

    def waiting(self) -> list[Entry]:
        found = []
        while not self.queue.empty():
            found.append(self.queue.get_nowait())
        return found


class Followed:
    """A reloader at work, with what it told."""

    def __init__(self, options: RunOptions, lines: Lines, **settings: object) -> None:
        self.told: queue.Queue[tuple[Difference, Loaded]] = queue.Queue()
        self.lines = lines
        self.reloader = Reloader(
            options,
            lambda difference, loaded: self.told.put((difference, loaded)),
            get("test-reload"),
            **{"watched_seconds": NEVER, "poll_seconds": NEVER, **settings},  # type: ignore[arg-type]
        )

    def next(self) -> tuple[Difference, Loaded]:
        return self.told.get(timeout=SECONDS)


Follow = Callable[..., Followed]


@pytest.fixture
def lines() -> Iterator[Lines]:
    logger = logging.getLogger("proxycore.test-reload")
    handler = Lines()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield handler
    logger.removeHandler(handler)


@pytest.fixture
def follow(lines: Lines) -> Iterator[Follow]:
    """Starts a reloader that looks only when the kernel tells it to, unless said otherwise."""
    started: list[Followed] = []

    def follow(*files: Path, flags: Mapping[str, object] | None = None, **settings: object) -> Followed:
        followed = Followed(resolve([str(file) for file in files], flags or {}, {}), lines, **settings)
        started.append(followed)
        followed.reloader.start()
        # Once it has answered, it watches.
        followed.reloader.request()
        lines.until("configuration read again; nothing changed")
        return followed

    yield follow
    for followed in started:
        followed.reloader.stop()
        assert not followed.reloader._thread.is_alive()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.conf"
    path.write_text(f"{HEAD}oomScoreAdj: 1\n")
    return path


def config_map(folder: Path, version: str, text: str) -> Path:
    """A volume as kubelet writes it: content in a directory of its own, and one rename that makes it count."""
    folder.mkdir(exist_ok=True)
    (folder / version).mkdir()
    (folder / version / "config.conf").write_text(text)
    os.symlink(version, folder / "..data_tmp")
    old = os.readlink(folder / "..data") if (folder / "..data").is_symlink() else None
    os.rename(folder / "..data_tmp", folder / "..data")
    if old is None:
        os.symlink("..data/config.conf", folder / "config.conf")
    else:
        (folder / old / "config.conf").unlink()
        (folder / old).rmdir()
    return folder / "config.conf"


# -- what is noticed ------------------------------------------------------------------------------------------------


def in_place(file: Path, text: str) -> None:
    file.write_text(text)


def by_rename(file: Path, text: str) -> None:
    new = file.with_name("new")
    new.write_text(text)
    new.rename(file)


def removed_and_made_again(file: Path, text: str) -> None:
    file.unlink()
    file.write_text(text)


@pytest.mark.parametrize("change", [in_place, by_rename, removed_and_made_again])
def test_a_changed_file_is_noticed_again_and_again(
    follow: Follow, file: Path, change: Callable[[Path, str], None]
) -> None:
    followed = follow(file)
    for score in (2, 3):
        change(file, f"{HEAD}oomScoreAdj: {score}\n")
        difference, loaded = followed.next()
        assert difference.live == ("oomScoreAdj",)
        assert loaded.config.oom_score_adj == score
    assert [line for line in followed.lines.waiting() if line[0] != "INFO"] == []


def test_a_config_map_volume_is_noticed_again_and_again(follow: Follow, tmp_path: Path) -> None:
    file = config_map(tmp_path / "volume", "..1", f"{HEAD}oomScoreAdj: 1\n")
    followed = follow(file)
    for score in (2, 3, 4):
        config_map(tmp_path / "volume", f"..{score}", f"{HEAD}oomScoreAdj: {score}\n")
        assert followed.next()[1].config.oom_score_adj == score
    assert [line for line in followed.lines.waiting() if line[0] != "INFO"] == []


def test_a_folder_that_is_replaced_is_noticed(follow: Follow, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "c").write_text(HEAD)
    followed = follow(folder / "c")
    other = tmp_path / "other"
    (other / "b").mkdir(parents=True)
    (other / "b" / "c").write_text(f"{HEAD}oomScoreAdj: 2\n")
    (tmp_path / "a").rename(tmp_path / "gone")
    other.rename(tmp_path / "a")
    assert followed.next()[1].config.oom_score_adj == 2
    (folder / "c").write_text(f"{HEAD}oomScoreAdj: 3\n")
    assert followed.next()[1].config.oom_score_adj == 3


def test_every_file_is_followed(follow: Follow, file: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours" / "c"
    ours.parent.mkdir()
    text = "apiVersion: proxycore.io/v1alpha1\nkind: ProxycoreConfiguration\nverifyInterval: "
    ours.write_text(f"{text}1s\n")
    followed = follow(file, ours)
    ours.write_text(f"{text}2s\n")
    assert followed.next()[1].config.verify_interval_seconds == 2.0
    file.write_text(f"{HEAD}oomScoreAdj: 2\n")
    assert followed.next()[1].config.oom_score_adj == 2


def test_what_changed_before_the_start_is_noticed(file: Path, lines: Lines) -> None:
    followed = Followed(resolve([str(file)], {}, {}), lines)
    file.write_text(f"{HEAD}oomScoreAdj: 2\n")
    followed.reloader.start()
    assert followed.next()[1].config.oom_score_adj == 2
    followed.reloader.stop()


def no_watches() -> None:
    raise OSError(errno.EMFILE, "too many")


def test_without_watches_the_content_is_looked_at(follow: Follow, file: Path) -> None:
    followed = follow(file, watches=no_watches, poll_seconds=0.01)
    for score in (2, 3):
        file.write_text(f"{HEAD}oomScoreAdj: {score}\n")
        assert followed.next()[1].config.oom_score_adj == score


def test_it_is_said_that_there_are_no_watches(file: Path, lines: Lines) -> None:
    followed = Followed(resolve([str(file)], {}, {}), lines, watches=no_watches)
    followed.reloader.start()
    assert lines.until("no watch")[0][0] == "WARNING"
    followed.reloader.stop()


def test_other_files_beside_it_are_none_of_its_business(follow: Follow, file: Path) -> None:
    followed = follow(file)
    for number in range(20):
        file.with_name(f"other{number}").write_text("x")
    followed.reloader.request()
    followed.lines.until("configuration read again; nothing changed")
    assert followed.told.empty()


def test_ways_lead_through_links(tmp_path: Path) -> None:
    file = config_map(tmp_path / "volume", "..1", HEAD)
    wanted, lookups = ways([file])
    volume = str(tmp_path / "volume")
    assert (wanted[volume], wanted[f"{volume}/..1"], wanted["/"]) == (NAMES, CONTENTS, NAMES)
    assert {(volume, "config.conf"), (volume, "..data"), (f"{volume}/..1", "config.conf")} < lookups


# -- what is taken over and said ------------------------------------------------------------------------------------


def test_each_field_has_a_line_and_the_proxy_gets_what_it_can_take_over(follow: Follow, file: Path) -> None:
    followed = follow(file)
    file.write_text(
        f"{HEAD}oomScoreAdj: 2\nclusterCIDR: 10.0.0.0/8\nhostnameOverride: b\nipvs: {{scheduler: lc}}\n"
    )
    difference, loaded = followed.next()
    said = [entry for entry in followed.lines.waiting() if entry[1] == "configuration changed"]
    assert [
        (level, fields["field"], fields["old"], fields["new"], fields["effect"]) for level, _, fields in said
    ] == [
        ("INFO", "hostnameOverride", "", "b", "needs a restart"),
        ("INFO", "ipvs.scheduler", "rr", "lc", "none"),
        ("INFO", "clusterCIDR", "", "10.0.0.0/8", "at once"),
        ("INFO", "oomScoreAdj", "1", "2", "at once"),
    ]
    assert said[0][2]["origin"] == f"file ({file}:6)"
    assert (difference.live, difference.needs_restart) == (
        ("clusterCIDR", "oomScoreAdj"),
        ("hostnameOverride",),
    )
    assert (loaded.config.hostname_override, loaded.config.oom_score_adj) == ("", 2)
    assert followed.reloader.in_force() == loaded
    assert followed.reloader.status().needs_restart == ("hostnameOverride",)


def test_what_waits_is_told_until_it_is_taken_back(follow: Follow, file: Path) -> None:
    followed = follow(file)
    file.write_text(f"{HEAD}oomScoreAdj: 1\nhostnameOverride: b\n")
    assert followed.next()[0].needs_restart == ("hostnameOverride",)
    file.write_text(f"{HEAD}oomScoreAdj: 2\nhostnameOverride: b\n")
    difference, _ = followed.next()
    assert (difference.live, difference.needs_restart) == (("oomScoreAdj",), ("hostnameOverride",))
    said = [fields["field"] for _, message, fields in followed.lines.waiting() if message.endswith("changed")]
    assert said == ["hostnameOverride", "oomScoreAdj"]
    file.write_text(f"{HEAD}oomScoreAdj: 2\n")
    assert not followed.next()[0]
    assert followed.lines.waiting()[-1][2]["effect"] == "none: it is what is in force"
    assert followed.reloader.status().needs_restart == ()


def test_a_bad_file_is_told_with_line_and_field_and_the_old_one_stays(follow: Follow, file: Path) -> None:
    followed = follow(file)
    before = followed.reloader.status()
    by_rename(file, f"{HEAD}oomScoreAdj: 5000\nclusterCIDR: x\n")
    lines = followed.lines.until("configuration refused", 2)
    assert [(level, fields["error"]) for level, _, fields in lines] == [
        ("ERROR", f"{file}:4: oomScoreAdj: 5000 is not within -1000 to 1000"),
        ("ERROR", f"{file}:5: clusterCIDR: 'x' is no CIDR such as 10.0.0.0/8 or fd00::/8"),
    ]
    by_rename(file, f"{HEAD}a: [\n")
    ((level, _, fields),) = followed.lines.until("configuration refused")
    assert (level, fields["error"]) == (
        "ERROR",
        f"{file}:5: is not YAML: while parsing a flow node, did not find expected node content",
    )
    assert followed.reloader.status().problem == fields["error"]
    assert followed.reloader.status().loaded_at == before.loaded_at
    assert followed.reloader.in_force().config.oom_score_adj == 1
    assert followed.told.empty()
    by_rename(file, f"{HEAD}oomScoreAdj: 3\n")
    assert followed.next()[1].config.oom_score_adj == 3
    assert followed.reloader.status().problem == ""
    assert "configuration can be read again" in [message for _, message, _ in followed.lines.waiting()]


def test_a_file_that_is_gone_is_a_problem_until_it_is_back(follow: Follow, file: Path) -> None:
    followed = follow(file)
    file.unlink()
    ((_, _, fields),) = followed.lines.until("configuration refused")
    assert fields["error"] == f"{file}: cannot be read: No such file or directory"
    by_rename(file, f"{HEAD}oomScoreAdj: 1\n")
    followed.lines.until("configuration can be read again")
    assert followed.reloader.status().problem == ""
    assert followed.told.empty()


def test_flags_still_win(follow: Follow, file: Path) -> None:
    followed = follow(file, flags={"oomScoreAdj": 7})
    file.write_text(f"{HEAD}oomScoreAdj: 2\nbindAddress: 10.0.0.1\n")
    difference, loaded = followed.next()
    assert (difference.live, loaded.config.oom_score_adj) == (("bindAddress",), 7)


def test_new_warnings_are_said_once(follow: Follow, file: Path) -> None:
    followed = follow(file)
    file.write_text(f"{HEAD}future: 1\noomScoreAdj: 2\n")
    followed.next()
    file.write_text(f"{HEAD}future: 1\noomScoreAdj: 3\n")
    followed.next()
    said = [fields["warning"] for level, _, fields in followed.lines.waiting() if level == "WARNING"]
    assert said == [f"{file}:4: future: is unknown and ignored"]


def test_whoever_is_told_may_fail(follow: Follow, file: Path, lines: Lines) -> None:
    def fail(difference: Difference, loaded: Loaded) -> None:
        raise ZeroDivisionError("odd")

    reloader = Reloader(resolve([str(file)], {}, {}), fail, get("test-reload"))
    reloader.start()
    for score in (2, 3):
        by_rename(file, f"{HEAD}oomScoreAdj: {score}\n")
        lines.until("a changed configuration could not be taken over")
    reloader.stop()


def test_a_bug_in_reading_ends_nothing(file: Path, lines: Lines) -> None:
    def fail() -> Loaded:
        raise ZeroDivisionError("odd")

    from msgspec.structs import replace

    followed = Followed(replace(resolve([str(file)], {}, {}), reload=fail), lines)
    followed.reloader.start()
    for _ in range(2):
        followed.reloader.request()
        lines.until("configuration cannot be worked out")
    assert followed.reloader.status().problem == "cannot be worked out: odd"
    followed.reloader.stop()


# -- its life -------------------------------------------------------------------------------------------------------


def test_without_files_a_request_is_answered(follow: Follow) -> None:
    follow()


def test_stopping_is_quick_may_be_repeated_and_needs_no_start(file: Path, lines: Lines) -> None:
    before = threading.active_count()
    idle = Followed(resolve([str(file)], {}, {}), lines)
    idle.reloader.stop()
    idle.reloader.stop()
    idle.reloader.request()
    followed = Followed(resolve([str(file)], {}, {}), lines)
    followed.reloader.start()
    followed.reloader.stop()
    followed.reloader.stop()
    followed.reloader.request()
    assert threading.active_count() == before


def test_it_leaves_no_file_open(file: Path, lines: Lines) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(3):
        followed = Followed(resolve([str(file)], {}, {}), lines)
        followed.reloader.start()
        followed.reloader.stop()
    assert count() == before
