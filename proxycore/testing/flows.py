"""Sends one flow's traffic and judges what comes back.

Tries of one flow, and several flows, run side by side in one event loop; sockets live in the namespaces of the lab.
A judgement is None or one line for people: what was expected, what came, on which try.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .lab import Lab
from .responder import join_host_port
from .scenario import Expect, ExpectEndpoints, ExpectHTTP, ExpectVerdict, Flow

Outcome = Literal["answered", "refused", "silent", "broken"]

DROP_SECONDS = 0.4
ANSWER_SECONDS = 3.0
REFUSE_SECONDS = 2.0
"""A client on the node itself hears of an ICMP refusal only when TCP sends its SYN again, after 1 s: the socket is busy
in connect() when the first one comes back."""

SIDE_BY_SIDE = 16
STICKY_TRIES = 10
SLOW_TRIES = 5
REQUEST = b"who are you?\n"
MAX_BODY = 1 << 20

_REFUSALS = {errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES}


@dataclass(frozen=True, slots=True)
class Reply:
    """What one try came to.  `at` and `peer` as `ip:port`, `by` the place in the lab, when it was answered."""

    outcome: Outcome
    client: str
    by: str = ""
    at: str = ""
    peer: str = ""
    detail: str = ""

    @property
    def masqueraded(self) -> bool:
        """The endpoint saw another address than the client's."""
        return self.peer.rpartition(":")[0] != self.client.rpartition(":")[0]

    @property
    def from_endpoint(self) -> bool:
        return self.outcome == "answered" and self.by != "world"

    def __str__(self) -> str:
        if self.outcome == "answered":
            seen = f"having seen {self.peer}, " + ("masqueraded" if self.masqueraded else "the client itself")
            return f"{self.at} ({self.by}) answered, {seen}"
        return {"refused": "it was refused", "silent": "nothing came back", "broken": "the try failed"}[
            self.outcome
        ] + (f" ({self.detail})" if self.detail else "")


class Traffic:
    """Sends flows in one lab; holds the long-lived connections that flows of one `conn` share until close()."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._connections: dict[str, socket.socket] = {}

    def close(self) -> None:
        """Close the long-lived connections."""
        for held in self._connections.values():
            held.close()
        self._connections.clear()

    def judge(self, flows: Iterable[Flow]) -> dict[Flow, str]:
        """Send all flows, those that cannot disturb each other side by side.  Returns the failures, a line each."""
        return asyncio.run(self._judge_all(tuple(flows)))

    async def _judge_all(self, flows: Sequence[Flow]) -> dict[Flow, str]:
        failures: dict[Flow, str] = {}
        gate = asyncio.Semaphore(SIDE_BY_SIDE)

        async def one(flow: Flow) -> None:
            async with gate:
                said = await judge_flow(flow, self.send)
            if said is not None:
                failures[flow] = said

        together: list[Flow] = []
        for flow in flows:
            if flow.connection is None and not flow.source_port:
                together.append(flow)
                continue
            await asyncio.gather(*map(one, together))
            together.clear()
            await one(flow)
        await asyncio.gather(*map(one, together))
        return {flow: failures[flow] for flow in flows if flow in failures}

    async def send(self, flow: Flow, seconds: float) -> Reply:
        """One try: a connection, or one datagram.  Waits at most `seconds`; never raises for what the network did."""
        client = join_host_port(flow.source, flow.source_port)
        try:
            made, held = self._socket(flow)
        except OSError as error:
            return Reply("broken", client, detail=f"no socket from {client}: {error.strerror}")
        client = _name_of(made)
        try:
            async with asyncio.timeout(seconds):
                return await self._exchange(flow, made, held, client)
        except TimeoutError:
            return Reply("silent", client, detail=f"in {seconds:g} s")
        except OSError as error:
            outcome: Outcome = "refused" if error.errno in _REFUSALS else "broken"
            return Reply(outcome, client, detail=os.strerror(error.errno) if error.errno else str(error))
        finally:
            if made not in self._connections.values():
                _reset(made)

    def _socket(self, flow: Flow) -> tuple[socket.socket, bool]:
        """A socket for one try, and whether it is a connection that was there before."""
        if flow.connection is not None and flow.connection in self._connections:
            return self._connections[flow.connection], True
        return self._lab.client(flow.kind, flow.proto, flow.source, flow.source_port), False

    async def _exchange(self, flow: Flow, made: socket.socket, held: bool, client: str) -> Reply:
        loop = asyncio.get_running_loop()
        if not held:
            await loop.sock_connect(made, (flow.address, flow.port))
            if flow.connection is not None:
                self._connections[flow.connection] = made
        if flow.http is not None:
            return await _fetch(made, flow, client)
        # What a hook drops or refuses on its way out of the node is EPERM here; whether a refusal comes too
        # shows only in what is received.
        with contextlib.suppress(PermissionError):
            await loop.sock_sendall(made, REQUEST)
        line = await loop.sock_recv(made, 4096)
        if not line:
            return Reply("refused", client, detail="the connection was closed")
        told = json.loads(line)
        return Reply("answered", client, by=told["by"], at=told["at"], peer=told["peer"])


async def _fetch(made: socket.socket, flow: Flow, client: str) -> Reply:
    """An HTTP response; `at` is where it was asked for, `detail` its status and body as JSON."""
    loop = asyncio.get_running_loop()
    host = join_host_port(flow.address, flow.port)
    await loop.sock_sendall(made, f"GET {flow.http} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
    received = b""
    while (chunk := await loop.sock_recv(made, 65536)) and len(received) < MAX_BODY:
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    return Reply("answered", client, by="http", at=host, peer=client, detail=_http_detail(head, body))


def _http_detail(head: bytes, body: bytes) -> str:
    words = head.split(b" ", 2)
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    try:
        fields = json.loads(body)
    except ValueError:
        fields = None
    return json.dumps({"status": status, "json": fields})


def _reset(made: socket.socket) -> None:
    """Close at once, with RST: no TIME_WAIT, here or in the node's conntrack."""
    if made.type == socket.SOCK_STREAM:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    made.close()


