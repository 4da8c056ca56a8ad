"""What the text of rules depends on besides the Services: the configuration, the node's facts, what iptables can do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from proxycore.api import ConfigError, Family, HostState, LocalPodsByInterface, NodePortAddresses, family_of

VariantChoice = Literal["auto", "legacy", "nft"]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The backend's own settings.

    `variant`: of iptables.  `drop_invalid`: drop packets that connection tracking calls invalid; `auto`: unless
    `nf_conntrack_tcp_be_liberal` is set.  `comments_up_to`: with more endpoints than this in a family, their rules carry no
    comments.  `tree_from`: so many rules in the dispatch of nat make it a tree of address prefixes.  `lock_seconds`: so
    long the xtables lock may be another's.  `chains_per_restore`: with iptables-nft a larger load is cut into pieces of
    about that many chains.
    """

    variant: VariantChoice = "auto"
    localhost_node_ports: bool = False
    drop_invalid: Literal["auto", "always", "never"] = "auto"
    comments_up_to: int = 1000
    tree_from: int = 200
    lock_seconds: int = 5
    chains_per_restore: int = 1000


_Allowed = tuple[str, ...] | range | type[bool]
_FIELDS: Mapping[str, tuple[str, _Allowed]] = {
    "variant": ("variant", ("auto", "legacy", "nft")),
    "localhostNodePorts": ("localhost_node_ports", bool),
    "dropInvalid": ("drop_invalid", ("auto", "always", "never")),
    "commentsUpTo": ("comments_up_to", range(0, 10_000_001)),
    "treeFrom": ("tree_from", range(0, 10_000_001)),
    "lockSeconds": ("lock_seconds", range(1, 21)),
    "chainsPerRestore": ("chains_per_restore", range(1, 1_000_001)),
}
"""Name in the configuration: field, and what may stand there."""
_SHOWN = 80
"""So much of a wrong value is repeated, in characters."""


def parse_options(given: Mapping[str, Any]) -> Options:
    """Options from `backendOptions.iptables`.  Raises ConfigError naming every wrong one; `field` is the first's."""
    values: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for name, value in given.items():
        known = _FIELDS.get(name)
        reason = _unknown(name) if known is None else _unfit(value, known[1])
        if reason:
            wrong[f"backendOptions.iptables.{name}"] = reason
        elif known is not None:
            values[known[0]] = value
    if wrong:
        raise ConfigError(
            field=next(iter(wrong)), lines=[f"{field}: {reason}" for field, reason in wrong.items()]
        )
    return Options(**values)


def _unknown(name: str) -> str:
    """Why a name is wrong, with what was meant: names are compared without case and separators."""
    plain = {known.lower(): known for known in _FIELDS}
    close = difflib.get_close_matches(re.sub("[-_. ]", "", name[:100]).lower(), plain, n=1)
    if not close:
        return f"no such setting; there are {', '.join(_FIELDS)}"
    meant = plain[close[0]]
    return f"no such setting; did you mean {meant} ({_wanted(_FIELDS[meant][1])})?"


def _unfit(value: Any, allowed: _Allowed) -> str:
    """Why a value cannot stand where these are allowed; empty if it can."""
    if isinstance(allowed, type):
        fits = isinstance(value, allowed)
    elif isinstance(allowed, range):
        fits = isinstance(value, int) and not isinstance(value, bool) and value in allowed
    else:
        fits = value in allowed
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
    return "" if fits else f"{shown} is not {_wanted(allowed)}"


def _wanted(allowed: _Allowed) -> str:
    if isinstance(allowed, type):
        return "true or false"
    if isinstance(allowed, range):
        return f"a number from {allowed.start} to {allowed.stop - 1}"
    return f"one of {', '.join(allowed)}"


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """What this host can do.

    `random_fully`: MASQUERADE knows the option.  `nfacct`: there are named counters.  `liberal`: connection tracking was set to
    be liberal about TCP before we came (`nf_conntrack_tcp_be_liberal`).
    """

    random_fully: bool = True
    nfacct: bool = False
    liberal: bool = False


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that rule text of one family depends on besides the Service.

    `local_pods`: how a local pod is told, as the options of a match: `-s 10.0.0.0/8`, `-i cni0`, `-i veth+`; empty:
    nobody is one.  `comments`: rules of endpoints carry one.
    """

    family: Family
    masquerade_bit: int = 14
    local_pods: str = ""
    node_ports: NodePortAddresses = NodePortAddresses()
    localhost_node_ports: bool = False
    drop_invalid: bool = True
    random_fully: bool = True
    nfacct: bool = False
    comments: bool = True

    @property
    def masquerade_mark(self) -> str:
        """The mark as `iptables-save` prints it."""
        return f"0x{1 << self.masquerade_bit:x}"


def shape_of(
    host: HostState, family: Family, options: Options, features: Features, *, comments: bool
) -> Shape:
    """The shape that a host needs.  Raises ConfigError for an interface name that Linux does not allow."""
    detect = host.detect_local
    local_pods = ""
    if isinstance(detect, LocalPodsByInterface):
        if not re.fullmatch(r"[A-Za-z0-9_.:@-]{1,15}", detect.name):
            raise ConfigError(f"{detect.name!r} is not the name of an interface", field="detectLocal")
        # A prefix of 15 characters leaves room for no other; iptables refuses a plus after it.
        more = "+" if detect.prefix and len(detect.name) < 15 else ""
        local_pods = f"-i {detect.name}{more}"
    elif detect is not None:
        local_pods = next((f"-s {cidr}" for cidr in detect.cidrs if family_of(cidr) == family), "")
    return Shape(
        family=family,
        masquerade_bit=host.masquerade_bit,
        local_pods=local_pods,
        node_ports=host.node_ports(family),
        localhost_node_ports=options.localhost_node_ports and family == "IPv4",
        drop_invalid=options.drop_invalid == "always"
        or (options.drop_invalid == "auto" and not features.liberal),
        random_fully=features.random_fully,
        nfacct=features.nfacct,
        comments=comments,
    )
