"""What stands around the servers and sets, once per family: rules of iptables, policy routing, sysctls.

A rule is text as `iptables-save` prints it, without `-A CHAIN `, so that what is there can be compared letter by letter.

    PREROUTING, or OUTPUT before IPVS        INPUT                    OUTPUT after IPVS      POSTROUTING
    mangle PX-SERVICES: address -> mark --> filter PX-REJECT      -> mangle PX-OUTPUT:   -> nat PX-POSTROUTING:
      (PX-NODEPORTS, PX-MAPPED, PX-KNOWN)   security PX-INPUT        the mark is gone       masquerades
    nat PX-PORTS: the target port           IPVS: mark -> endpoint
    policy routing: marked -> lo
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple

from proxycore.api import Family, Protocol

from .entries import NODE_PORTS, SetKind, SetName
from .ids import Target
from .marks import ALL, Marks, gathered
from .shape import Shape

TableName = Literal["mangle", "nat", "filter", "security"]
TABLES: tuple[TableName, ...] = ("filter", "security", "nat", "mangle")
"""In the order in which they are loaded: the mangle table, which marks packets, comes last."""
Rule = str


class Place(NamedTuple):
    """A chain of a table."""

    table: TableName
    chain: str


class Jump(NamedTuple):
    """The rule `-j target` of a built-in chain; it stands at the chain's head, before what others do."""

    table: TableName
    chain: str
    target: str

    @property
    def rule(self) -> Rule:
        return f"-j {self.target}"


SERVICES = Place("mangle", "PX-SERVICES")
NODEPORTS = Place("mangle", "PX-NODEPORTS")
MAPPED = Place("mangle", "PX-MAPPED")
KNOWN = Place("mangle", "PX-KNOWN")
OUTPUT = Place("mangle", "PX-OUTPUT")
PORTS = Place("nat", "PX-PORTS")
POSTROUTING = Place("nat", "PX-POSTROUTING")
REJECT = Place("filter", "PX-REJECT")
INPUT = Place("security", "PX-INPUT")
CHAINS: tuple[Place, ...] = (
    REJECT,
    INPUT,
    PORTS,
    POSTROUTING,
    KNOWN,
    MAPPED,
    NODEPORTS,
    SERVICES,
    OUTPUT,
)
"""Every chain that is ours, each after those that it leads to."""
JUMPS: tuple[Jump, ...] = (
    Jump("filter", "INPUT", REJECT.chain),
    Jump("filter", "FORWARD", REJECT.chain),
    Jump("filter", "OUTPUT", REJECT.chain),
    Jump("security", "INPUT", INPUT.chain),
    Jump("nat", "PREROUTING", PORTS.chain),
    Jump("nat", "OUTPUT", PORTS.chain),
    Jump("nat", "POSTROUTING", POSTROUTING.chain),
    Jump("mangle", "PREROUTING", SERVICES.chain),
    Jump("mangle", "OUTPUT", OUTPUT.chain),
)

Chains = Mapping[Place, tuple[Rule, ...]]
NO_CLASSES: Mapping[Target, int] = {}
_NEW = "-m conntrack --ctstate NEW "
_FOUR_IN_SIX = re.compile(r"(! )?-s ::([0-9a-f]{1,4}):([0-9a-f]{1,4})/")


def rules(
    shape: Shape, classes: Mapping[Target, int] = NO_CLASSES, node_ports: Collection[Protocol] = ()
) -> Chains:
    """Every chain, in the order of CHAINS.

    `classes`: of target ports.  `node_ports`: protocols whose set of node ports exists; rules cannot name one that does
    not, and those sets take so much memory that they are made when needed.
    """
    found: dict[Place, tuple[Rule, ...]] = {
        REJECT: _reject(shape),
        INPUT: _input(shape),
        PORTS: _ports(shape, classes),
        POSTROUTING: _postrouting(shape),
        KNOWN: (_set_mark(shape.marks.ours, ALL),),
        MAPPED: _mapped(shape),
        NODEPORTS: _node_ports(shape, node_ports),
        SERVICES: _services(shape),
        OUTPUT: _output(shape),
    }
    if not shape.security:
        del found[INPUT]
    return found


