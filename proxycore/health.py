"""Is the proxy well?  Pure verdicts on what the engine publishes about itself.

Three questions, three endpoints:

- `livez`: would a restart help?  Red only for what a restart cures: threads of ours that hang.  Never for an absent API
  server, a Service that is refused, a broken observer or a kernel that refuses: restarting would only lose time.
- `readyz`: does this node serve Services as the cluster wants them now?
- `healthz`: kube-proxy's question, for load balancers and the autoscaler: is the node to get traffic?

Semantics: kube-proxy's /healthz and /livez (KEP-3836), but that neither `healthz` nor `readyz` is green before the first
programming: kube-proxy's sync loop reports itself well when it starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from .model import ServicePortName
from .status import Facts, Status

Endpoint = Literal["livez", "readyz", "healthz"]
ENDPOINTS: tuple[Endpoint, ...] = ("livez", "readyz", "healthz")

ENGINE_DEADLINE_SECONDS = 30.0
"""The engine's loop turns every few seconds; one that has not for so long hangs."""
NAMED = 5
"""So many particulars of a check are told; more are only counted."""
LONGEST_TEXT = 400

_ALL: frozenset[Endpoint] = frozenset(ENDPOINTS)
_SERVING: frozenset[Endpoint] = frozenset({"readyz", "healthz"})
_NOTHING: frozenset[Endpoint] = frozenset()

CHECKS: Mapping[str, frozenset[Endpoint]] = {
    "engine": _ALL,
    "backend": _ALL,
    "pending": _ALL,
    "source-thread": _ALL,
    "programmed": _SERVING,
    "source": frozenset({"readyz"}),
    "node": frozenset({"healthz"}),
    "quarantined": _NOTHING,
    "unsupported": _NOTHING,
    "objects": _NOTHING,
    "drift": _NOTHING,
    "observers": _NOTHING,
    "saved-state": _NOTHING,
    "takeover": _NOTHING,
    "configuration": _NOTHING,
    "servers": _NOTHING,
}
"""All checks in their order, and the endpoints that each may turn red."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at.

    `detail`: a sentence for people, fit for everybody who can reach a health port.  `more`: particulars that may name objects of
    the API or hold text of plugins, `NAMED` at most.  `age_seconds`: how long it has been so, None where the facts do not
    tell.  `gates`: the endpoints that it turns red while not healthy; none: it is for information.
    """

    name: str
    healthy: bool
    detail: str
    age_seconds: float | None = None
    gates: frozenset[Endpoint] = _NOTHING
    more: tuple[str, ...] = ()


class Verdict(msgspec.Struct, frozen=True):
    """All checks, in a fixed order and each there every time."""

    checks: tuple[Check, ...]

    def failing(self, endpoint: Endpoint) -> tuple[Check, ...]:
        """The checks that turn this endpoint red."""
        return tuple(check for check in self.checks if not check.healthy and endpoint in check.gates)

    def healthy(self, endpoint: Endpoint) -> bool:
        """Is it green?"""
        return not self.failing(endpoint)

    @property
    def proxy_failing(self) -> tuple[Check, ...]:
        """What is wrong with the proxy itself: `healthz` without the node's own state."""
        return tuple(check for check in self.failing("healthz") if check.name != "node")

    @property
    def proxy_healthy(self) -> bool:
        """What health-check node ports and observers are told."""
        return not self.proxy_failing


def sentence(checks: Iterable[Check]) -> str:
    """What is wrong, in one line, particulars included: `backend: apply of nft has been running for …`; empty if nothing is."""
    return "; ".join(": ".join((check.name, check.detail, *check.more)) for check in checks)


def judge(facts: Facts) -> Verdict:
    """Judge all of it.  Nothing is remembered: the same facts give the same verdict."""
    return Verdict(
        (
            _engine(facts),
            _backend(facts),
            _pending(facts),
            _source_thread(facts.status),
            _programmed(facts.status),
            _source(facts),
            _node(facts.status),
            _set_aside("quarantined", "set aside after a failure", facts.status.quarantined),
            _set_aside("unsupported", "not supported by the backend", facts.status.unsupported),
            _objects(facts.status),
            _drift(facts.status),
            _observers(facts),
            _saved_state(facts),
            _takeover(facts),
            _configuration(facts),
            _servers(facts),
        )
    )


# -- what gates ----------------------------------------------------------------------------------------------------


