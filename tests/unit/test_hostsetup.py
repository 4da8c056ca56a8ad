"""Which knobs of the host get which numbers, and what is said about those that cannot be set; on a made-up /proc."""

from __future__ import annotations

import json
import logging
from io import StringIO
from pathlib import Path

import pytest

from proxycore import logs
from proxycore.config.model import Config, Conntrack
from proxycore.hostplan import CONNTRACK_MAX, HASHSIZE, OOM_SCORE_ADJ, conntrack_max, plan
from proxycore.hostsetup import prepare

NETFILTER = "/proc/sys/net/netfilter/nf_conntrack_"
NOTHING = Conntrack(
    max_per_core=0, minimum=0, tcp_established_timeout_seconds=0, tcp_close_wait_timeout_seconds=0
)


@pytest.mark.parametrize(
    ("per_core", "minimum", "cpus", "wanted"),
    [
        (32768, 131072, 1, 131072),
        (32768, 131072, 4, 131072),
        (32768, 131072, 8, 262144),
        (32768, 131072, 32, 1 << 20),
        (32768, 131072, 256, 1 << 20),
        (1, 5_000_000, 1, 1 << 20),
        (0, 131072, 8, 0),
        (32768, 0, 2, 65536),
    ],
)
def test_limit_of_the_table(per_core, minimum, cpus, wanted):
    assert conntrack_max(Conntrack(max_per_core=per_core, minimum=minimum), cpus) == wanted


def planned(config: Config, cpus: int = 8, **more: bool) -> dict[str, int]:
    return {setting.path: setting.value for setting in plan(config, cpus, **more)}


def test_defaults_are_kube_proxys():
    assert planned(Config()) == {
        CONNTRACK_MAX: 262144,
        HASHSIZE: 65536,
        f"{NETFILTER}tcp_timeout_established": 86400,
        f"{NETFILTER}tcp_timeout_close_wait": 3600,
        OOM_SCORE_ADJ: -999,
    }


def test_zero_leaves_a_knob_alone():
    assert planned(Config(conntrack=NOTHING)) == {OOM_SCORE_ADJ: -999}


def test_everything_that_can_be_asked_for():
    conntrack = Conntrack(
        max_per_core=0,
        tcp_established_timeout_seconds=0.2,
        tcp_close_wait_timeout_seconds=61.9,
        tcp_be_liberal=True,
        udp_timeout_seconds=7,
        udp_stream_timeout_seconds=8,
    )
    assert planned(Config(conntrack=conntrack, oom_score_adj=5)) == {
        # Less than a second is one: 0 would end every flow at once.
        f"{NETFILTER}tcp_timeout_established": 1,
        f"{NETFILTER}tcp_timeout_close_wait": 61,
        f"{NETFILTER}tcp_be_liberal": 1,
        f"{NETFILTER}udp_timeout": 7,
        f"{NETFILTER}udp_timeout_stream": 8,
        OOM_SCORE_ADJ: 5,
    }


@pytest.mark.parametrize(("backend_routes", "wanted"), [(True, True), (False, True), (True, False)])
def test_route_localnet_only_for_a_backend_that_needs_it_and_where_it_is_wanted(backend_routes, wanted):
    config = Config(conntrack=NOTHING, localhost_node_ports=wanted)
    there = "/proc/sys/net/ipv4/conf/all/route_localnet" in planned(config, route_localnet=backend_routes)
    assert there == (backend_routes and wanted)


# -- on a made-up host --


