"""`proxyctl` with parts that fail on demand: the file that SABOTAGE names says which, a word a line.

Waiting times are short here, so that what takes half a minute on a node takes two seconds.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from functools import wraps
from pathlib import Path

from proxycore import dispatch, health
from proxycore.api import ApplyResult, Failure, KernelError
from proxycore.cli import main
from proxycore.nodefacts import NodeFacts
from proxycore.observers.conntrack import ConntrackObserver
from proxycore.sources import reflector
from proxycore.sources.watchhealth import Board
from proxycore_nft.backend import NftBackend
from proxycore_nft.kernel import NetlinkKernel

ORDERS = Path(os.environ["SABOTAGE"])


def ordered(word):
    try:
        return word in ORDERS.read_text().split()
    except FileNotFoundError:
        return False


def hang(word):
    while ordered(word):
        time.sleep(0.05)


def before(owner, name, sabotage):
    """Run something before each call of a method."""
    original = getattr(owner, name)

    @wraps(original)
    def sabotaged(self, *arguments, **named):
        sabotage()
        return original(self, *arguments, **named)

    setattr(owner, name, sabotaged)


def refuse():
    if ordered("kernel-refuses"):
        raise KernelError("nf_tables: Operation not permitted", errno=errno.EPERM)


def fail():
    hang("observer-hangs")
    if ordered("observer-fails"):
        raise ValueError("a bug")


def tick(self):
    """The source's own thread, looking for trouble."""
    if ordered("source-fails"):
        raise ValueError("a bug")
    return 0.1


Board.tick = tick
before(NodeFacts, "__call__", lambda: hang("engine-hangs"))
before(NetlinkKernel, "commit", lambda: hang("backend-hangs"))
before(NetlinkKernel, "commit", refuse)
before(NetlinkKernel, "load", refuse)
before(ConntrackObserver, "proxycore_observer_applied", fail)

apply = NftBackend.proxycore_backend_apply


@wraps(apply)
def choosy(self, batch) -> ApplyResult:
    bad = tuple(
        Failure(name=change.name, why="it is bad luck")
        for change in batch.changes
        if change.name.name == "unlucky" and change.after is not None and ordered("service-refused")
    )
    if bad:
        return ApplyResult(generation=batch.generation, outcome="rejected", culprits=bad)
    return apply(self, batch)


NftBackend.proxycore_backend_apply = choosy
health.ENGINE_DEADLINE_SECONDS = 8.0
reflector.LIST_SILENCE_SECONDS = 2.0
dispatch.DEADLINES = {**dispatch.DEADLINES, "apply": 1.0}
dispatch.OBSERVER_DEADLINE = 1.0
dispatch.ObserverRunner.__init__.__kwdefaults__["deadline"] = 1.0

sys.exit(main())
