"""What of an iptables ruleset is kube-proxy's, and the text that takes it away.

Pure: reads the lines of `iptables-save`, writes input for `iptables-restore --noflush`.

Semantics: the chains of kube-proxy's iptables and ipvs modes, of today and of earlier versions.  The kubelet's chains are
not among them (KUBE-KUBELET-CANARY, KUBE-IPTABLES-HINT, KUBE-MARK-DROP, and KUBE-FIREWALL, which kube-proxy's own
cleanup leaves as well).
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

SHARED: Mapping[str, frozenset[str]] = {
    "nat": frozenset(
        {
            "KUBE-SERVICES",
            "KUBE-NODEPORTS",
            "KUBE-POSTROUTING",
            "KUBE-MARK-MASQ",
            "KUBE-PROXY-CANARY",
            "KUBE-NODE-PORT",
            "KUBE-LOAD-BALANCER",
            "KUBE-FIRE-WALL",
        }
    ),
    "filter": frozenset(
        {
            "KUBE-SERVICES",
            "KUBE-EXTERNAL-SERVICES",
            "KUBE-NODEPORTS",
            "KUBE-FORWARD",
            "KUBE-PROXY-FIREWALL",
            "KUBE-PROXY-CANARY",
            "KUBE-NODE-PORT",
            "KUBE-SOURCE-RANGES-FIREWALL",
            "KUBE-IPVS-FILTER",
            "KUBE-IPVS-OUT-FILTER",
        }
    ),
    "mangle": frozenset({"KUBE-PROXY-CANARY"}),
}
"""Chains that are there once, by table."""
MARKER = "KUBE-SVC-PROXYCORE"
"""An empty chain in nat by which proxycore's iptables backend says that a ruleset of these chains is its own."""
LOCALNET_MARKER = "KUBE-SVC-LOCALNET"
"""An empty chain in nat by which a run of proxycore remembers that it set `route_localnet`, which was 0 before."""
KEPT_MARKERS = frozenset({LOCALNET_MARKER})
"""Chains in nat that are no part of a ruleset and not left over either: whoever writes rules lets them be."""
MARKERS = KEPT_MARKERS | {MARKER}
"""Chains in nat that go last of all: whoever is killed on the way finds the rest by them."""
TREE = "KUBE-SVC-TREE."
"""So the names of chains begin that lead from KUBE-SERVICES to those of Services, through others of these maybe."""
CHUNK = 1000
"""So many chains iptables-nft takes away at once: what one input takes grows faster than the input."""
_OF_SERVICES = re.compile(
    r"KUBE-(?:SVC|SVL|SEP|FW|EXT|XLB)-[A-Z2-7]{16}|KUBE-SVC-TREE\.[0-9A-Za-z.]{1,14}|"
    + "|".join(sorted(MARKERS))
)
"""Chains of a Service port or endpoint, in nat; the rest of the name is a hash.  And those that proxycore adds."""
_MARK_MASQ = "KUBE-MARK-MASQ"
_TARGETS = frozenset({"-j", "--jump", "-g", "--goto"})
_BUILT_IN = frozenset({"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"})
_ENTRANCES = frozenset[str]().union(*SHARED.values()) - {
    _MARK_MASQ,
    "KUBE-PROXY-CANARY",
    "KUBE-LOAD-BALANCER",
}
"""Chains that kube-proxy's own jumps lead to; a rule of a built-in chain that leads elsewhere is somebody else's."""
_ORDER = ("filter", "mangle", "nat")


