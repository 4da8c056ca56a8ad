"""What each class of client gets at a frontend, and which flags of a value say so.

The rules know five flags; not every mixture of answers can be written in them.  Which can is found by trying all.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

from proxycore.api import Pool, PoolName, Route, Routes, ServiceState, WhenEmpty

from .marks import REJECTED, Parts
from .shape import Shape

ClientClass = Literal["local_pod", "node", "outside"]
CLASSES: tuple[ClientClass, ...] = ("local_pod", "node", "outside")
"""In the order of look-up."""


class Fate(NamedTuple):
    """What happens to a client: it is led to the pool, or, if that is None, refused or dropped by the verdict."""

    pool: PoolName | None
    masquerade: bool = False
    verdict: WhenEmpty | None = None

    def __str__(self) -> str:
        if self.pool is None:
            return "rejected" if self.verdict is WhenEmpty.REJECT else "dropped"
        return f"the {self.pool.value} pool{' masqueraded' if self.masquerade else ''}"


REJECT = Fate(None, verdict=WhenEmpty.REJECT)
DROP = Fate(None, verdict=WhenEmpty.DROP)
Fates = tuple[Fate, ...]
"""One for each class of client there is."""


def classes_of(shape: Shape) -> tuple[ClientClass, ...]:
    """Classes of client that there are."""
    if not shape.local_pods:
        return CLASSES[1:]
    return CLASSES[:1] if shape.everyone_is_local else CLASSES


def is_usable(pool: Pool | None) -> bool:
    """May a new connection go somewhere in it?"""
    return pool is not None and any(endpoint.weight > 0 for endpoint in pool.endpoints)


def fates(routes: Routes, state: ServiceState, classes: tuple[ClientClass, ...]) -> Fates:
    """What the model wants for each class."""
    return tuple(_fate(_route(routes, client), state) for client in classes)


def _route(routes: Routes, client: ClientClass) -> Route:
    if client == "local_pod":
        return routes.local_pod
    return routes.node if client == "node" else routes.outside


def _fate(route: Route, state: ServiceState) -> Fate:
    pool = state.pool(route.pool)
    if is_usable(pool):
        return Fate(route.pool, route.masquerade)
    return DROP if pool is not None and pool.when_empty is WhenEmpty.DROP else REJECT


def meaning(parts: Parts, classes: tuple[ClientClass, ...]) -> Fates:
    """What the rules do with clients under a value that says this; number and class of target port do not matter.

    Written beside the rules of the mangle table, and in their order.
    """
    return tuple(_meaning(parts, client, "local_pod" in classes) for client in classes)


def _meaning(parts: Parts, client: ClientClass, detector: bool) -> Fate:
    if parts.reject:
        return REJECT
    pool, masquerade, dropped = parts.pool, parts.masquerade, parts.dropped
    if parts.short and client != "outside":
        pool, dropped = PoolName.CLUSTER, False
        masquerade = masquerade or client == "node"
    if dropped:
        return DROP
    if parts.masquerade_others and detector and client != "local_pod":
        masquerade = True
    return Fate(pool, masquerade)


_OURS = [
    Parts(pool=pool, masquerade=masquerade, masquerade_others=others, short=short, dropped=dropped, number=1)
    for short in (False, True)
    for others in (False, True)
    for masquerade in (False, True)
    if not (masquerade and others)
    for pool in PoolName
    for dropped in (False, True)
]


@lru_cache(maxsize=4096)
def flags_for(wanted: Fates, usual: Fates, classes: tuple[ClientClass, ...]) -> Parts | None:
    """Flags that give each class what is wanted; None: there are none.

    `usual`: what they would get if no pool were empty.  Flags that fit it as well come first, so that a frontend whose
    pool runs empty gets one more flag and keeps the others.
    """
    if all(fate == REJECT for fate in wanted):
        return REJECTED
    fitting = [parts for parts in _OURS if meaning(parts, classes) == wanted]
    fitting.sort(key=lambda parts: meaning(parts._replace(dropped=False), classes) != usual)
    return fitting[0] if fitting else None


def usual(routes: Routes, classes: tuple[ClientClass, ...]) -> Fates:
    """What clients would get if no pool were empty."""
    return tuple(
        Fate(route.pool, route.masquerade) for route in (_route(routes, client) for client in classes)
    )


def told(wanted: Fates, classes: tuple[ClientClass, ...]) -> str:
    """For people: `local pod: the cluster pool, node: rejected`."""
    return ", ".join(
        f"{client.replace('_', ' ')}: {fate}" for client, fate in zip(classes, wanted, strict=True)
    )