class Host:
    """Files as below /proc and /sys, and what is said about them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.said = StringIO()

    def put(self, path: str, text: str) -> Path:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def read(self, path: str) -> str:
        return (self.root / path.lstrip("/")).read_text().strip()

    def prepare(self, config: Config, *, strict: bool = False) -> bool:
        return prepare(config, log=logs.get("host"), strict=strict, root=self.root, cpus=8)

    def lines(self, level: str) -> list[dict[str, object]]:
        entries = [json.loads(line) for line in self.said.getvalue().splitlines()]
        return [entry for entry in entries if entry["level"] == level]


@pytest.fixture
def host(tmp_path):
    made = Host(tmp_path)
    root = logging.getLogger()
    before = root.handlers[:], root.level
    logs.configure("json", stream=made.said)
    yield made
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    root.handlers[:], _ = before
    root.setLevel(before[1])


KNOBS = {
    CONNTRACK_MAX: "65536",
    HASHSIZE: "16384",
    f"{NETFILTER}tcp_timeout_established": "432000",
    f"{NETFILTER}tcp_timeout_close_wait": "60",
    OOM_SCORE_ADJ: "0",
}


def test_what_differs_is_written_and_told_in_one_line(host):
    for path, text in KNOBS.items():
        host.put(path, f"{text}\n")
    assert host.prepare(Config())
    assert [host.read(path) for path in KNOBS] == ["262144", "65536", "86400", "3600", "-999"]
    [line] = host.lines("info")
    assert line["knobs"][0] == "nf_conntrack_max 65536 -> 262144"
    assert len(line["knobs"]) == 5
    host.said.truncate(0)
    host.said.seek(0)
    assert host.prepare(Config())
    assert host.said.getvalue() == "", "the second time all is as it should be"


def test_limit_and_hash_size_are_only_raised_and_the_rest_is_lowered_too(host):
    for path, text in KNOBS.items():
        host.put(path, text)
    host.put(CONNTRACK_MAX, "2000000")
    host.put(HASHSIZE, "65537")
    host.put(OOM_SCORE_ADJ, "-1000")
    assert host.prepare(Config())
    assert [host.read(path) for path in KNOBS] == ["2000000", "65537", "86400", "3600", "-999"]


def test_being_liberal_is_never_taken_back(host):
    host.put(f"{NETFILTER}tcp_be_liberal", "1")
    host.prepare(Config(conntrack=Conntrack(tcp_be_liberal=False)))
    assert host.read(f"{NETFILTER}tcp_be_liberal") == "1"


def test_what_is_missing_is_one_line_and_no_obstacle(host):
    host.put(HASHSIZE, "16384")
    assert host.prepare(Config())
    # Its size is for the limit that could not be set.
    assert host.read(HASHSIZE) == "16384"
    assert host.lines("error") == host.lines("warning") == []
    [line] = [line for line in host.lines("info") if "stay" in str(line["msg"])]
    assert len(line["knobs"]) == 4
    assert any("nf_conntrack_max=262144" in knob for knob in line["knobs"])
    assert "--init-only" in line["do"]


def test_init_only_insists_and_names_each_knob(host):
    for path in (CONNTRACK_MAX, HASHSIZE, f"{NETFILTER}tcp_timeout_established"):
        host.put(path, "1")
    host.put(HASHSIZE, "lots")
    assert not host.prepare(Config(), strict=True)
    assert {line["knob"] for line in host.lines("error")} == {
        HASHSIZE,
        f"{NETFILTER}tcp_timeout_close_wait",
    }
    assert all(line["do"] and line["error"] for line in host.lines("error"))
    # What could be set is set, and the process that ends now does not care about its own score.
    assert host.read(CONNTRACK_MAX) == "262144"
    assert not (host.root / OOM_SCORE_ADJ.lstrip("/")).exists()


def test_init_only_on_a_good_host(host):
    for path, text in KNOBS.items():
        host.put(path, text)
    assert host.prepare(Config(), strict=True)
    assert host.read(OOM_SCORE_ADJ) == "0"


def test_a_number_that_the_kernel_does_not_take(host, monkeypatch):
    """A directory stands for a file that refuses to be written."""
    (host.root / f"{NETFILTER}udp_timeout".lstrip("/")).mkdir(parents=True)
    config = Config(conntrack=Conntrack(max_per_core=0, udp_timeout_seconds=3))
    assert not host.prepare(config, strict=True)
    assert any("udpTimeout" in str(line["do"]) for line in host.lines("error"))
