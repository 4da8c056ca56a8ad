"""What an earlier run left in the kernel: which table carries traffic, and what of it is to be kept.

Kept over a restart: the index of each Service port (so that no packet under way meets a stranger's endpoints), the handles
of endpoints with affinity (so that clients stay where they are), and the classes.
"""

from __future__ import annotations

import struct

import msgspec

from proxycore.api import KernelError

from . import classes, layout, skeleton
from .kernel import Element, Kernel
from .program import Table


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """One table of ours as found.

    `digest` is None when it bears none; `hooked`: it sees packets; `complete`: by all our hooks, and by no others.
    """

    name: str
    digest: str | None
    hooked: bool
    complete: bool


def survey(kernel: Kernel, nft: str) -> list[Live]:
    """Every table of ours in a family, of any version."""
    found: list[Live] = []
    for name in sorted(kernel.tables(nft) & set(layout.TABLES)):
        chains = kernel.chains(nft, name)
        marks = [
            c.removeprefix(skeleton.DIGEST_PREFIX) for c in chains if c.startswith(skeleton.DIGEST_PREFIX)
        ]
        hooks = {chain: hook for chain, hook in chains.items() if hook is not None}
        found.append(
            Live(
                name=name,
                digest=marks[0] if len(marks) == 1 else None,
                hooked=any(chains.values()),
                complete=hooks == {chain: hook for chain, (hook, _) in skeleton.HOOKS.items()}
                and name not in kernel.dormant(nft),
            )
        )
    return found


def recall(kernel: Kernel, nft: str, name: str, into: Table) -> int:
    """Read indexes and handles from a live table into a mirror; returns the number of frontends found.

    A table of another layout may have none of the sets, or others: then nothing is recalled.
    """
    try:
        frontends = kernel.elements(nft, name, "frontends") + kernel.elements(nft, name, "node-ports")
        into.remembered = {
            item.key: _number(item.data) & layout.INDEX_MASK for item in frontends if item.data is not None
        }
        for where in ("sticky-endpoints", "local-sticky-endpoints"):
            for item in kernel.elements(nft, name, where):
                if item.data is not None:
                    handle = _number(item.key)
                    known = into.remembered_handles.setdefault(handle & layout.STICKY_MASK, {})
                    known.setdefault(item.data, handle)
    except (KernelError, struct.error):
        into.forget_earlier_run()
    into.keep_indexes()
    return len(into.remembered)


def recall_classes(kernel: Kernel, nft: str, name: str, into: Table) -> None:
    """Read the classes of a table of our own layout into its mirror."""
    into.chains = set(kernel.chains(nft, name))
    for item in kernel.elements(nft, name, "classes"):
        parsed = classes.parse_chain(item.chain or "")
        if parsed is not None:
            into.classes[parsed] = _number(item.key) >> layout.CLASS_SHIFT


def recall_slots(kernel: Kernel, nft: str, name: str, into: Table) -> None:
    """Read which endpoint stands in which slot, so that a plan names only what would change."""
    found: dict[tuple[int, bool], dict[int, bytes]] = {}
    by_handle = {
        handle: target for known in into.remembered_handles.values() for target, handle in known.items()
    }
    for where in ("endpoints", "slots"):
        for item in kernel.elements(nft, name, where):
            index, slot = struct.unpack("=II", item.key)
            target = item.data if where == "endpoints" else by_handle.get(_number(item.data))
            if target is not None:
                local = slot >= layout.LOCAL_SLOT
                found.setdefault((index, local), {})[slot] = target
    into.remembered_slots = {
        place: tuple(target for _, target in sorted(slots.items())) for place, slots in found.items()
    }


def affinity(kernel: Kernel, nft: str, name: str) -> list[Element]:
    """Clients' choices in a live table, with the time that they have left; empty if it has no such map."""
    try:
        found = kernel.elements(nft, name, "affinity")
    except KernelError:
        return []
    size = 8 if nft == "ip" else 20
    return [e for e in found if len(e.key) == size and e.data is not None and e.timeout and e.expiration]


def _number(raw: bytes | None) -> int:
    return int(struct.unpack("=I", raw or b"")[0])
