"""Taking away all that is ours, of any run, in both families."""

from __future__ import annotations

from collections.abc import Iterator

from proxycore.api import FAMILIES, BackendContext, ConfigError, Family, HostState, KernelError
from proxycore.kernel import ipsets, ipvs, xtables

from . import netrules
from .diff import is_ours
from .entries import named
from .kernel import Kernel, NetlinkKernel
from .options import parse_options
from .routing import NetlinkRouting, Routing
from .servers import ByMark, DeleteServer
from .setkernel import NetlinkSets, Sets
from .shape import Shape, shape_of
from .tables import Tables, ToolTables


def clean_up(context: BackendContext) -> tuple[str, ...]:
    """Rules first, so that no packet meets half of it; sets last, by which whoever was killed on the way knows to go on.

    Raises KernelError: that is to be done again.
    """
    options = parse_options(context.options)
    removed: list[str] = []
    found = {
        tools: ToolTables(tools, options.lock_seconds)
        for tools in xtables.find()
        if tools.variant == "nft" or xtables.legacy_tables(tools.family)
    }
    rules = False
    for tables in found.values():
        told = list(take_rules(tables))
        rules = rules or bool(told)
        removed += told
    if not ipsets.there():
        return tuple(removed)
    with NetlinkSets() as sets:
        ours = [text for text in sets.states() if named(text) is not None]
        if not (ours or rules):
            return tuple(removed)
        shapes = [_shape(context.host, family) for family in FAMILIES]
        if ipvs.there():
            with NetlinkKernel() as kernel:
                removed += take_servers(kernel, shapes)
        removed += take_routes(NetlinkRouting(), shapes)
        removed += take_sets(sets)
    return tuple(removed)


def _shape(host: HostState, family: Family) -> Shape:
    try:
        return shape_of(host, family)
    except ConfigError:
        return Shape(family=family)


def take_rules(tables: Tables) -> Iterator[str]:
    """Rules that lead to our chains, and these."""
    there = tables.read()
    if not (there.chains or there.jumps):
        return
    tables.load(netrules.unload(tuple(there.chains), there.jumps))
    yield from (f"{tables.name} {jump.table}: rule -A {jump.chain} {jump.rule}" for jump in there.jumps)
    yield from (f"{tables.name} {place.table}: chain {place.chain}" for place in there.chains)


def take_servers(kernel: Kernel, shapes: list[Shape]) -> Iterator[str]:
    """Servers with marks of ours."""
    marks = {shape.family: shape.marks for shape in shapes}
    keys: list[ByMark] = []
    for state in kernel.servers():
        key = state.server.key
        if is_ours(key, marks[key.family]):
            keys.append(key)
    for refusal in kernel.run([DeleteServer(key) for key in keys]):
        if refusal.reason != "no server":
            raise KernelError(f"IPVS refuses {refusal}", errno=refusal.errno)
    yield from (f"virtual server {key}" for key in keys)


def take_routes(routing: Routing, shapes: list[Shape]) -> Iterator[str]:
    """Policy rules before the route to which they lead."""
    parts = [part for shape in shapes for part in netrules.policy_routes(shape)]
    present = routing.present(parts)
    for part in reversed(parts):
        if part in present:
            routing.delete(part)
            yield str(part).replace(" add ", " ")


def take_sets(sets: Sets) -> Iterator[str]:
    """All that have names of ours."""
    for text in sorted(sets.states()):
        if named(text) is not None and sets.destroy(text):
            yield f"set {text}"
