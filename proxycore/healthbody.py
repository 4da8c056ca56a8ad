"""What health endpoints say: kube-proxy's JSON with our checks beside it, and the text form of Kubernetes' own servers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from .health import Endpoint, Verdict
from .status import Facts

NEVER = "0001-01-01T00:00:00Z"
"""How kube-proxy writes a time that has not come."""


def stamp(seconds: float | None) -> str:
    """RFC 3339 in UTC of seconds since the epoch; `NEVER` for None."""
    if seconds is None:
        return NEVER
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")
    return text.replace("+00:00", "Z")


def json_body(
    endpoint: Endpoint, facts: Facts, verdict: Verdict, since: Mapping[str, float], *, in_full: bool
) -> bytes:
    """The JSON body.

    Keys and their meaning are kube-proxy's: `healthy`, of the whole and of each family, leaves the node's own state out;
    `lastUpdated` is now while the answer is 200, else the time of the last success; `nodeEligible` is in /healthz alone.
    `checks` is ours.  `since`: since when each check has been as it is, in seconds since the epoch.  `in_full`: with
    particulars, which are not for everybody who can reach a port.
    """
    status = facts.status
    well = verdict.proxy_healthy if endpoint == "healthz" else verdict.healthy(endpoint)
    body: dict[str, Any] = {
        "lastUpdated": stamp(facts.now if verdict.healthy(endpoint) else status.last_success),
        "currentTime": stamp(facts.now),
    }
    if endpoint == "healthz":
        body["nodeEligible"] = status.node.eligible
    body["healthy"] = well
    body["status"] = {
        family: {"lastUpdated": stamp(status.last_success), "healthy": well} for family in status.families
    }
    body["checks"] = {
        check.name: {
            "healthy": check.healthy,
            "detail": check.detail,
            **({"since": stamp(since[check.name])} if check.name in since else {}),
            "gates": sorted(check.gates),
            **({"more": list(check.more)} if in_full and check.more else {}),
        }
        for check in verdict.checks
    }
    return json.dumps(body).encode()


def verbose_body(
    endpoint: Endpoint, facts: Facts, verdict: Verdict, since: Mapping[str, float], *, in_full: bool
) -> bytes:
    """The text of `?verbose`: `[+]` and `[-]` for checks that count here, `[i]` for those that are for information."""
    lines: list[str] = []
    for check in verdict.checks:
        counts = endpoint in check.gates
        if check.healthy:
            lines.append(f"[{'+' if counts else 'i'}]{check.name} ok")
            continue
        age = facts.now - since[check.name] if check.name in since else 0.0
        lasting = f" ({age:.0f} s)" if age >= 1 else ""
        lines.append(f"[{'-' if counts else 'i'}]{check.name} failed{lasting}: {check.detail}")
        if in_full:
            lines += (f"    {particular}" for particular in check.more)
    lines.append(f"{endpoint} check {'passed' if verdict.healthy(endpoint) else 'failed'}")
    return "".join(f"{line}\n" for line in lines).encode()