def jumps(shape: Shape) -> tuple[Jump, ...]:
    """The jumps that have to be there."""
    return tuple(jump for jump in JUMPS if shape.security or jump.table != INPUT.table)


def _set_mark(value: int, mask: int) -> Rule:
    return f"-j MARK --set-xmark 0x{value:x}/0x{mask:x}"


def _marked(value: int, mask: int | None = None, *, connection: bool = False) -> str:
    """A match of the mark; the mask is the value itself if it is None."""
    kind = "connmark" if connection else "mark"
    return f"-m {kind} --mark 0x{value:x}/0x{value if mask is None else mask:x} "


def _in_set(shape: Shape, kind: SetKind, fields: str, *, negated: bool = False) -> str:
    return f"-m set {'! ' if negated else ''}--match-set {SetName(shape.family, kind)} {fields} "


def _mapped_by(shape: Shape, kind: SetKind, fields: str) -> Rule:
    return f"-j SET --map-set {SetName(shape.family, kind)} {fields} --map-mark"


def _services(shape: Shape) -> tuple[Rule, ...]:
    """From address and port to mark.  Replies, and what connection tracking translates itself, are left alone."""
    marks = shape.marks
    return (
        "-m conntrack --ctdir REPLY -j RETURN",
        # After a first packet whose port PX-PORTS changed, connection tracking translates the rest, past IPVS.
        "-m conntrack --ctstate DNAT -j RETURN",
        # An open connection outlives its frontend's entry.  UDP looks for each packet, so that a flow can move on.
        f"! -p udp {_marked(marks.ours, connection=True)}"
        f"-m conntrack --ctstate RELATED,ESTABLISHED -g {KNOWN.chain}",
        f"{_in_set(shape, SetKind.FIREWALLED, 'dst,dst')}"
        f"{_in_set(shape, SetKind.ADMITTED, 'dst,dst,src', negated=True)}{_NEW}-j DROP",
        _mapped_by(shape, SetKind.VIP, "dst,dst"),
        f"{_marked(0, marks.ours | marks.reject)}{_in_set(shape, SetKind.NODE, 'dst')}-j {NODEPORTS.chain}",
        f"{_marked(marks.ours)}-g {MAPPED.chain}",
        f"{_marked(marks.reject)}-j RETURN",
        f"{_in_set(shape, SetKind.CLUSTER_IPS, 'dst')}{_NEW}{_set_mark(marks.reject, marks.reject)}",
        f"{_marked(0, marks.reject)}{_in_set(shape, SetKind.CIDR, 'dst')}{_NEW}-j DROP",
    )


def _node_ports(shape: Shape, protocols: Collection[Protocol]) -> tuple[Rule, ...]:
    return tuple(
        f"-p {protocol.lower()} {_mapped_by(shape, kind, 'dst')}"
        for protocol, kind in NODE_PORTS.items()
        if protocol in protocols
    )


def _mapped(shape: Shape) -> tuple[Rule, ...]:
    """Flags become decisions; what is left of the mark is a server's.  `fates.meaning` says the same in Python."""
    marks = shape.marks
    moved = marks.short | marks.dropped | marks.local
    detector = detected(shape)
    found = []
    if detector is not None:
        source, interface = detector
        found.append(f"{source}{interface}{_marked(marks.short)}{_set_mark(0, moved)}")
    found += [
        f"{_marked(marks.short)}-m addrtype --src-type LOCAL "
        f"{_set_mark(marks.masquerade, moved | marks.masquerade)}",
        f"{_marked(marks.dropped)}-j DROP",
    ]
    if detector is not None and not shape.everyone_is_local:
        source, interface = (f"! {text}" if text else "" for text in detector)
        found.append(
            f"{source}{interface}{_marked(marks.masquerade_others)}"
            f"{_set_mark(marks.masquerade, marks.masquerade)}"
        )
    # IPVS compares the whole mark with a server's, so that what is for later moves to the connection.
    kept = f"0x{marks.remembered:x}"
    found += [
        f"-j CONNMARK --save-mark --nfmask {kept} --ctmask {kept}",
        _set_mark(0, marks.transient),
    ]
    return tuple(found)


