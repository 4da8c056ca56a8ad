"""What is there once, whatever Services there are: marks and masquerading, forwarding, guards, and the jumps."""

from __future__ import annotations

from . import words
from .rules import MARKER, NODE_PORTS, SERVICES, Frame, Jump, Place, Rule, Rules, TableName
from .shape import Shape
from .words import comment

MARK_MASQ = Place("nat", "KUBE-MARK-MASQ")
POSTROUTING = Place("nat", "KUBE-POSTROUTING")
FORWARD = Place("filter", "KUBE-FORWARD")
GUARD = Place("filter", "KUBE-FIREWALL")
"""The kubelet's chain as well; there may be rules of the kubelet in it."""

_NEW = "-m conntrack --ctstate NEW "
_JUMPS: tuple[tuple[TableName, str, str, str, str], ...] = (
    ("filter", "INPUT", "KUBE-EXTERNAL-SERVICES", _NEW, "kubernetes externally-visible service portals"),
    ("filter", "FORWARD", "KUBE-EXTERNAL-SERVICES", _NEW, "kubernetes externally-visible service portals"),
    ("filter", "INPUT", "KUBE-NODEPORTS", "", "kubernetes health check service ports"),
    ("filter", "FORWARD", "KUBE-SERVICES", _NEW, "kubernetes service portals"),
    ("filter", "OUTPUT", "KUBE-SERVICES", _NEW, "kubernetes service portals"),
    ("filter", "FORWARD", "KUBE-FORWARD", "", "kubernetes forwarding rules"),
    ("filter", "INPUT", "KUBE-PROXY-FIREWALL", _NEW, "kubernetes load balancer firewall"),
    ("filter", "OUTPUT", "KUBE-PROXY-FIREWALL", _NEW, "kubernetes load balancer firewall"),
    ("filter", "FORWARD", "KUBE-PROXY-FIREWALL", _NEW, "kubernetes load balancer firewall"),
    ("nat", "OUTPUT", "KUBE-SERVICES", "", "kubernetes service portals"),
    ("nat", "PREROUTING", "KUBE-SERVICES", "", "kubernetes service portals"),
    ("nat", "POSTROUTING", "KUBE-POSTROUTING", "", "kubernetes postrouting rules"),
)
"""Table, built-in chain, target, match and comment, in kube-proxy's order."""
_GUARD_JUMPS: tuple[Jump, ...] = (
    Jump("filter", "INPUT", "-j KUBE-FIREWALL"),
    Jump("filter", "OUTPUT", "-j KUBE-FIREWALL"),
)


def frame(shape: Shape) -> Frame:
    """Everything there is once, for one family."""
    chains: dict[Place, Rules] = {
        MARK_MASQ: (_set_mark(shape, shape.masquerade_mark),),
        POSTROUTING: _postrouting(shape),
        FORWARD: _forward(shape),
        MARKER: (),
    }
    jumps = tuple(
        Jump(table, chain, f"{match}{comment(said)}-j {target}")
        for table, chain, target, match, said in _JUMPS
    )
    if shape.localhost_node_ports:
        chains[GUARD] = (_guard(shape),)
        jumps += _GUARD_JUMPS
    return Frame(chains, {SERVICES: _to_node_ports(shape)}, jumps)


def _set_mark(shape: Shape, mask: str) -> Rule:
    """Or, with the mark as mask; exclusive or, with mask 0x0."""
    return f"-j MARK --set-xmark {shape.masquerade_mark}/{mask}"


def _postrouting(shape: Shape) -> Rules:
    mark = shape.masquerade_mark
    fully = " --random-fully" if shape.random_fully else ""
    return (
        f"-m mark ! --mark {mark}/{mark} -j RETURN",
        # The mark goes: a packet that comes by again, from a tunnel, is not to be masqueraded twice.
        _set_mark(shape, "0x0"),
        f"{comment('kubernetes service traffic requiring SNAT')}-j MASQUERADE{fully}",
    )


def _forward(shape: Shape) -> Rules:
    """Forwarded packets that a firewall of the host would refuse; and those that would end connections, as nothing undoes
    their translation."""
    mark = shape.masquerade_mark
    rules = (
        f"{comment('kubernetes forwarding rules')}-m mark --mark {mark}/{mark} -j ACCEPT",
        f"{comment('kubernetes forwarding conntrack rule')}-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    )
    if not shape.drop_invalid:
        return rules
    counted = f"-m nfacct --nfacct-name {words.INVALID_COUNTER} " if shape.nfacct else ""
    return (f"-m conntrack --ctstate INVALID {counted}-j DROP", *rules)


def _guard(shape: Shape) -> Rule:
    """Node ports on loopback need packets for it to be routable; nothing else from outside may be sent there."""
    loopback = words.loopback(shape.family)
    said = comment("block incoming localnet connections")
    return f"! -s {loopback} -d {loopback} {said}-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"


def _to_node_ports(shape: Shape) -> Rules:
    said = comment("kubernetes service nodeports; NOTE: this must be the last rule in this chain")
    return tuple(
        f"{destination}{said}{rest}-j {NODE_PORTS.chain}"
        for destination, rest in words.words(shape).node_port_destinations
    )
