"""The file of the last known good state: what goes in comes out, and nothing else is taken for it."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxycore import statefile
from proxycore.decode import decode_bytes, encode
from proxycore.errors import DecodeError, SourceError
from proxycore.frontends import ServiceKey
from proxycore.objects import LABEL_ZONE, Metadata, Node, ServiceCIDR, ServiceCIDRSpec
from proxycore.resolve import resolve
from proxycore.savedstate import COMPLETE_OFFSET, dump, load
from proxycore.slices import merge, parse, unparse
from proxycore.source import Applied, Replaced
from proxycore.store import Store
from proxycore.testing.build import NODE, endpoint, endpoint_slice, host, service
from proxycore.testing.strategies import endpoint_slices, services

ORIGIN = "https://10.0.0.1:6443"


def store_of(*objects):
    store = Store(NODE)
    for item in objects:
        store.apply(Applied(item))
    return store


def example():
    return store_of(
        service("web"),
        service("db", cluster_ip="172.30.0.2"),
        endpoint_slice(endpoint("10.0.0.1", NODE, zone="a", zones=["a"]), "10.0.0.2"),
        Node(metadata=Metadata(name=NODE, labels={LABEL_ZONE: "a"})),
        ServiceCIDR(metadata=Metadata(name="kubernetes"), spec=ServiceCIDRSpec(cidrs=("172.30.0.0/16",))),
    )


def bytes_of(store, node=NODE):
    return dump(store.contents(), node=node, origin=ORIGIN, saved_at=1700000000.5)


@given(endpoint_slices())
def test_a_slice_that_was_taken_apart_and_put_together_gives_the_same_endpoints(item):
    parsed = parse(item, NODE)
    again = parse(unparse(parsed), NODE)
    assert (again.name, again.service, again.family) == (parsed.name, parsed.service, parsed.family)
    assert again.layout.columns.keys() == parsed.layout.columns.keys()
    for port in parsed.layout.columns:
        for family in ("IPv4", "IPv6"):
            assert merge((again,), family, port) == merge((parsed,), family, port)


def readable(item):
    """The API, and so every source, refuses some of what the strategy makes."""
    try:
        return decode_bytes("Service", encode(item)) == item
    except DecodeError:
        return False


@given(st.lists(services().filter(readable), max_size=6), st.lists(endpoint_slices(), max_size=6))
def test_a_node_serves_the_same_from_its_file(some_services, some_slices):
    store = store_of(*some_services, *some_slices)
    again = Store(NODE)
    for replaced in load(bytes_of(store), "f").lists:
        again.apply(replaced)
    assert states(again) == states(store)


def states(store: Store) -> dict[ServiceKey, tuple]:
    return {key: resolve(item, store.slices(key), host()).states for key, item in store.services.items()}


def test_node_and_service_cidrs_are_kept():
    again = Store(NODE)
    for replaced in load(bytes_of(example()), "f").lists:
        again.apply(replaced)
    assert again.node == example().node
    assert again.service_cidrs == ("172.30.0.0/16",)


def test_the_header_says_whose_state_it_is_and_that_it_is_complete():
    header = load(bytes_of(example()), "f").header
    assert (header.node, header.origin, header.saved_at, header.complete) == (NODE, ORIGIN, 1700000000.5, 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_one_wrong_byte_anywhere_is_found(data):
    good = bytes_of(example())
    place = data.draw(st.integers(0, len(good) - 1))
    value = data.draw(st.integers(0, 255))
    bad = good[:place] + bytes([value]) + good[place + 1 :]
    if value == good[place] or place == COMPLETE_OFFSET:
        return
    with pytest.raises(SourceError, match=r"^/var/lib/state: "):
        load(bad, "/var/lib/state")


@given(st.integers(0, 10_000))
def test_a_file_that_was_cut_is_refused(length):
    good = bytes_of(example())
    with pytest.raises(SourceError, match=r"^f: "):
        load(good[: length % len(good)], "f")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is not a state that proxycore has saved"),
        (b'{"kind":"List"}\n', "is not a state that proxycore has saved"),
        (b"\x00" * 100_000, "is not a state that proxycore has saved"),
        (b'{"proxycoreState":2,"complete":1}\nxyz', "has version 2 of the format"),
        (b'{"proxycoreState":1,"complete":1}\nxyz', "is damaged: its header"),
    ],
)
def test_what_is_something_else_is_refused_by_name(text, said):
    with pytest.raises(SourceError, match=said):
        load(text, "f")


def test_a_small_file_cannot_stand_for_endless_objects(monkeypatch):
    monkeypatch.setattr("proxycore.savedstate.MAX_BYTES", 100)
    with pytest.raises(SourceError, match="longer than 100 bytes"):
        load(bytes_of(example()), "f")


# -- the file ------------------------------------------------------------------------------------------------------


@dataclass
class Place:
    path: str

    @property
    def mode(self):
        return stat.S_IMODE(os.stat(self.path).st_mode)


@pytest.fixture
def place(tmp_path):
    return Place(str(tmp_path / "lib" / "proxycore" / "state"))


def test_only_the_owner_can_read_it(place):
    statefile.write(place.path, bytes_of(example()))
    assert place.mode == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(place.path)).st_mode) == 0o700
    found = statefile.read(place.path)
    assert found is not None
    assert [replaced.kind for replaced in found.lists] == ["Service", "EndpointSlice", "Node", "ServiceCIDR"]


def test_no_file_is_no_state(place):
    assert statefile.read(place.path) is None


def test_a_write_that_fails_leaves_the_old_file_and_no_other(place, monkeypatch):
    statefile.write(place.path, bytes_of(example()))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            statefile.write(place.path, b"new")
    assert statefile.read(place.path) is not None
    assert os.listdir(os.path.dirname(place.path)) == ["state"]


def test_what_an_interrupted_write_left_is_in_nobodys_way(place):
    statefile.write(place.path, bytes_of(example()))
    with open(f"{place.path}.new", "w") as file:
        file.write("half")
    statefile.write(place.path, bytes_of(store_of(service("new"))))
    found = statefile.read(place.path)
    assert found is not None
    assert isinstance(found.lists[0], Replaced)
    assert [item.metadata.name for item in found.lists[0].objects] == ["new"]


def test_a_file_that_others_can_write_is_refused(place):
    statefile.write(place.path, bytes_of(example()))
    os.chmod(place.path, 0o622)
    with pytest.raises(SourceError, match="others than its owner could have written it"):
        statefile.read(place.path)


def test_a_symbolic_link_is_not_followed(place, tmp_path):
    statefile.write(place.path, bytes_of(example()))
    link = tmp_path / "link"
    link.symlink_to(place.path)
    with pytest.raises(SourceError, match="cannot be read"):
        statefile.read(str(link))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(SourceError, match="is not a regular file"):
        statefile.read(str(tmp_path))


def test_a_pipe_does_not_hold_the_start(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="is not a regular file"):
        statefile.read(str(tmp_path / "pipe"))


def test_changes_make_it_incomplete_and_nothing_else(place):
    statefile.write(place.path, bytes_of(example()))
    before = statefile.read(place.path)
    statefile.mark_incomplete(place.path, NODE, ORIGIN)
    after = statefile.read(place.path)
    assert before is not None
    assert after is not None
    assert (before.header.complete, after.header.complete) == (1, 0)
    assert before.lists == after.lists


@pytest.mark.parametrize(("node", "origin"), [("other", ORIGIN), (NODE, "https://other")])
def test_a_foreign_file_is_not_touched(place, node, origin):
    statefile.write(place.path, bytes_of(example()))
    with open(place.path, "rb") as file:
        before = file.read()
    statefile.mark_incomplete(place.path, node, origin)
    with open(place.path, "rb") as file:
        assert file.read() == before


def test_no_file_cannot_be_marked(place):
    statefile.mark_incomplete(place.path, NODE, ORIGIN)
    assert not os.path.exists(place.path)
