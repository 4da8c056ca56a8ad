"""Policy rules and routes that deliver marked packets here, by pyroute2."""

from __future__ import annotations

import errno as errnos
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from proxycore.api import Family, KernelError

from .netrules import LocalRoute, PolicyRule

Part = LocalRoute | PolicyRule
_AF: Mapping[Family, int] = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}
_ANY: Mapping[Family, str] = {"IPv4": "0.0.0.0/0", "IPv6": "::/0"}
_LOCAL = 2
"""Type of a route to the node itself."""


class Routing(Protocol):
    """Policy routing of one network namespace; raises KernelError."""

    def present(self, wanted: Collection[Part]) -> frozenset[Part]:
        """Which of these are there."""
        ...

    def add(self, part: Part) -> None: ...

    def delete(self, part: Part) -> None: ...


class NetlinkRouting:
    """That of the calling thread's network namespace."""

    def present(self, wanted: Collection[Part]) -> frozenset[Part]:
        found: set[Part] = set()
        with _opened("read policy routing") as ip:
            names = {link["index"]: link.get("ifname") for link in ip.get_links()}
            for family in {part.family for part in wanted}:
                mine = [part for part in wanted if part.family == family]
                found.update(one for rule in ip.get_rules(family=_AF[family]) if (one := _rule(family, rule)))
                for table in {part.table for part in mine if isinstance(part, LocalRoute)}:
                    routes = ip.get_routes(family=_AF[family], table=table)
                    found.update(part for each in routes if (part := _route(family, table, each, names)))
        return frozenset(part for part in wanted if part in found)

    def add(self, part: Part) -> None:
        with _opened(f"do `{part}`") as ip:
            self._change(ip, "add", part)

    def delete(self, part: Part) -> None:
        with _opened(f"undo `{part}`") as ip:
            self._change(ip, "del", part)

    @staticmethod
    def _change(ip: Any, verb: str, part: Part) -> None:
        family = _AF[part.family]
        if isinstance(part, LocalRoute):
            links = ip.link_lookup(ifname=part.interface)
            if not links:
                raise KernelError(f"there is no interface {part.interface}", errno=errnos.ENODEV)
            ip.route(
                verb,
                family=family,
                dst=_ANY[part.family],
                type="local",
                scope="host",
                table=part.table,
                oif=links[0],
            )
            return
        given = {"iifname": part.interface} if part.interface else {}
        ip.rule(
            verb,
            family=family,
            priority=part.preference,
            fwmark=part.mark,
            fwmask=part.mask,
            table=part.table,
            **given,
        )


@contextmanager
def _opened(doing: str) -> Iterator[Any]:
    # It takes long to load, and what only renders text needs it not.
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as ip:
            yield ip
    except NetlinkError as error:
        raise KernelError(f"cannot {doing}: {error}", errno=int(error.code or 0)) from error
    except OSError as error:
        raise KernelError(f"cannot {doing}: {error}", errno=error.errno or 0) from error


def _rule(family: Family, rule: Any) -> PolicyRule | None:
    mark, preference = rule.get_attr("FRA_FWMARK"), rule.get_attr("FRA_PRIORITY")
    if not mark or preference is None or rule["src_len"] or rule["dst_len"]:
        return None
    mask, table = rule.get_attr("FRA_FWMASK"), rule.get_attr("FRA_TABLE") or rule["table"]
    return PolicyRule(family, preference, mark, mask, table, rule.get_attr("FRA_IIFNAME"))


def _route(family: Family, table: int, route: Any, names: Mapping[int, str | None]) -> LocalRoute | None:
    if route["type"] != _LOCAL or route["dst_len"] or route.get_attr("RTA_TABLE") != table:
        return None
    name = names.get(route.get_attr("RTA_OIF"))
    return LocalRoute(family, table, name) if name else None
