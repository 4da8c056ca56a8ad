"""What the log says of a batch."""

from __future__ import annotations

import time

from .backend import ApplyResult
from .changes import ChangeBatch
from .logs import Log

NAMED_IN_LOG = 5
"""So many Services are named in one log line, or a line each; more are only counted."""


def log_result(log: Log, batch: ChangeBatch, result: ApplyResult, seconds: float) -> None:
    """One line for a batch, one for each of the first Services that were refused, and with `-v 4` one for each change."""
    facts: dict[str, object] = {
        "generation": batch.generation,
        "changes": len(batch.changes),
        "operations": result.operations,
        "ms": round(seconds * 1e3, 2),
        "reason": batch.reason,
    }
    if batch.full:
        facts["full"] = True
    if batch.oldest_trigger_time is not None:
        facts["trigger_to_kernel_ms"] = round((time.time() - batch.oldest_trigger_time) * 1e3, 1)
    if result.outcome == "rejected":
        log.error("refused, nothing was changed", **facts, why=result.message)
    else:
        log.info("synced", **facts)
    if log.debugs():
        for item in batch.changes:
            log.debug(item.kind, service=str(item.name), protocol=item.name.protocol, family=item.name.family)
    for what, failures in (
        ("not programmed", (*result.failed, *(result.culprits or ()))),
        ("not supported by this backend", result.unsupported),
    ):
        for failure in failures[:NAMED_IN_LOG]:
            log.warning(what, service=str(failure.name), why=failure.why)
