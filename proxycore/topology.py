"""Which of the ready endpoints are near enough, as the EndpointSlice controller hinted.

Semantics: KEP-2433 (zones) and KEP-3015 (nodes).  Neither `trafficDistribution` nor any annotation is read: the hints are
the whole interface.
"""

from __future__ import annotations

from enum import Enum

from .model import Endpoint
from .slices import EndpointHints


class TopologyMode(Enum):
    """How ready endpoints are narrowed down."""

    SAME_NODE = "PreferSameNode"
    SAME_ZONE = "PreferSameZone"
    NONE = "none"


def mode(hints: list[EndpointHints | None], node_name: str, zone: str | None) -> TopologyMode:
    """The mode that the hints of *all ready endpoints* of a Service port allow.

    One endpoint without a node hint rules out the node level, one without a zone hint the zone level.  A node without a
    zone matches no zone.
    """
    if not hints or None in hints:
        return TopologyMode.NONE
    known = [hint for hint in hints if hint is not None]
    if all(hint.nodes for hint in known) and any(node_name in hint.nodes for hint in known):
        return TopologyMode.SAME_NODE
    if zone and all(hint.zones for hint in known) and any(zone in hint.zones for hint in known):
        return TopologyMode.SAME_ZONE
    return TopologyMode.NONE


def admits(chosen: TopologyMode, hint: EndpointHints | None, node_name: str, zone: str | None) -> bool:
    """Does an endpoint with that hint pass the mode?"""
    if chosen is TopologyMode.NONE:
        return True
    if hint is None:
        return False
    return node_name in hint.nodes if chosen is TopologyMode.SAME_NODE else zone in hint.zones


def nearest(
    ready: list[tuple[Endpoint, EndpointHints | None]], node_name: str, zone: str | None
) -> tuple[Endpoint, ...]:
    """The ready endpoints that clients of this node are to use; never empty when there is a ready one."""
    chosen = mode([hint for _, hint in ready], node_name, zone)
    return tuple([endpoint for endpoint, hint in ready if admits(chosen, hint, node_name, zone)])
