"""Who owns an address and port.

Two Services may ask for the same one: an external IP is free text.  It has one owner, the same on every node whatever the
order of events: a cluster IP comes before a load-balancer address, that before an external IP, that before a node port;
then the older Service, then the first by namespace and name.  A loser gets it when the owner leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from .frontends import ServiceKey
from .model import Family, Frontend, FrontendKind, PoolName, Protocol, ServiceState
from .timestamps import seconds_of

_RANK = {
    FrontendKind.CLUSTER_IP: 0,
    FrontendKind.LOAD_BALANCER_IP: 1,
    FrontendKind.EXTERNAL_IP: 2,
    FrontendKind.NODE_PORT: 3,
}


ClaimKey = tuple[Family, str | None, int, Protocol]
"""What is owned: family, address (None for a node port, which is owned on every address of the family), port, protocol.

A plain tuple, because the garbage collector stops following these.
"""


def claim_key(family: Family, frontend: Frontend) -> ClaimKey:
    """What a frontend claims."""
    return family, frontend.address, frontend.port, frontend.protocol


def claim_text(key: ClaimKey) -> str:
    """What is owned, for people: `10.0.0.1:80/TCP`, `node port 30080/UDP`."""
    family, address, port, protocol = key
    if address is None:
        return f"node port {port}/{protocol}"
    return f"[{address}]:{port}/{protocol}" if family == "IPv6" else f"{address}:{port}/{protocol}"


_NONE: dict[ClaimKey, int] = {}


class Claims:
    """The index of owners; each update costs in proportion to the Service's own frontends and their rivals."""

    def __init__(self) -> None:
        self._owner: dict[ClaimKey, ServiceKey] = {}
        self._rivals: dict[ClaimKey, set[ServiceKey]] = {}  # only what two or more claim
        self._ranks: dict[ServiceKey, dict[ClaimKey, int]] = {}
        self._created: dict[ServiceKey, str | None] = {}
        self._lost: dict[ServiceKey, dict[ClaimKey, ServiceKey]] = {}

    def update(
        self, name: ServiceKey, states: Iterable[ServiceState], created: str | None
    ) -> set[ServiceKey]:
        """Take note of what a Service claims now (nothing: it is gone); `created` is its creationTimestamp.

        Returns the Services, this one included, for which something changed: which claims they hold, or who holds those
        that they lost.
        """
        ranks: dict[ClaimKey, int] = {}
        for state in states:
            family = state.name[4]
            for frontend in state.frontends:
                ranks[family, frontend.address, frontend.port, frontend.protocol] = _RANK[frontend.kind]
        before = self._ranks.get(name, _NONE)
        aged = bool(before) and self._created.get(name) != created
        if ranks == before and not aged:
            return set()
        changed: set[ServiceKey] = set()
        if ranks:
            self._ranks[name], self._created[name] = ranks, created
        else:
            del self._ranks[name], self._created[name]
        for key in before:
            if key not in ranks:
                self._withdraw(key, name, changed)
        for key, rank in ranks.items():
            known = before.get(key)
            if known is None:
                owner = self._owner.setdefault(key, name)
                if owner != name:
                    self._rivals.setdefault(key, {owner}).add(name)
                    self._elect(key, changed)
            elif (known != rank or aged) and key in self._rivals:
                self._elect(key, changed)
        if ranks.keys() != before.keys():
            changed.add(name)
        return changed

    def lost(self, name: ServiceKey) -> Mapping[ClaimKey, ServiceKey]:
        """What a Service claims and another one owns, and which."""
        return self._lost.get(name, {})

    def owner(self, key: ClaimKey) -> ServiceKey | None:
        """Who owns an address and port."""
        return self._owner.get(key)

    def granted(self, name: ServiceKey, states: tuple[ServiceState, ...]) -> tuple[ServiceState, ...]:
        """The states without the frontends that are another's, and without pools that nothing leads to any more."""
        lost = self._lost.get(name)
        if not lost:
            return states
        return tuple([_without(state, lost) for state in states])

    def _withdraw(self, key: ClaimKey, name: ServiceKey, changed: set[ServiceKey]) -> None:
        rivals = self._rivals.get(key)
        if rivals is None:
            del self._owner[key]
            return
        rivals.discard(name)
        self._forget_loss(key, name)
        self._elect(key, changed)
        if len(rivals) == 1:
            del self._rivals[key]

    def _elect(self, key: ClaimKey, changed: set[ServiceKey]) -> None:
        rivals = self._rivals[key]
        winner = min(rivals, key=lambda name: self._precedence(key, name))
        self._owner[key] = winner
        for name in rivals:
            if name == winner:
                if self._forget_loss(key, name):
                    changed.add(name)
            else:
                lost = self._lost.setdefault(name, {})
                if lost.get(key) != winner:
                    lost[key] = winner
                    changed.add(name)

    def _forget_loss(self, key: ClaimKey, name: ServiceKey) -> bool:
        lost = self._lost.get(name)
        if lost is None or key not in lost:
            return False
        del lost[key]
        if not lost:
            del self._lost[name]
        return True

    def _precedence(self, key: ClaimKey, name: ServiceKey) -> tuple[int, float, ServiceKey]:
        """A Service without a creation time counts as the youngest: it has not been at an API server yet."""
        created = seconds_of(self._created[name])
        return self._ranks[name][key], float("inf") if created is None else created, name


def _without(state: ServiceState, lost: Mapping[ClaimKey, ServiceKey]) -> ServiceState:
    family = state.name.family
    kept = tuple([frontend for frontend in state.frontends if claim_key(family, frontend) not in lost])
    if len(kept) == len(state.frontends):
        return state
    used = {
        route.pool
        for frontend in kept
        for route in (frontend.routes.local_pod, frontend.routes.node, frontend.routes.outside)
    }
    return msgspec.structs.replace(
        state,
        frontends=kept,
        cluster=state.cluster if PoolName.CLUSTER in used else None,
        local=state.local if PoolName.LOCAL in used else None,
    )
