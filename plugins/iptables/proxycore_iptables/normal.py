"""One form for all texts of a rule: versions of iptables print it differently, and people write it as they like.

Pure.  Rules that do the same get the same form as far as this module knows their options; rules that do something else never
do.  What it does not know stays as it is.  Slow: for chains whose text is not what was written, and for jumps.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from .rules import Rule

_SAME: Mapping[str, str] = {
    "--source": "-s",
    "--src": "-s",
    "--destination": "-d",
    "--dst": "-d",
    "--in-interface": "-i",
    "--out-interface": "-o",
    "--protocol": "-p",
    "--proto": "-p",
    "--fragment": "-f",
    "--match": "-m",
    "--jump": "-j",
    "--goto": "-g",
    "--set-counters": "-c",
    "--ipv4": "-4",
    "--ipv6": "-6",
    "--source-port": "--sport",
    "--destination-port": "--dport",
    "--source-ports": "--sports",
    "--destination-ports": "--dports",
    "--state": "--ctstate",
}
"""Long and old names of options: the one used here."""
_BASE: Mapping[str, int] = {"-s": 1, "-d": 1, "-i": 1, "-o": 1, "-p": 1, "-f": 0, "-c": 2, "-4": 0, "-6": 0}
"""Options of no match or target, in the order in which they are printed: how many words follow."""
_PROTOCOLS = {
    "1": "icmp",
    "6": "tcp",
    "17": "udp",
    "33": "dccp",
    "50": "esp",
    "51": "ah",
    "58": "ipv6-icmp",
    "132": "sctp",
    "136": "udplite",
    "icmpv6": "ipv6-icmp",
    "icmp6": "ipv6-icmp",
    "0": "all",
}
_OF_PORTS = ("tcp", "udp", "sctp", "dccp", "udplite")
_OPTIONS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "--comment": (1, ("comment",)),
    "--sport": (1, _OF_PORTS),
    "--dport": (1, _OF_PORTS),
    "--tcp-flags": (2, ("tcp",)),
    "--syn": (0, ("tcp",)),
    "--ports": (1, ("multiport",)),
    "--sports": (1, ("multiport",)),
    "--dports": (1, ("multiport",)),
    "--mark": (1, ("mark", "connmark")),
    "--ctstate": (1, ("conntrack",)),
    "--src-type": (1, ("addrtype",)),
    "--dst-type": (1, ("addrtype",)),
    "--limit-iface-in": (0, ("addrtype",)),
    "--limit-iface-out": (0, ("addrtype",)),
    "--mode": (1, ("statistic",)),
    "--probability": (1, ("statistic",)),
    "--every": (1, ("statistic",)),
    "--packet": (1, ("statistic",)),
    "--set": (0, ("recent",)),
    "--rcheck": (0, ("recent",)),
    "--update": (0, ("recent",)),
    "--remove": (0, ("recent",)),
    "--seconds": (1, ("recent",)),
    "--reap": (0, ("recent",)),
    "--hitcount": (1, ("recent",)),
    "--rttl": (0, ("recent",)),
    "--name": (1, ("recent",)),
    "--mask": (1, ("recent",)),
    "--rsource": (0, ("recent",)),
    "--rdest": (0, ("recent",)),
    "--nfacct-name": (1, ("nfacct",)),
    "--set-xmark": (1, ("MARK",)),
    "--set-mark": (1, ("MARK",)),
    "--and-mark": (1, ("MARK",)),
    "--or-mark": (1, ("MARK",)),
    "--xor-mark": (1, ("MARK",)),
    "--reject-with": (1, ("REJECT",)),
    "--to-destination": (1, ("DNAT",)),
    "--persistent": (0, ("DNAT",)),
    "--random": (0, ("DNAT", "MASQUERADE")),
    "--random-fully": (0, ("MASQUERADE",)),
    "--to-ports": (1, ("MASQUERADE",)),
}
"""Options of matches and targets: how many words follow, and whose they are."""
_FREE_TEXT = frozenset({"--comment", "--name", "--nfacct-name"})
"""An exclamation mark after these is their value."""
_KNOWN = frozenset(owner for _, owners in _OPTIONS.values() for owner in owners)
_ORDERLESS = _KNOWN - {"recent", "nfacct"}
"""Matches that have no effect of their own, so that their order does not matter."""
_FLAGS = ("FIN", "SYN", "RST", "ACK", "URG", "PSH")
_ALL_BITS = 0xFFFFFFFF
_STEPS = 1 << 31
"""Chance in the kernel is a number of these."""
_PLAIN = 20_000
"""Fractions of no larger denominator lie more than two steps apart, so that one near enough is what was meant."""
_OPTION = re.compile(r"--?[A-Za-z46]")
_SAFE = re.compile(r"[\w@%+=:,./\[\]!-]+", re.ASCII)


class _NoRule(ValueError):
    """iptables would refuse this."""


class _Option(NamedTuple):
    name: str
    values: tuple[str, ...] = ()
    negated: bool = False

    def text(self) -> str:
        return " ".join((*(["!"] if self.negated else []), self.name, *map(_quoted, self.values)))


class _Extension(NamedTuple):
    """A match or a target with its options."""

    kind: str
    name: str
    options: list[_Option]


class _Parsed(NamedTuple):
    base: list[_Option]
    extensions: list[_Extension]


def normal(rule: Rule) -> Rule:
    """The form; it is a rule itself, and its own form.  What is not a rule at all is returned as it is."""
    try:
        base, extensions = _parsed(_words(rule))
    except _NoRule:
        return rule
    protocol = next((option.values[0] for option in base if option.name == "-p" and not option.negated), "")
    matches: list[str] = []
    comments: list[str] = []
    targets: list[str] = []
    row: list[str] = []
    for kind, name, options in extensions:
        text = _text(kind, name, options)
        if kind != "-m":
            targets.append(text)
        elif name == "comment":
            comments.append(text)
        elif name == protocol and not options:
            # The protocol is looked at in any case.
            continue
        elif name in _ORDERLESS and not any(option.name == "--every" for option in options):
            row.append(text)
        else:
            matches += (*sorted(row), text)
            row = []
    matches += sorted(row)
    return " ".join((*(option.text() for option in base), *comments, *matches, *targets))


def _text(kind: str, name: str, options: Sequence[_Option]) -> str:
    return " ".join((kind, _quoted(name), *(option.text() for option in options)))


# -- from text --


def _words(rule: Rule) -> list[str]:
    """Words as iptables-restore reads them.  Raises _NoRule when a quotation does not end."""
    words: list[str] = []
    word: list[str] | None = None
    quoted = escaped = False
    for sign in rule:
        if quoted:
            assert word is not None
            if escaped or sign not in '\\"':
                word.append(sign)
                escaped = False
            elif sign == "\\":
                escaped = True
            else:
                quoted = False
        elif sign in " \t\n":
            if word is not None:
                words.append("".join(word))
                word = None
        else:
            word = [] if word is None else word
            if sign == '"':
                quoted = True
            else:
                word.append(sign)
    if word is not None:
        words.append("".join(word))
    if quoted:
        raise _NoRule
    return words


def _quoted(word: str) -> str:
    if _SAFE.fullmatch(word):
        return word
    return '"' + re.sub(r'(["\\])', r"\\\1", word) + '"'


def _options(words: Sequence[str]) -> Iterator[_Option]:
    """Options with the words that follow; those of unknown options end where the next one begins.

    Raises _NoRule for an option that lacks a word and for a word that is no option's.
    """
    at = 0
    negated = False
    while at < len(words):
        word = words[at]
        at += 1
        if word == "!":
            negated = not negated
            continue
        if not _SAFE.fullmatch(word):
            raise _NoRule
        if not word.startswith("-") and not negated:
            raise _NoRule
        values: list[str] = []
        if word.startswith("--"):
            word, equals, value = word.partition("=")
            values = [value] if equals else []
        name = _SAME.get(word, word)
        known = 1 if name in ("-m", "-j", "-g") else _BASE.get(name, _OPTIONS.get(name, (None,))[0])
        if known and at < len(words) and words[at] == "!" and name not in _FREE_TEXT:
            negated = not negated
            at += 1
        if known is None:
            while at < len(words) and words[at] != "!" and not _OPTION.match(words[at]):
                values.append(words[at])
                at += 1
        else:
            missing = max(known - len(values), 0)
            values += words[at : at + missing]
            at += missing
            if len(values) != known or ("!" in values and name not in _FREE_TEXT):
                raise _NoRule
        yield _Option(name, tuple(values), negated)
        negated = False
    if negated:
        raise _NoRule


def _parsed(words: Sequence[str]) -> _Parsed:
    base: list[_Option] = []
    extensions: list[_Extension] = []
    protocol = ""
    for option in _options(words):
        name = option.name
        if name in ("-m", "-j", "-g"):
            given = option.values[0]
            if name == "-m":
                given = "conntrack" if given == "state" else _PROTOCOLS.get(given, given)
            extensions.append(_Extension(name, given, []))
        elif name in _BASE:
            base += _base_option(option)
            protocol = next((each.values[0] for each in base if each.name == "-p"), protocol)
        else:
            owners = _OPTIONS.get(name, (0, ()))[1]
            last = extensions[-1] if extensions else None
            # An extension that is not known may have an option of any name.
            if last is None or last.name in _KNOWN:
                owner = next((each for each in reversed(extensions) if each.name in owners), None)
                if owner is None and protocol in owners:
                    owner = _Extension("-m", protocol, [])
                    extensions.append(owner)
            else:
                owner = None
            owner = owner or last
            (base if owner is None else owner.options).append(option)
    order = list(_BASE)
    base.sort(key=lambda option: order.index(option.name) if option.name in order else len(order))
    return _Parsed(base, [each._replace(options=_tidied(each)) for each in extensions])


# -- what can be said in several ways --


def _base_option(option: _Option) -> list[_Option]:
    """An option of no match; empty if it says nothing."""
    name, values, negated = option
    if name in ("-c", "-4", "-6"):
        return []
    if not values:
        return [option]  # -f
    value = values[0]
    if name in ("-s", "-d"):
        value = _prefix(value)
        if value.endswith("/0") and not negated:
            return []
    elif name == "-p":
        value = _PROTOCOLS.get(value.lower(), value.lower())
        if value == "all" and not negated:
            return []
    elif name in ("-i", "-o") and value == "+" and not negated:
        return []
    return [_Option(name, (value,), negated)]


def _prefix(value: str) -> str:
    """An address or a prefix with its length and without bits behind it; a mask with gaps stays a mask."""
    given, _, length = value.partition("/")
    try:
        address = ipaddress.ip_address(given)
        bits = address.max_prefixlen
        if not length:
            mask = (1 << bits) - 1
        elif length.isdecimal():
            mask = ((1 << bits) - 1) ^ ((1 << bits - int(length)) - 1)
        else:
            mask = int(type(address)(length))
    except ValueError:
        return value
    kept = type(address)(int(address) & mask)
    ones = mask.bit_count()
    if mask == ((1 << bits) - 1) ^ ((1 << bits - ones) - 1):
        return f"{kept}/{ones}"
    return f"{kept}/{type(address)(mask)}"


def _tidied(extension: _Extension) -> list[_Option]:
    """The options of a match or target in one order, defaults left out; of an unknown one as they are."""
    if extension.name not in _KNOWN:
        return extension.options
    found: list[_Option] = []
    for option in extension.options:
        change = _VALUES.get((extension.name, option.name)) or _VALUES.get(("", option.name))
        try:
            changed = change(option) if change and option.values else option
        except (ValueError, OverflowError):
            changed = option
        if option.name == "--syn" and extension.name == "tcp":
            changed = _Option("--tcp-flags", _SYN, option.negated)
        if changed is not None and (changed.negated or (changed.name, *changed.values) not in _DEFAULTS):
            found.append(changed)
    return sorted(found)


def _number(text: str) -> int:
    """A number as C reads it.  Raises ValueError."""
    if re.fullmatch(r"0[0-7]+", text):
        return int(text, 8)
    return int(text, 0)


def _marked(text: str) -> tuple[int, int]:
    """A value and its mask.  Raises ValueError."""
    value, slash, mask = text.partition("/")
    return _number(value), _number(mask) if slash else _ALL_BITS


def _mark(option: _Option) -> _Option:
    value, mask = _marked(option.values[0])
    return option._replace(values=(f"{value:#x}" + (f"/{mask:#x}" if mask != _ALL_BITS else ""),))


def _set_mark(option: _Option) -> _Option:
    """Every way to change the mark: bits of the mask are cleared, then those of the value turned over."""
    value, mask = _marked(option.values[0])
    match option.name:
        case "--set-mark":
            mask |= value
        case "--and-mark":
            value, mask = 0, value ^ _ALL_BITS
        case "--or-mark":
            mask = value
        case "--xor-mark":
            mask = 0
    return _Option("--set-xmark", (f"{value:#x}/{mask:#x}",), option.negated)


def _ports(option: _Option) -> _Option | None:
    first, colon, last = option.values[0].partition(":")
    if not colon:
        return option
    low, high = int(first or 0), int(last or 65535)
    if (low, high) == (0, 65535) and not option.negated:
        return None
    return option._replace(values=(f"{low}" if low == high else f"{low}:{high}",))


def _list(option: _Option) -> _Option:
    return option._replace(values=(",".join(sorted(set(option.values[0].upper().split(",")))),))


def _flags(option: _Option) -> _Option:
    def of(text: str) -> str:
        named = {"ALL": _FLAGS, "NONE": ()}.get(text, text.split(","))
        return ",".join(sorted(set(named))) or "NONE"

    return option._replace(values=tuple(of(text.upper()) for text in option.values))


def _chance(option: _Option) -> _Option:
    """As the kernel has it; a step beside a plain fraction is that fraction, since versions round in different ways."""
    steps = round(float(option.values[0]) * _STEPS)
    near = Fraction(steps, _STEPS).limit_denominator(_PLAIN)
    if 0 < near < 1 and abs(round(near * _STEPS) - steps) <= 1:
        steps = round(near * _STEPS)
    return option._replace(values=(f"{steps / _STEPS:.11f}",))


def _recent_mask(option: _Option) -> _Option | None:
    mask = ipaddress.ip_address(option.values[0])
    if int(mask) == (1 << mask.max_prefixlen) - 1:
        return None
    return option._replace(values=(str(mask),))


def _destination(option: _Option) -> _Option:
    found = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](:.*)?", option.values[0])
    if found is None:
        return option._replace(values=(str(ipaddress.ip_address(option.values[0])),))
    address = str(ipaddress.ip_address(found[1]))
    return option._replace(values=(f"[{address}]{found[2]}" if found[2] else address,))


def _reject(option: _Option) -> _Option:
    said = {"port-unreach": "icmp-port-unreachable", "icmp6-port-unreachable": "icmp-port-unreachable"}
    return option._replace(values=(said.get(option.values[0], option.values[0]),))


def _each(
    names: Iterable[str], change: Callable[[_Option], _Option | None]
) -> dict[tuple[str, str], Callable[[_Option], _Option | None]]:
    return {("", name): change for name in names}


_SYN = ("ACK,FIN,RST,SYN", "SYN")
_VALUES: Mapping[tuple[str, str], Callable[[_Option], _Option | None]] = {
    **_each(("--sport", "--dport"), _ports),
    **_each(("--ports", "--sports", "--dports", "--ctstate", "--src-type", "--dst-type"), _list),
    **_each(("--set-xmark", "--set-mark", "--and-mark", "--or-mark", "--xor-mark"), _set_mark),
    ("", "--mark"): _mark,
    ("", "--tcp-flags"): _flags,
    ("", "--probability"): _chance,
    ("recent", "--mask"): _recent_mask,
    ("DNAT", "--to-destination"): _destination,
    ("REJECT", "--reject-with"): _reject,
}
_DEFAULTS = frozenset(
    {
        ("--rsource",),
        ("--name", "DEFAULT"),
        ("--packet", "0"),
        ("--reject-with", "icmp-port-unreachable"),
    }
)
