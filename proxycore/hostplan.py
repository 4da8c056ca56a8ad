"""What the host's own knobs should say: connection tracking, and how willingly the kernel kills this process.

Pure: `plan` works out paths and values; `kernel/sysctl.py` reads and writes, `hostsetup.py` does both and tells people.

Semantics: kube-proxy's conntrack settings, of which 0 leaves a knob alone, and its `oomScoreAdj`.
"""

from __future__ import annotations

from typing import NamedTuple

from .config.model import Config, Conntrack

NETFILTER = "/proc/sys/net/netfilter/"
CONNTRACK_MAX = NETFILTER + "nf_conntrack_max"
HASHSIZE = "/sys/module/nf_conntrack/parameters/hashsize"
OOM_SCORE_ADJ = "/proc/self/oom_score_adj"
ROUTE_LOCALNET = "/proc/sys/net/ipv4/conf/all/route_localnet"

CONNTRACK_MAX_CAP = 1 << 20
"""kube-proxy's cap: on a machine with very many CPUs the product would claim memory that nothing needs."""
ENTRIES_PER_BUCKET = 4


class Setting(NamedTuple):
    """One knob: its file and the number that belongs there.

    `only_raise`: a higher number than ours stays.  `why`: what it is for, in a few words.  `ours`: it is this process's own
    and would be lost with it, so an init container has no use for it.  `follows`: path of the knob without which this one
    means nothing.
    """

    path: str
    value: int
    only_raise: bool
    why: str
    ours: bool = False
    follows: str = ""

    @property
    def name(self) -> str:
        """The last part of the path, by which people know it."""
        return self.path.rpartition("/")[2]


def plan(config: Config, cpus: int, *, route_localnet: bool = False) -> tuple[Setting, ...]:
    """Every knob that the configuration has an opinion about, in the order in which they are to be written.

    `cpus`: those online.  `route_localnet`: the backend serves node ports on loopback addresses by the kernel's routing.
    """
    settings = list(_conntrack(config.conntrack, cpus))
    if route_localnet and config.localhost_node_ports:
        settings.append(Setting(ROUTE_LOCALNET, 1, False, "node ports on loopback addresses"))
    settings.append(Setting(OOM_SCORE_ADJ, config.oom_score_adj, False, "oomScoreAdj", ours=True))
    return tuple(settings)


def conntrack_max(conntrack: Conntrack, cpus: int) -> int:
    """The table's limit; 0: nobody asks for one.

    As in kube-proxy `min` counts only beside `maxPerCore`: 0 there leaves the limit alone.
    """
    if conntrack.max_per_core <= 0:
        return 0
    return min(max(conntrack.max_per_core * cpus, conntrack.minimum), CONNTRACK_MAX_CAP)


def _conntrack(conntrack: Conntrack, cpus: int) -> list[Setting]:
    found: list[Setting] = []
    limit = conntrack_max(conntrack, cpus)
    if limit:
        found.append(Setting(CONNTRACK_MAX, limit, True, "conntrack.maxPerCore, conntrack.min"))
        # Four entries in a bucket are found quickly; more would be searched one by one for each packet.
        found.append(
            Setting(
                HASHSIZE, limit // ENTRIES_PER_BUCKET, True, "conntrack.maxPerCore", follows=CONNTRACK_MAX
            )
        )
    for knob, seconds, why in (
        ("tcp_timeout_established", conntrack.tcp_established_timeout_seconds, "tcpEstablishedTimeout"),
        ("tcp_timeout_close_wait", conntrack.tcp_close_wait_timeout_seconds, "tcpCloseWaitTimeout"),
        ("udp_timeout", conntrack.udp_timeout_seconds, "udpTimeout"),
        ("udp_timeout_stream", conntrack.udp_stream_timeout_seconds, "udpStreamTimeout"),
    ):
        if seconds > 0:
            # The kernel counts in seconds, and 0 would drop each flow at once.
            found.append(
                Setting(f"{NETFILTER}nf_conntrack_{knob}", max(int(seconds), 1), False, f"conntrack.{why}")
            )
    if conntrack.tcp_be_liberal:
        found.append(Setting(f"{NETFILTER}nf_conntrack_tcp_be_liberal", 1, False, "conntrack.tcpBeLiberal"))
    return found