def _engine(facts: Facts) -> Check:
    silent = facts.engine_silent_seconds
    if silent <= ENGINE_DEADLINE_SECONDS:
        return Check(name="engine", healthy=True, detail="its loop turns", gates=_ALL)
    detail = f"its loop has not turned for {silent:.0f} s, past the deadline of {ENGINE_DEADLINE_SECONDS:g} s"
    return Check(name="engine", healthy=False, detail=detail, age_seconds=silent, gates=_ALL)


def _backend(facts: Facts) -> Check:
    """A call that hangs is not ended by us, as Python cannot; the process has to go."""
    if facts.backend_overdue:
        return Check(name="backend", healthy=False, detail=cut(facts.backend_overdue), gates=_ALL)
    return Check(name="backend", healthy=True, detail="no call is past its deadline", gates=_ALL)


def _pending(facts: Facts) -> Check:
    status = facts.status
    if status.pending_since is None:
        return Check(name="pending", healthy=True, detail="nothing waits to be programmed", gates=_ALL)
    waited = max(0.0, facts.monotonic - status.pending_since)
    limit = 2 * facts.sync_period_seconds
    detail = f"the oldest change has been waiting for {waited:.0f} s"
    cause, more = _cause(status)
    if waited < limit:
        said = f"{detail}: {cause}" if cause else detail
        return Check(name="pending", healthy=True, detail=said, age_seconds=waited, gates=_ALL, more=more)
    if not cause and facts.backend_overdue:
        cause = "a call of the backend is past its deadline"
    detail = f"{detail}, past the limit of {limit:g} s"
    return Check(
        name="pending",
        healthy=False,
        detail=f"{detail}: {cause}" if cause else f"{detail}, although the kernel answers",
        age_seconds=waited,
        # A restart helps where no cause can be told; a backend that hangs turns livez red by its own check.
        gates=_SERVING if cause else _ALL,
        more=more,
    )


def _cause(status: Status) -> tuple[str, tuple[str, ...]]:
    """Why nothing can be programmed although everything works as it should, and the particulars; empty: nothing is known."""
    if status.refused:
        return "the backend refuses", (cut(status.refused),)
    if status.held:
        return "something cannot be read that only the kernel still knows", (cut(status.held),)
    return "", ()


def _programmed(status: Status) -> Check:
    if status.applied_total:
        return Check(
            name="programmed", healthy=True, detail=f"generation {status.generation}", gates=_SERVING
        )
    cause, more = _cause(status)
    if not status.synced:
        why = "the source has not delivered everything"
    elif cause:
        why = cause
    elif not status.started:
        why = "the backend has not started"
    else:
        why = "the first batch is under way"
    detail = f"nothing has been programmed yet: {why}"
    return Check(name="programmed", healthy=False, detail=detail, gates=_SERVING, more=more)


def _source(facts: Facts) -> Check:
    """A source that has ended, a recording that is over, is not stale: there is nothing that it could miss."""
    status = facts.status
    gates: frozenset[Endpoint] = frozenset({"readyz"})
    age = max(0.0, facts.now - status.source_since) if status.source_since else None
    state, reason = status.source.state, status.source.reason
    name = f"{facts.source_name} " if facts.source_name else ""
    more = (cut(reason),) if reason else ()
    lasting = f" for {age:.0f} s" if age is not None and state == "stale" else ""
    detail = cut(f"{name}{state}{lasting}")
    if not status.synced:
        detail = cut(f"{name}has not delivered everything yet, {state}{lasting}")
        return Check(name="source", healthy=False, detail=detail, age_seconds=age, gates=gates, more=more)
    stale = state == "stale" and (age is None or age > facts.stale_after_seconds)
    if state == "stale" and not stale:
        detail = cut(f"{detail} (not ready after {facts.stale_after_seconds:g} s)")
    return Check(
        name="source",
        healthy=not stale and state != "failed",
        detail=detail,
        age_seconds=age,
        gates=gates,
        more=more,
    )


def _source_thread(status: Status) -> Check:
    """One that has ended by a bug delivers nothing more, and nobody but a new process starts it again."""
    name, failed = "source-thread", status.source.state == "failed"
    detail = "has ended by a bug" if failed else "has not failed"
    more = (cut(status.source.reason),) if failed else ()
    return Check(name=name, healthy=not failed, detail=detail, gates=CHECKS[name], more=more)