def _name_of(made: socket.socket) -> str:
    name = made.getsockname()
    return join_host_port(name[0], name[1])


Send = Callable[[Flow, float], Any]


async def judge_flow(flow: Flow, send: Send) -> str | None:
    """Send as many tries as the expectation needs; None when it holds, else what is wrong, in one line."""
    expect: Expect = flow.expect
    if isinstance(expect, ExpectEndpoints):
        wrong = await _judge_endpoints(flow, expect, send)
    elif isinstance(expect, ExpectVerdict):
        wrong = await _judge_verdict(flow, expect, send)
    else:
        wrong = await _judge_http(flow, expect, send)
    return None if wrong is None else f"{flow.name!r}: {flow}: {wrong}"


def tries_for(flow: Flow) -> tuple[int, int]:
    """At least and at most how many tries: enough to meet a wrong answer, and to miss none of n by chance.

    An endpoint that takes one of n connections escapes 30 n tries with probability e^-30.
    """
    expect = flow.expect
    if flow.source_port or flow.connection is not None:
        return 1, 1
    if not isinstance(expect, ExpectEndpoints):
        return 2, 2
    count = len(expect.endpoints)
    if expect.sticky:
        tries = SLOW_TRIES if flow.pause else STICKY_TRIES
        return tries, tries
    if flow.pause:
        return count, 30 * count
    return (6 if count == 1 else 4 * count), (6 if count == 1 else 30 * count)


async def _judge_endpoints(flow: Flow, expect: ExpectEndpoints, send: Send) -> str | None:
    least, most = tries_for(flow)
    # In order where one try must see what the one before has left behind.
    width = 1 if expect.sticky or flow.pause else SIDE_BY_SIDE
    counts = dict.fromkeys(expect.endpoints, 0)
    done = 0
    single = most == 1
    while done < least or (done < most and not single and not expect.sticky and not all(counts.values())):
        if flow.pause and done:
            await asyncio.sleep(flow.pause)
        batch = min(width, (least if done < least else most) - done)
        replies: list[Reply] = await asyncio.gather(*(send(flow, ANSWER_SECONDS) for _ in range(batch)))
        for reply in replies:
            done += 1
            wrong = _unlike(reply, expect)
            if wrong is not None:
                return f"expected {_describe(expect)}, but {wrong} on try {done}"
            counts[reply.at] += 1
        if expect.sticky and sum(map(bool, counts.values())) > 1:
            return f"expected to stick to one endpoint, but after {done} tries {_tell(counts)}"
    if not single and not expect.sticky and not all(counts.values()):
        return f"expected {_describe(expect)}, but after {done} tries {_tell(counts)}"
    return None


def _unlike(reply: Reply, expect: ExpectEndpoints) -> str | None:
    if not reply.from_endpoint or reply.at not in expect.endpoints:
        return str(reply)
    wanted = expect.masquerade.get(reply.at)
    if wanted is not None and wanted != reply.masqueraded:
        return str(reply)
    return None


async def _judge_verdict(flow: Flow, expect: ExpectVerdict, send: Send) -> str | None:
    seconds = {"drop": DROP_SECONDS, "reject": REFUSE_SECONDS, "unproxied": ANSWER_SECONDS}[expect.result]
    least, _ = tries_for(flow)
    replies: list[Reply] = await asyncio.gather(*(send(flow, seconds) for _ in range(least)))
    for reply in replies:
        if not _fits(reply, expect, flow):
            return f"expected {_describe(expect)}, but {reply}"
    return None


def _fits(reply: Reply, expect: ExpectVerdict, flow: Flow) -> bool:
    if expect.result == "drop":
        return reply.outcome == "silent"
    if expect.result == "reject":
        return reply.outcome == "refused"
    called = join_host_port(flow.address, flow.port)
    return reply.outcome == "refused" or (
        reply.outcome == "answered" and reply.by == "world" and reply.at == called
    )


async def _judge_http(flow: Flow, expect: ExpectHTTP, send: Send) -> str | None:
    reply: Reply = await send(flow, ANSWER_SECONDS)
    wanted = f"expected HTTP {expect.status}" + (f" with {dict(expect.json)}" if expect.json else "")
    if reply.outcome != "answered":
        return f"{wanted}, but {reply}"
    got = json.loads(reply.detail)
    fields = got["json"] if isinstance(got["json"], dict) else {}
    if got["status"] != expect.status or any(
        key not in fields or fields[key] != value for key, value in expect.json.items()
    ):
        return f"{wanted}, but it was HTTP {got['status']} with {got['json']}"
    return None


def _describe(expect: ExpectEndpoints | ExpectVerdict) -> str:
    if isinstance(expect, ExpectVerdict):
        return {
            "reject": "a refusal",
            "drop": "silence",
            "unproxied": "that the proxy leaves it alone (the outside world answers, or the node refuses)",
        }[expect.result]
    words = {True: " masqueraded", False: " unmasqueraded", None: ""}
    each = [f"{endpoint}{words[expect.masquerade.get(endpoint)]}" for endpoint in expect.endpoints]
    return " and ".join(each) if not expect.sticky else "one of " + ", ".join(each)


def _tell(counts: dict[str, int]) -> str:
    return ", ".join(f"{endpoint} had answered {count} times" for endpoint, count in counts.items())