def detected(shape: Shape) -> tuple[str, str] | None:
    """How a local pod is told: match of the source and of the interface, one of them empty.  None: nobody is one.

    Both are empty if everyone is.
    """
    if not shape.local_pods:
        return None
    if shape.everyone_is_local:
        return "", ""
    if shape.local_pods.startswith("-i "):
        return "", f"{shape.local_pods} "
    return _FOUR_IN_SIX.sub(_dotted, shape.local_pods) + " ", ""


def _dotted(match: re.Match[str]) -> str:
    """The C library, by which iptables prints, writes `::1:2` as `::0.1.0.2`."""
    high, low = int(match[2], 16), int(match[3], 16)
    return f"{match[1] or ''}-s ::{high >> 8}.{high & 255}.{low >> 8}.{low & 255}/"


def _output(shape: Shape) -> tuple[Rule, ...]:
    # Routed anew after its translation, a packet that still had the mark would be sent to `lo`, and lost.
    return (
        f"-m ipvs ! --ipvs -j {SERVICES.chain}",
        f"-m ipvs --ipvs {_marked(shape.marks.ours)}{_set_mark(0, ALL)}",
    )


def _ports(shape: Shape, classes: Mapping[Target, int]) -> tuple[Rule, ...]:
    """A persistent server keeps the port that it sees, so the target port has to be there before."""
    marks = shape.marks
    found = []
    for target, number in sorted(classes.items(), key=lambda item: (item[1], item[0])):
        value = marks.compose_class(number)
        match = _marked(value, marks.ours | marks.port_class, connection=True)
        found.append(f"-p {target.protocol.lower()} {match}-j DNAT --to-destination :{target.port}")
    return tuple(found)


_PORT_RULE = re.compile(
    r"-p (tcp|udp|sctp) -m connmark --mark 0x([0-9a-f]+)/0x([0-9a-f]+) -j DNAT --to-destination :(\d+)"
)
_PROTOCOLS: Mapping[str, Protocol] = {"tcp": "TCP", "udp": "UDP", "sctp": "SCTP"}


def classes_in(found: Iterable[Rule], marks: Marks) -> Mapping[Target, int]:
    """Classes of target ports that rules of the chain PORTS, found there, know; rules that are not ours are passed over."""
    classes: dict[Target, int] = {}
    for rule in found:
        match = _PORT_RULE.fullmatch(rule)
        if match is None or int(match[3], 16) != marks.ours | marks.port_class:
            continue
        number = gathered(int(match[2], 16), marks.port_class)
        if number:
            classes[Target(_PROTOCOLS[match[1]], int(match[4]))] = number
    return classes


def _postrouting(shape: Shape) -> tuple[Rule, ...]:
    target = f"-j MASQUERADE{' --random-fully' if shape.random_fully else ''}"
    return (
        f"{_marked(shape.marks.ours | shape.marks.masquerade, connection=True)}{target}",
        f"-m ipvs --ipvs {_in_set(shape, SetKind.LOOP, 'dst,dst,src')}{target}",
    )


def _reject(shape: Shape) -> tuple[Rule, ...]:
    how = "icmp-port-unreachable" if shape.family == "IPv4" else "icmp6-port-unreachable"
    return (f"{_marked(shape.marks.reject)}-j REJECT --reject-with {how}",)


def _input(shape: Shape) -> tuple[Rule, ...]:
    # The last table before IPVS: bits that others set on the way would hide the server.
    return (f"{_marked(shape.marks.ours)}{_set_mark(0, ALL & ~shape.marks.server_mask)}",)