class TableRules(msgspec.Struct, frozen=True, kw_only=True):
    """What one table holds of kube-proxy's.

    `chains`: its chains, in the order of the listing.  `jumps`: rules of built-in chains that lead into them, as
    `-A` lines.  `used`: chains of kube-proxy's that rules of somebody else's use, each with the first such rule; `filled`:
    those of all chains that hold rules.  `policy_drop`: built-in chains that drop what no rule accepts.
    """

    table: str
    chains: tuple[str, ...] = ()
    jumps: tuple[str, ...] = ()
    used: Mapping[str, str] = {}
    filled: frozenset[str] = frozenset()
    policy_drop: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Nothing that could be removed is there."""
        return not self.jumps and not removed(self) and not emptied(self)


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """A whole listing: tables with something of kube-proxy's, filter first; and those that the tool could not read."""

    tables: tuple[TableRules, ...] = ()
    unreadable: tuple[str, ...] = ()


def is_kube_proxys(table: str, chain: str) -> bool:
    """Is a chain of this name in this table one that kube-proxy makes?"""
    return chain in SHARED.get(table, ()) or (table == "nat" and _OF_SERVICES.fullmatch(chain) is not None)


def is_jump(chain: str, target: str) -> bool:
    """Is a rule that leads from a chain of somebody else to one of kube-proxy's a jump that kube-proxy makes?"""
    return chain in _BUILT_IN and target in _ENTRANCES


def read(lines: Iterable[str]) -> Listing:
    """Find kube-proxy's share in the output of `iptables-save` or `ip6tables-save`."""
    found: list[TableRules] = []
    unreadable: list[str] = []
    table = ""
    chains: dict[str, None] = {}
    jumps: list[str] = []
    used: dict[str, str] = {}
    drops: list[str] = []
    filled: set[str] = set()
    for line in lines:
        if line.startswith("-A "):
            chain = line[3 : line.find(" ", 3)]
            # Nearly all lines are rules of kube-proxy's own chains, which go with their chains.
            if chain in chains:
                filled.add(chain)
            elif "KUBE-" in line:
                target = target_of(line)
                if target in chains:
                    if is_jump(chain, target):
                        jumps.append(line.rstrip("\n"))
                    else:
                        used.setdefault(target, line.rstrip("\n"))
        elif line.startswith(":"):
            name, _, policy = line[1:].partition(" ")
            if is_kube_proxys(table, name):
                chains[name] = None
            elif policy.startswith("DROP"):
                drops.append(name)
        elif line.startswith("*"):
            table = line[1:].strip()
            chains, jumps, used, drops, filled = {}, [], {}, [], set()
        elif line.startswith("COMMIT"):
            if chains:
                found.append(
                    TableRules(
                        table=table,
                        chains=tuple(chains),
                        jumps=tuple(jumps),
                        used=used,
                        filled=frozenset(filled),
                        policy_drop=tuple(drops),
                    )
                )
        elif line.startswith("# Table `") and "incompatible" in line:
            unreadable.append(line[9:].partition("'")[0])
    found.sort(key=lambda rules: _ORDER.index(rules.table) if rules.table in _ORDER else len(_ORDER))
    return Listing(tables=tuple(found), unreadable=tuple(unreadable))


def target_of(rule: str) -> str | None:
    """Where a rule of a listing leads to; a comment that looks like a target is none."""
    try:
        words = shlex.split(rule)
    except ValueError:
        return None
    after_comment = False
    for word, following in itertools.pairwise(words):
        if word in _TARGETS and not after_comment:
            return following
        after_comment = word == "--comment"
    return None


def emptied(rules: TableRules) -> tuple[str, ...]:
    """Chains that lose their rules and stay, since somebody else's rules lead there.

    The mark for masquerading stays as it is then: network plugins use it for ports of the host.
    """
    return tuple(
        name for name in rules.chains if name in rules.used and name in rules.filled and name != _MARK_MASQ
    )


def removed(rules: TableRules) -> tuple[str, ...]:
    """Chains that go."""
    return tuple(name for name in rules.chains if name not in rules.used)


