"""Which IP families this network namespace can carry."""

from __future__ import annotations

from pathlib import Path

from ..model import Family


def usable_families() -> tuple[Family, ...]:
    """IPv4 always; IPv6 if the kernel has it and it is not disabled everywhere.

    Semantics: kube-proxy's test (`/proc/net/if_inet6`, net.ipv6.conf.all.disable_ipv6).
    """
    try:
        disabled = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").read_text().strip() == "1"
    except OSError:
        disabled = True
    if disabled or not Path("/proc/net/if_inet6").exists():
        return ("IPv4",)
    return ("IPv4", "IPv6")
