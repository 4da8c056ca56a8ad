"""Packets to loopback addresses from other hosts: what guards against them, and who had them routed.

With `net.ipv4.conf.all.route_localnet` the kernel routes them, for node ports on 127.0.0.1.  IPv4 alone.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Iterator

from ..kubechains import LOCALNET_MARKER
from . import nftables, xtables
from .xtables import Tools

_CHAIN = "KUBE-FIREWALL"
_JUMP = f"-A INPUT -j {_CHAIN}"
_GUARD = frozenset(
    f"-A {_CHAIN} ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate {states} -j DROP".replace(
        " ", "\0"
    )
    for states in ("RELATED,ESTABLISHED,DNAT",)
)
"""As the kubelet has it, and the backend iptables; without its comment."""


def guarded() -> str:
    """Name of the tools in whose rules a guard is in force; empty: there is none.

    Nothing is changed, made or loaded.  Raises KernelError: there may be one where we cannot look.
    """
    for tools in _tools():
        if tools.variant == "legacy" and not _has_legacy(tools, "filter"):
            continue
        if xtables.save(tools, _is_guarded, tables=("filter",)):
            return str(tools)
    return ""


def _is_guarded(lines: Iterable[str]) -> bool:
    led = held = False
    for line in lines:
        led = led or line.rstrip() == _JUMP
        held = held or (line.startswith(f"-A {_CHAIN} ") and _without_comment(line) in _GUARD)
    return led and held


def _without_comment(rule: str) -> str:
    try:
        words = iter(shlex.split(rule))
    except ValueError:
        return ""
    found: list[str] = []
    for word in words:
        if word == "--comment":
            next(words, "")
            # And the `-m comment` before it.
            del found[-2:]
        else:
            found.append(word)
    return "\0".join(found)


def remembered() -> frozenset[str]:
    """Names of the tools in whose rules it is said that a run of ours had such packets routed.

    Raises KernelError: we may not look.
    """
    return frozenset(str(tools) for tools in _tools() if _has_marker(tools))


def _has_marker(tools: Tools) -> bool:
    if tools.variant == "legacy":
        return _has_legacy(tools, "nat") and xtables.save(tools, _remembers, tables=("nat",))
    with nftables.NfTables() as kernel:
        return kernel.has_chain("ip", "nat", LOCALNET_MARKER)


def _remembers(lines: Iterable[str]) -> bool:
    return any(line.startswith(f":{LOCALNET_MARKER} ") for line in lines)


def remember(names: Collection[str]) -> None:
    """Make the chain that says so, with the tools of IPv4 among these.  Raises KernelError."""
    for tools in _tools():
        if str(tools) in names:
            xtables.restore(tools, f"*nat\n:{LOCALNET_MARKER} - [0:0]\nCOMMIT\n")


def _tools() -> Iterator[Tools]:
    return (tools for tools in xtables.find() if tools.family == "IPv4")


def _has_legacy(tools: Tools, table: str) -> bool:
    return table in (xtables.legacy_tables(tools.family) or ())
