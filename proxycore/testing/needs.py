"""What a scenario asks of a backend, so that one that claims less is held to less."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..backend import Capability
from .scenario import ExpectEndpoints, ExpectVerdict, Flow, Scenario

_PROTOCOLS = {"TCP": Capability.TCP, "UDP": Capability.UDP, "SCTP": Capability.SCTP}


def scenario_needs(scenario: Scenario) -> frozenset[Capability]:
    """Without these the scenario as a whole means nothing: what its Services must be able to express.

    A scenario in one family or protocol only needs that one; one in several is cut down flow by flow.
    """
    needs = set(_families(scenario))
    for service in services(scenario):
        needs |= _service_needs(service)
    protocols = {need for need in needs if need in _PROTOCOLS.values()}
    if len(protocols) > 1:
        needs -= protocols
    return frozenset(needs)


def flow_needs(flow: Flow) -> frozenset[Capability]:
    """Without these one flow cannot come out as expected."""
    needs = {_PROTOCOLS[flow.proto.upper()], Capability.IPV6 if ":" in flow.address else Capability.IPV4}
    if isinstance(flow.expect, ExpectVerdict):
        if flow.expect.result == "reject":
            needs.add(Capability.REJECT)
        elif flow.expect.result == "drop":
            needs.add(Capability.DROP)
    elif isinstance(flow.expect, ExpectEndpoints):
        # An endpoint that sees the client is what is left without masquerading, and no proof of anything.
        if any(flow.expect.masquerade.values()):
            needs.add(Capability.MASQUERADE)
        if any(endpoint.rpartition(":")[0].strip("[]") == flow.source for endpoint in flow.expect.endpoints):
            needs.add(Capability.HAIRPIN)
    return frozenset(needs)


def services(scenario: Scenario) -> Iterator[Mapping[str, Any]]:
    """Every Service that the scenario applies at any time."""
    for state in scenario.states():
        for item in state.apply:
            if item["kind"] == "Service":
                yield item


def _families(scenario: Scenario) -> set[Capability]:
    addresses = [flow.address for state in scenario.states() for flow in state.flows]
    families = {Capability.IPV6 if ":" in address else Capability.IPV4 for address in addresses}
    return families if len(families) == 1 else set()


def _service_needs(service: Mapping[str, Any]) -> set[Capability]:
    spec = service.get("spec") or {}
    ports = spec.get("ports") or ()
    ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    needs = {_PROTOCOLS[port.get("protocol") or "TCP"] for port in ports}
    asked = {
        Capability.CLUSTER_IP: spec.get("clusterIP") not in (None, "", "None"),
        Capability.NODE_PORT: any(port.get("nodePort") for port in ports),
        Capability.EXTERNAL_IP: bool(spec.get("externalIPs")),
        Capability.LOAD_BALANCER_IP: bool(ingress),
        Capability.SOURCE_RANGES: bool(spec.get("loadBalancerSourceRanges")),
        Capability.SESSION_AFFINITY: spec.get("sessionAffinity") == "ClientIP",
        Capability.ROUTE_BY_CLIENT: "Local"
        in (spec.get("externalTrafficPolicy"), spec.get("internalTrafficPolicy")),
    }
    return needs | {need for need, is_asked in asked.items() if is_asked}
