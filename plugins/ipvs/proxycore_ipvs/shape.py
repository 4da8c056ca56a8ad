"""What the data plane of one family depends on besides the Services."""

from __future__ import annotations

import re

import msgspec

from proxycore.api import ConfigError, Family, HostState, LocalPodsByInterface, family_of

from .marks import Marks


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that servers, entries and rules of one family depend on besides the Service.

    `local_pods`: how a local pod is told, as the options of a match: `-s 10.0.0.0/8`, `-i cni0`, `-i veth+`; empty: nobody
    is one.  `scheduler`: of virtual servers whose destinations have all the same weight.  `random_fully`: MASQUERADE knows
    the option.  `security`: there is a table of that name.
    """

    family: Family
    marks: Marks = Marks()
    local_pods: str = ""
    scheduler: str = "rr"
    random_fully: bool = True
    security: bool = True

    @property
    def everyone_is_local(self) -> bool:
        """The detector takes every client for a local pod."""
        return self.local_pods.startswith("-s ") and self.local_pods.endswith("/0")


def shape_of(
    host: HostState,
    family: Family,
    *,
    scheduler: str = "rr",
    random_fully: bool = True,
    security: bool = True,
) -> Shape:
    """The shape that a host needs.

    Raises ConfigError for an interface name that Linux does not allow, and for a masquerade bit with which the mark cannot be
    laid out.
    """
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
    try:
        marks = Marks.with_masquerade_bit(host.masquerade_bit)
    except ValueError as error:
        raise ConfigError(str(error), field="masqueradeBit") from None
    return Shape(
        family=family,
        marks=marks,
        local_pods=local_pods,
        scheduler=scheduler,
        random_fully=random_fully,
        security=security,
    )