def _node(status: Status) -> Check:
    node = status.node
    detail = "may get traffic" if node.eligible else cut(node.why)
    return Check(name="node", healthy=node.eligible, detail=detail, gates=CHECKS["node"])


# -- what is for information ---------------------------------------------------------------------------------------


def _set_aside(name: str, what: str, services: Mapping[ServicePortName, str]) -> Check:
    if not services:
        return Check(name=name, healthy=True, detail="none")
    first = sorted(services)[:NAMED]
    more = tuple(cut(f"{port} {port.protocol} {port.family}: {services[port]}") for port in first)
    return Check(
        name=name, healthy=False, detail=f"{_count(len(services), 'Service port')} {what}", more=more
    )


def _objects(status: Status) -> Check:
    if not status.troubles:
        return Check(name="objects", healthy=True, detail="all can be read")
    more = tuple(cut(f"{subject}: {status.troubles[subject]}") for subject in sorted(status.troubles)[:NAMED])
    detail = f"{_count(len(status.troubles), 'object or file', 'objects or files')} cannot be read, the last good state stays"
    return Check(name="objects", healthy=False, detail=detail, more=more)


def _drift(status: Status) -> Check:
    found = f"found {status.drift_total} times so far" if status.drift_total else "never found"
    if status.drift_unrepaired:
        detail = f"the kernel differs from what was programmed and has not been put right yet; {found}"
        return Check(name="drift", healthy=False, detail=detail)
    return Check(name="drift", healthy=True, detail=found)


def _observers(facts: Facts) -> Check:
    wrong: list[str] = []
    more: list[str] = []
    for observer in facts.observers:
        if observer.overdue:
            wrong.append(observer.overdue)
        elif observer.error:
            wrong.append(f"{observer.name} failed")
            more.append(cut(f"{observer.name}: {observer.error}"))
    if facts.left_out:
        wrong.append(f"{_count(len(facts.left_out), 'observer')} left out")
        more += map(cut, facts.left_out)
    if not wrong:
        return Check(
            name="observers", healthy=True, detail=f"{_count(len(facts.observers), 'observer')} well"
        )
    return Check(name="observers", healthy=False, detail=cut("; ".join(wrong)), more=tuple(more[:NAMED]))


def _saved_state(facts: Facts) -> Check:
    saved = facts.saved
    if saved is None:
        return Check(name="saved-state", healthy=True, detail="not kept")
    age = max(0.0, facts.now - saved.saved_at) if saved.saved_at is not None else None
    written = f"written {age:.0f} s ago" if age is not None else "not written yet"
    if saved.problem:
        detail = cut(f"{saved.path}, {written}: {saved.problem}")
        return Check(name="saved-state", healthy=False, detail=detail)
    return Check(name="saved-state", healthy=True, detail=written)


def _takeover(facts: Facts) -> Check:
    if facts.takeover:
        return Check(
            name="takeover",
            healthy=False,
            detail="rules of another proxy are here, or may be",
            more=(cut(facts.takeover),),
        )
    return Check(name="takeover", healthy=True, detail="nothing of another proxy is known to be left")


def _configuration(facts: Facts) -> Check:
    config = facts.config
    if config is None:
        return Check(name="configuration", healthy=True, detail="not followed")
    wrong: list[str] = []
    if config.problem:
        wrong.append("a newer one is refused")
    if config.needs_restart:
        wrong.append(f"waits for a restart: {', '.join(config.needs_restart)}")
    detail = cut("; ".join(wrong)) or "the newest is in force"
    more = (cut(config.problem),) if config.problem else ()
    return Check(name="configuration", healthy=not wrong, detail=detail, more=more)


def _servers(facts: Facts) -> Check:
    closed = [f"{server.address}: {server.problem}" for server in facts.servers if server.problem]
    if closed:
        return Check(name="servers", healthy=False, detail=cut(f"cannot be opened: {'; '.join(closed)}"))
    opened = ", ".join(server.address for server in facts.servers)
    return Check(name="servers", healthy=True, detail=f"open: {opened}" if opened else "none wanted")


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def cut(text: str) -> str:
    """One line of at most `LONGEST_TEXT` printable characters."""
    line = "".join(char if char.isprintable() else " " for char in text[: LONGEST_TEXT + 1])
    return line if len(line) <= LONGEST_TEXT else f"{line[: LONGEST_TEXT - 1]}…"
