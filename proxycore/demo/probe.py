"""Clients of the demo: each dials one address again and again, as one class of client, and judges every answer."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from .lab import Lab, family

REFUSED, DROPPED = "refused", "dropped"
GRACE_SECONDS = 3.0
"""For so long after a change both the answers of before and of after are right."""
ANSWER_SECONDS = 3.0
"""An answer that is due may take so long: a lost SYN is sent again after one second."""
SILENCE_SECONDS = 0.4
"""No answer within this time, where none is due, counts as dropped."""

Masquerade = Literal["yes", "no", "hairpin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One kind of connection.

    `client` is for people, `pod` the namespace it dials from (None: the node; "": outside), `source` its address there,
    None: whatever the kernel takes.  `pool` names the set of answers in `Expected`; `masquerade`: must the pod see another
    address than the client's (hairpin: only if it calls itself)?  `sticky`: always the same pod.
    """

    service: str
    client: str
    pod: str | None
    source: str | None = None
    address: str
    port: int
    protocol: Literal["TCP", "UDP"] = "TCP"
    pool: str
    masquerade: Masquerade = "no"
    sticky: bool = False

    @property
    def dials(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}" + ("/udp" if self.protocol == "UDP" else "")


class Expected:
    """Who should answer, by name of the pool: pods, or REFUSED or DROPPED.  Any thread may ask."""

    def __init__(self, pools: dict[str, frozenset[str]]) -> None:
        self._now = dict(pools)
        self._before: dict[str, tuple[float, frozenset[str]]] = {}

    def change(self, pool: str, answers: frozenset[str]) -> None:
        """From now on these; what was right before stays right for GRACE_SECONDS."""
        self._before[pool] = (time.monotonic() + GRACE_SECONDS, self._now[pool])
        self._now[pool] = answers

    def due(self, pool: str) -> frozenset[str]:
        return self._now[pool]

    def right(self, pool: str, dialled: float) -> frozenset[str]:
        """Every answer that is right for a connection that was begun at that time."""
        until, before = self._before.get(pool, (0.0, frozenset()))
        return self._now[pool] | before if dialled < until else self._now[pool]


@dataclass(slots=True)
class Tally:
    """What one probe has seen: over all, and since the last `mark()`.  Written by the probe's thread only.

    `own` and `masqueraded`: addresses that pods saw, the client's own or another's.
    """

    answers: Counter[str] = field(default_factory=Counter)
    recent: Counter[str] = field(default_factory=Counter)
    latest: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)
    masqueraded: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def mark(self) -> None:
        """Begin a new count of `recent`."""
        self.recent = Counter()


@dataclass(frozen=True, slots=True)
class Answer:
    """`who` is a pod's name, REFUSED or DROPPED; `seen` the client's address as the pod saw it, `own` as the client."""

    who: str
    own: str = ""
    seen: str = ""


def dial(lab: Lab, probe: Probe, patience: float) -> Answer:
    """Make one connection, or send one datagram, and say what came of it."""
    kind = socket.SOCK_STREAM if probe.protocol == "TCP" else socket.SOCK_DGRAM
    place = lab.node if probe.pod is None else lab.place(probe.pod) if probe.pod else lab.outside
    with place.socket(family(probe.address), kind) as client:
        client.settimeout(patience)
        try:
            if probe.source is not None:
                client.bind((probe.source, 0))
            client.connect((probe.address, probe.port))
            client.sendall(b"who are you?\n")
            who, seen = client.recv(512).decode().split()
            return Answer(who, client.getsockname()[0], seen)
        except TimeoutError:
            return Answer(DROPPED)
        except (ConnectionRefusedError, ConnectionResetError):
            return Answer(REFUSED)
        except (OSError, ValueError) as error:
            return Answer(f"error: {error}")


class Dialler:
    """Runs one probe on a thread of its own, from start() to stop()."""

    def __init__(self, lab: Lab, probe: Probe, expected: Expected, pause_seconds: float) -> None:
        self.probe = probe
        self.tally = Tally()
        self._lab = lab
        self._expected = expected
        self._pause = pause_seconds
        self._end = threading.Event()
        self._pinned: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"dial-{probe.dials}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        # Not all in step, so that the picture and the machine's load are even.
        while not self._end.wait(self._pause * random.uniform(0.5, 1.5)):
            due = self._expected.due(self.probe.pool)
            patience = SILENCE_SECONDS if DROPPED in due else ANSWER_SECONDS
            begun = time.monotonic()
            self._note(dial(self._lab, self.probe, patience), begun)

    def _note(self, answer: Answer, begun: float) -> None:
        tally = self.tally
        now = time.monotonic()
        tally.answers[answer.who] += 1
        tally.recent[answer.who] += 1
        tally.first.setdefault(answer.who, now)
        tally.latest[answer.who] = now
        wrong = self._fault(answer, begun)
        if wrong:
            tally.wrong.append(wrong)
        elif answer.seen:
            (tally.own if answer.seen == answer.own else tally.masqueraded).add(answer.seen)

    def _fault(self, answer: Answer, begun: float) -> str:
        """What is wrong with an answer, empty if nothing is."""
        right = self._expected.right(self.probe.pool, begun)
        if answer.who not in right:
            return f"got {answer.who}, expected {' or '.join(sorted(right))}"
        if answer.who in (REFUSED, DROPPED):
            return ""
        masqueraded = answer.seen != answer.own
        due = (
            answer.who == self.probe.pod
            if self.probe.masquerade == "hairpin"
            else self.probe.masquerade == "yes"
        )
        if masqueraded != due:
            wish = "yes" if due else "no"
            return f"{answer.who} saw {answer.seen}, the client is {answer.own}: masquerade should be {wish}"
        if self.probe.sticky:
            self._pinned = self._pinned or answer.who
            if answer.who != self._pinned:
                return f"got {answer.who}, but this client belongs to {self._pinned}"
        return ""


class HeldConnection:
    """One TCP connection that is never closed while the demo changes everything around it; it asks again and again."""

    def __init__(self, lab: Lab, probe: Probe, pause_seconds: float) -> None:
        self.asked = 0
        self.pod = ""
        self.fault = ""
        self._lab = lab
        self._probe = probe
        self._pause = pause_seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="held", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        probe = self._probe
        with self._lab.outside.socket(family(probe.address), socket.SOCK_STREAM) as client:
            client.settimeout(ANSWER_SECONDS)
            try:
                if probe.source is not None:
                    client.bind((probe.source, 0))
                client.connect((probe.address, probe.port))
                while not self._end.wait(self._pause):
                    client.sendall(b"who are you?\n")
                    who = client.recv(512).decode().partition(" ")[0]
                    if who != (self.pod or who) or not who:
                        raise ConnectionError(f"{who or 'end of stream'} instead of {self.pod}")
                    self.pod = who
                    self.asked += 1
            except OSError as error:
                self.fault = f"the held connection to {probe.dials} broke after {self.asked} answers: {error}"
