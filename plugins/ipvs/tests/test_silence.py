"""A kernel that does not answer, or loses its answers: what is raised, and that the next request has a fresh socket."""

from __future__ import annotations

import errno

import pytest

from proxycore.api import KernelError
from proxycore.kernel.netlink import Overrun
from proxycore_ipvs import kernel as servers_module
from proxycore_ipvs import link
from proxycore_ipvs import setkernel as sets_module
from proxycore_ipvs.servers import AddServer, ByMark, Server, Timeouts
from proxycore_ipvs.sets import Entry, SetSpec

KEY = ByMark("IPv4", 1)
SPEC = SetSpec("s", "hash:ip")


class Silent:
    """A socket that takes everything; waiting for an answer raises `error`."""

    opened: list[Silent]
    error: Exception

    def __init__(self, *_: object, **__: object) -> None:
        self.closed = False
        self.sent = 0
        self.opened.append(self)

    def reserve(self, count: int = 1) -> int:
        return 1

    def send(self, data: bytes) -> None:
        assert not self.closed
        self.sent += 1

    def request(self, *_: object) -> int:
        self.send(b"")
        return 1

    def wait(self, *_: object) -> None:
        self.send(b"")
        raise self.error

    def receive(self) -> None:
        raise self.error

    transact = dump = dump_datagrams = dump_messages = wait

    def close(self) -> None:
        self.closed = True


@pytest.fixture(params=[TimeoutError("timed out"), Overrun("lost", errno=errno.ENOBUFS)], ids=str)
def silent(request, monkeypatch):
    made = type("Made", (Silent,), {"opened": [], "error": request.param})
    monkeypatch.setattr(link, "NetlinkSocket", made)
    monkeypatch.setattr(servers_module, "family_number", lambda socket, name: 30)
    return made


def heard(silent):
    return errno.ETIMEDOUT if isinstance(silent.error, TimeoutError) else errno.ENOBUFS


SERVER_CALLS = {
    "run": lambda kernel: kernel.run([AddServer(Server(KEY))]),
    "servers": lambda kernel: kernel.servers(),
    "server": lambda kernel: kernel.server(KEY),
    "destinations": lambda kernel: kernel.destinations(KEY),
    "timeouts": lambda kernel: kernel.timeouts(),
    "set_timeouts": lambda kernel: kernel.set_timeouts(Timeouts(1, 2, 3)),
}
SET_CALLS = {
    "states": lambda sets: sets.states(),
    "create": lambda sets: sets.create(SPEC),
    "destroy": lambda sets: sets.destroy("s"),
    "swap": lambda sets: sets.swap("s", "t"),
    "members": lambda sets: sets.members(SPEC),
    "add": lambda sets: sets.add(SPEC, {Entry("10.0.0.1"): None}),
    "delete": lambda sets: sets.delete(SPEC, [Entry("10.0.0.1")]),
}


@pytest.mark.parametrize(
    ("make", "call"),
    [
        *(pytest.param("NetlinkKernel", call, id=name) for name, call in SERVER_CALLS.items()),
        *(pytest.param("NetlinkSets", call, id=name) for name, call in SET_CALLS.items()),
    ],
)
def test_no_answer_is_an_error_and_the_next_request_has_its_own_socket(silent, make, call):
    module = servers_module if make == "NetlinkKernel" else sets_module
    with getattr(module, make)() as kernel:
        for attempt in (1, 2):
            with pytest.raises(KernelError) as caught:
                call(kernel)
            assert caught.value.errno == heard(silent)
            assert len(silent.opened) == attempt + 1
            assert [socket.closed for socket in silent.opened] == [True] * attempt + [False]
            assert [socket.sent for socket in silent.opened] == [1] * attempt + [0]
    assert all(socket.closed for socket in silent.opened)


def test_nothing_is_asked_for_nothing(silent):
    with servers_module.NetlinkKernel() as kernel:
        assert kernel.run([]) == ()
    with sets_module.NetlinkSets() as sets:
        assert sets.add(SPEC, {}) == ()
    assert [socket.sent for socket in silent.opened] == [0, 0]


def test_a_kernel_that_does_not_say_whether_it_has_ipvs(silent, monkeypatch):
    def nothing(socket, name):
        raise silent.error

    monkeypatch.setattr(servers_module, "family_number", nothing)
    with pytest.raises(KernelError) as caught:
        servers_module.NetlinkKernel()
    assert caught.value.errno == heard(silent)
    assert all(socket.closed for socket in silent.opened)