def removal(rules: TableRules) -> str:
    """Input for `iptables-restore --noflush` that takes kube-proxy's share of one table away, in one commit.

    Jumps go by their text and not by their number, so that a rule that came meanwhile is never taken instead.  Naming a
    chain empties it, so chains can go in any order then.  Empty: there is nothing to do.
    """
    if rules.empty:
        return ""
    gone = removed(rules)
    return _text(rules.table, (*gone, *emptied(rules)), jumps=rules.jumps, gone=gone)


_LEADING = {"KUBE-FW-": 0, "KUBE-EXT": 1, "KUBE-XLB": 1, "KUBE-SVC": 2, "KUBE-SVL": 2, "KUBE-SEP": 3}
"""By the start of a name: chains lead to those of a higher number alone."""


def removals(rules: TableRules, size: int | None = None) -> Iterator[str]:
    """The same in inputs of about `size` chains, one after the other; None, or fewer chains: one input.

    First the jumps go, and the rules of what is there once, so that no packet comes here any more; then chains, of which none
    leads to one that went before; the markers last.  Whoever stops in between finds the rest by its names.
    """
    if rules.empty:
        return
    gone = removed(rules)
    if size is None or len(gone) <= size:
        yield removal(rules)
        return
    trees = [name for name in gone if name.startswith(TREE)]
    services = [name for name in gone if _is_per_service(rules.table, name)]
    apart = {*trees, *services}
    shared = [name for name in gone if name not in apart and name not in MARKERS]
    markers = [name for name in gone if name in MARKERS]
    yield _text(rules.table, (*shared, *emptied(rules)), jumps=rules.jumps)
    for chunk in _chunks(trees, size):
        yield _text(rules.table, chunk)
    services.sort(key=lambda name: _LEADING[name[:8]])
    for chunk in _chunks((*trees, *services), size):
        yield _text(rules.table, chunk, gone=chunk)
    for chunk in (shared, markers):
        if chunk:
            yield _text(rules.table, chunk, gone=chunk)


def _is_per_service(table: str, name: str) -> bool:
    return name[:8] in _LEADING and name not in SHARED[table] and name not in MARKERS and TREE not in name


def _chunks(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (names[start : start + size] for start in range(0, len(names), size))


def _text(table: str, emptied: Iterable[str], *, jumps: Iterable[str] = (), gone: Iterable[str] = ()) -> str:
    lines = [f"*{table}"]
    lines += (f":{name} - [0:0]" for name in emptied)
    lines += (f"-D {rule[3:]}" for rule in jumps)
    lines += (f"-X {name}" for name in gone)
    return "\n".join((*lines, "COMMIT", ""))


def without_markers(rules: TableRules) -> TableRules:
    """All but the markers."""
    return msgspec.structs.replace(rules, chains=tuple(name for name in rules.chains if name not in MARKERS))


def markers(rules: TableRules) -> TableRules:
    """The markers alone."""
    return msgspec.structs.replace(
        rules, chains=tuple(name for name in rules.chains if name in MARKERS), jumps=()
    )


def is_at_work(rules: TableRules) -> bool:
    """Do these show a running kube-proxy, if they come back?

    An old kubelet makes the two chains for masquerading by itself.
    """
    return any(
        name not in (_MARK_MASQ, "KUBE-POSTROUTING") and name not in rules.used for name in rules.chains
    )


def tell(rules: TableRules, where: str) -> Iterator[str]:
    """Lines about what removal() takes away: every jump, and chains, those of Services by their number."""
    for rule in rules.jumps:
        yield f"{where} {rules.table}: rule {rule}"
    gone = removed(rules)
    shared = [name for name in gone if name in SHARED[rules.table]]
    per_service = sum(name not in MARKERS for name in gone) - len(shared)
    parts = [
        *shared,
        *sorted(MARKERS.intersection(gone)),
        *([f"{per_service} of Services and endpoints"] if per_service else []),
    ]
    if parts:
        yield f"{where} {rules.table}: chains {', '.join(parts)}"
    for name in emptied(rules):
        yield f"{where} {rules.table}: rules of chain {name}, which stays because of {rules.used[name]}"
