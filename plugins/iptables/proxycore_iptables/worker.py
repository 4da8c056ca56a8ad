"""The process that uses python-iptables: requests come in as lines of JSON, answers go out by a descriptor of their own.

Run as `python -P -m proxycore_iptables.worker FAMILY DESCRIPTOR PARENT`.  Standard output is no place for answers:
python-iptables puts a pipe there while it reads an extension.  The process ends with its input, and with the thread that
started it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from proxycore import kubechains
from proxycore.errors import KernelError
from proxycore.kernel import xtlock
from proxycore.kernel.xtlock import LockHeld
from proxycore.kubechains import TableRules, is_kube_proxys
from proxycore.model import Family

from .raw import ATTEMPTS, Raw, RawTable

_PR_SET_PDEATHSIG = 1


class Request(msgspec.Struct, frozen=True):
    """What to do.  `jumps`: table, chain and rule of each; `extensions`: kind, name and options without value."""

    do: str
    lock_seconds: float = 5.0
    jumps: tuple[tuple[str, str, str], ...] = ()
    extensions: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    where: str = ""
    keep_markers: bool = False


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """`error` is empty when it was done.  `held`: of LockHeld, seconds, holders by process and command, and the file."""

    value: Any = None
    error: str = ""
    errno: int = 0
    held: tuple[float, tuple[tuple[int, str], ...], str] | None = None


def probe(raw: Raw, request: Request) -> dict[str, str]:
    """Extensions that do not load, with the reason."""
    found = {}
    for kind, name, options in request.extensions:
        reason = raw.load(name, options, target=kind == "target")
        if reason:
            found[" --".join((name, *options))] = reason
    return found


def census(raw: Raw, request: Request) -> dict[str, dict[str, int]]:
    """By table our chains, with the number of rules of others that lead to each."""
    found: dict[str, dict[str, int]] = {}
    for name in sorted(raw.names()):
        with raw.open(name) as table:
            chains = table.chains()
            ours = {chain: 0 for chain in chains if is_kube_proxys(name, chain)}
            for chain in chains:
                if chain not in ours:
                    for entry in table.entries(chain):
                        if entry.target in ours:
                            ours[entry.target] += 1
            found[name] = ours
    return found


def counters(raw: Raw, request: Request) -> dict[str, dict[str, list[int]]]:
    """By table and chain of ours, packets and bytes of each rule of nat, one after the other."""
    found: dict[str, dict[str, list[int]]] = {}
    for name in raw.names() & {"nat"}:
        with raw.open(name) as table:
            found[name] = {
                chain: table.counters(chain) for chain in table.chains() if is_kube_proxys(name, chain)
            }
    return found


def assert_jumps(raw: Raw, request: Request) -> list[tuple[str, str, str]]:
    """Put missing jumps at the head of their chains, in this order, one commit a table; returns those."""
    made: list[tuple[str, str, str]] = []
    with xtlock.held(request.lock_seconds):
        for name in dict.fromkeys(table for table, _, _ in request.jumps):
            jumps = [jump for jump in request.jumps if jump[0] == name]
            made += changed(raw, name, lambda table, jumps=jumps: _insert(table, jumps))  # type: ignore[misc]
    return made


def _insert(table: RawTable, jumps: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    missing = [jump for jump in jumps if not table.has(jump[1], jump[2])]
    for _, chain, rule in missing:
        table.insert(chain, rule)
    return missing


def cleanup(raw: Raw, request: Request) -> list[str]:
    """Take away our chains and jumps, filter first, one commit a table; returns lines about what is gone."""
    told: list[str] = []
    keep = request.keep_markers
    with xtlock.held(request.lock_seconds):
        for name in sorted(raw.names() & kubechains.SHARED.keys()):
            for rules in changed(raw, name, lambda table, name=name: _remove(table, name, keep)):  # type: ignore[misc]
                told += kubechains.tell(rules, request.where)
    return told


def _remove(table: RawTable, name: str, keep_markers: bool) -> list[TableRules]:
    rules, jumps = read(table, name)
    if keep_markers:
        rules = kubechains.without_markers(rules)
    if rules.empty:
        return []
    for chain, positions in jumps.items():
        for position in reversed(positions):
            table.delete_at(chain, position)
    gone = kubechains.removed(rules)
    for chain in (*gone, *kubechains.emptied(rules)):
        table.flush(chain)
    for chain in gone:
        table.delete_chain(chain)
    return [rules]


def read(table: RawTable, name: str) -> tuple[TableRules, dict[str, list[int]]]:
    """What there is of ours in a table; rules of others are told by where they lead alone.  And the positions of jumps."""
    chains = table.chains()
    ours = [chain for chain in chains if is_kube_proxys(name, chain)]
    mine = set(ours)
    jumps: dict[str, list[int]] = {}
    texts: list[str] = []
    used: dict[str, str] = {}
    for chain in chains:
        if chain in mine:
            continue
        for position, entry in enumerate(table.entries(chain)):
            if entry.target not in mine:
                continue
            text = f"-A {chain} -j {entry.target}"
            if kubechains.is_jump(chain, entry.target):
                jumps.setdefault(chain, []).append(position)
                texts.append(text)
            else:
                used.setdefault(entry.target, text)
    rules = TableRules(
        table=name,
        chains=tuple(ours),
        jumps=tuple(texts),
        used=used,
        filled=frozenset(chain for chain in used if not table.is_empty(chain)),
    )
    return rules, jumps


def changed(raw: Raw, name: str, change: Callable[[RawTable], list[Any]]) -> list[Any]:
    """Make a change on a fresh copy of a table until the kernel takes it; returns what `change` says it changed.

    Raises KernelError: nothing was changed.
    """
    for _ in range(ATTEMPTS):
        with raw.open(name) as table:
            done = change(table)
            if not done or table.commit():
                return done
    raise KernelError(
        f"{raw.family} table {name} was changed by others {ATTEMPTS} times while it was worked on"
    )


_REQUESTS: Mapping[str, Callable[[Raw, Request], object]] = {
    "probe": probe,
    "census": census,
    "counters": counters,
    "assert_jumps": assert_jumps,
    "cleanup": cleanup,
}


def _answer(raw: Raw, line: bytes) -> Answer:
    try:
        request = msgspec.json.decode(line, type=Request)
        return Answer(value=_REQUESTS[request.do](raw, request))
    except LockHeld as error:
        return Answer(error=str(error), held=(error.seconds, error.holders, error.path))
    except KernelError as error:
        return Answer(error=str(error), errno=error.errno)
    except Exception as error:  # noqa: BLE001 - whoever asked is to know
        return Answer(error=f"{type(error).__name__}: {error}")


def main(family: Family, descriptor: int, parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    with open(descriptor, "wb") as out:

        def say(answer: Answer) -> None:
            out.write(msgspec.json.encode(answer) + b"\n")
            out.flush()

        try:
            raw = Raw(family)
        except KernelError as error:
            say(Answer(error=str(error)))
            return
        say(Answer(value="ready"))
        for line in sys.stdin.buffer:
            say(_answer(raw, line))


if __name__ == "__main__":
    main("IPv6" if sys.argv[1] == "IPv6" else "IPv4", int(sys.argv[2]), int(sys.argv[3]))
