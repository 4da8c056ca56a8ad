"""The chains of a Service port's endpoints: those that choose one (KUBE-SVC, KUBE-SVL), those that translate (KUBE-SEP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from proxycore.api import Endpoint, Pool, PoolName, ServiceState

from . import names
from .rules import Rule, Rules
from .words import MASQUERADE, Words, chances, comment, printed, safe


def usable(pool: Pool | None) -> tuple[Endpoint, ...]:
    """The endpoints of a pool that new connections may go to."""
    if pool is None:
        return ()
    endpoints = pool.endpoints
    if [endpoint.weight for endpoint in endpoints].count(1) == len(endpoints):
        return endpoints
    return tuple([endpoint for endpoint in endpoints if endpoint.weight > 0])


def balancer(state: ServiceState, pool: PoolName) -> str:
    """Name of the chain that chooses an endpoint of that pool."""
    if pool is PoolName.CLUSTER:
        return names.service_chain(state.name)
    return names.local_chain(state.name)


def balancing(
    state: ServiceState,
    pools: Mapping[PoolName, tuple[Endpoint, ...]],
    masquerades: Mapping[str, Sequence[Rule]],
    words: Words,
    *,
    comments: bool,
) -> dict[str, Rules]:
    """Chains of endpoints, then of the pools given, none of which is empty.

    `masquerades`: rules that stand first in the chain of that name.
    """
    service = safe(str(state.name))
    text = names.text_of(state.name)
    protocol = state.name.protocol.lower()
    seconds = state.affinity_seconds
    said = comment(service) if comments else ""
    to_choose = ""
    chains: dict[str, Rules] = {}
    choosers: dict[str, Rules] = {}
    made: dict[str, str] = {}
    for pool, endpoints in pools.items():
        known: list[Rule] = []
        drawn: list[Rule] = []
        for endpoint, chance in zip(endpoints, chances([e.weight for e in endpoints]), strict=True):
            target = str(endpoint)
            chain = made.get(target)
            if chain is None:
                chain = made[target] = names.endpoint_chain_of(text, target)
                address = printed(endpoint.address)
                remember = f"-m recent --set --name {chain} {words.recent}" if seconds else ""
                to = target if address is endpoint.address else f"[{address}]:{endpoint.port}"
                chains[chain] = (
                    f"-s {address}{words.length} {said}{MASQUERADE}",
                    f"-p {protocol} {said}{remember}-m {protocol} -j DNAT --to-destination {to}",
                )
            if comments:
                to_choose = comment(f"{service} -> {target}")
            if seconds:
                recall = f"-m recent --rcheck --seconds {seconds} --reap --name {chain} {words.recent}"
                known.append(f"{to_choose}{recall}-j {chain}")
            drawn.append(f"{to_choose}{chance}-j {chain}")
        chain = balancer(state, pool)
        choosers[chain] = (*masquerades.get(chain, ()), *known, *drawn)
    chains.update(choosers)
    return chains
