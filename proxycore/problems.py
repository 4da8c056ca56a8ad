"""Things in objects that are ignored, for people to see: whose they are, and why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

LISTED = 8
"""So many problems of one object are spelled out; a slice with a thousand bad addresses is one mistake, not a thousand."""


class Problem(NamedTuple):
    """`subject` names an object as `kubectl` would, `Service default/web`; `reason` says what of it is ignored, and why."""

    subject: str
    reason: str


def summarised(reasons: Iterable[str]) -> tuple[str, ...]:
    """The first few distinct reasons, and how many more there are."""
    distinct = tuple(dict.fromkeys(reasons))
    if len(distinct) <= LISTED:
        return distinct
    return distinct[:LISTED] + (f"and {len(distinct) - LISTED} more like these",)