# -- text for iptables-restore --noflush --


def load(chains: Chains, missing: Iterable[Jump] = ()) -> str:
    """Text that makes the chains anew with these rules, and puts the jumps at the head of their chains.

    Each table is replaced in one step.  Policy routes have to be there before; the sets too, as rules name them.
    """
    wanted = tuple(missing)
    lines: list[str] = []
    for table in TABLES:
        mine = {place: found for place, found in chains.items() if place.table == table}
        inserted = [jump for jump in wanted if jump.table == table]
        if not mine and not inserted:
            continue
        lines.append(f"*{table}")
        lines += [f":{place.chain} - [0:0]" for place in mine]
        lines += [f"-A {place.chain} {rule}" for place, found in mine.items() for rule in found]
        lines += [f"-I {jump.chain} {jump.rule}" for jump in inserted]
        lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines)


def unload(chains: Collection[Place], there: Iterable[Jump]) -> str:
    """Text that takes these jumps and chains away; all of them have to be there."""
    found = tuple(there)
    lines: list[str] = []
    for table in reversed(TABLES):
        mine = [place.chain for place in CHAINS if place in chains and place.table == table]
        leading = [jump for jump in found if jump.table == table]
        if not mine and not leading:
            continue
        lines.append(f"*{table}")
        lines += [f":{chain} - [0:0]" for chain in mine]
        lines += [f"-D {jump.chain} {jump.rule}" for jump in leading]
        lines += [f"-X {chain}" for chain in reversed(mine)]
        lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines)


# -- routing and sysctls --


class PolicyRule(NamedTuple):
    """A rule of policy routing: packets with `mark` under `mask`, and from `interface` if it is not None, look in `table`."""

    family: Family
    preference: int
    mark: int
    mask: int
    table: int
    interface: str | None = None

    def __str__(self) -> str:
        came_in = f"iif {self.interface} " if self.interface else ""
        return (
            f"ip {_VERSIONS[self.family]} rule add pref {self.preference} {came_in}"
            f"fwmark 0x{self.mark:x}/0x{self.mask:x} lookup {self.table}"
        )


class LocalRoute(NamedTuple):
    """A route by which every address is the node's own."""

    family: Family
    table: int
    interface: str = "lo"

    def __str__(self) -> str:
        return f"ip {_VERSIONS[self.family]} route add local default dev {self.interface} table {self.table}"


_VERSIONS: dict[Family, str] = {"IPv4": "-4", "IPv6": "-6"}
MAIN_TABLE = 254


def policy_routes(
    shape: Shape, *, preference: int = 299, table: int = 310
) -> tuple[LocalRoute | PolicyRule, ...]:
    """Deliver marked packets here, whatever their address, in the order to be made: the route before what leads to it.

    `preference`: of the first rule; the other has the next one.
    """
    ours = shape.marks.ours
    return (
        LocalRoute(shape.family, table),
        # The reverse path of a marked packet, where that is checked with its mark, is not through `lo`.
        PolicyRule(shape.family, preference, ours, ours, MAIN_TABLE, "lo"),
        PolicyRule(shape.family, preference + 1, ours, ours, table),
    )


class Sysctl(NamedTuple):
    """A setting below `/proc/sys`, and why it has to be so."""

    path: str
    value: str
    why: str


SYSCTLS: tuple[Sysctl, ...] = (
    Sysctl("net/ipv4/vs/conntrack", "1", "connections of IPVS are tracked, as masquerading needs it"),
    Sysctl("net/ipv4/vs/expire_nodest_conn", "1", "a UDP flow moves on when its endpoint is gone"),
    Sysctl(
        "net/ipv4/vs/expire_quiescent_template",
        "1",
        "session affinity lets go of an endpoint that gets no new connections",
    ),
    Sysctl("net/ipv4/vs/conn_reuse_mode", "1", "a client that uses a port again gets an endpoint anew"),
)
"""For both families."""
