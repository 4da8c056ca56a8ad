"""Names of chains, as kube-proxy gives them: whoever reads the rules of one can read those of the other.

A name holds 80 bits of a hash, so it need not be kept: nobody will see two Service ports share a chain.
"""

from __future__ import annotations

import itertools
from hashlib import sha256

from proxycore.api import ServicePortName

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_PAIRS = tuple(first + second for first, second in itertools.product(_ALPHABET, repeat=2))


def text_of(name: ServicePortName) -> str:
    """What is hashed for a Service port's chains."""
    return f"{name}{name.protocol.lower()}"


def hashed(text: str) -> str:
    """The first 16 characters of the base32 of the SHA-256 of `text`."""
    # By ten bits each: twice as fast as base64.b32encode, and there may be 100,000 endpoints.
    bits = int.from_bytes(sha256(text.encode()).digest()[:10])
    pairs = _PAIRS
    return (
        pairs[bits >> 70]
        + pairs[bits >> 60 & 1023]
        + pairs[bits >> 50 & 1023]
        + pairs[bits >> 40 & 1023]
        + pairs[bits >> 30 & 1023]
        + pairs[bits >> 20 & 1023]
        + pairs[bits >> 10 & 1023]
        + pairs[bits & 1023]
    )


def service_chain(name: ServicePortName) -> str:
    """Chooses among the endpoints of the pool `cluster`."""
    return f"KUBE-SVC-{hashed(text_of(name))}"


def local_chain(name: ServicePortName) -> str:
    """Chooses among the endpoints of the pool `local`."""
    return f"KUBE-SVL-{hashed(text_of(name))}"


def external_chain(name: ServicePortName, variant: str = "") -> str:
    """Sorts clients by class.  `variant` tells apart the chains of one Service port; kube-proxy has one, without."""
    return f"KUBE-EXT-{hashed(text_of(name) + variant)}"


def firewall_chain(name: ServicePortName, variant: str = "") -> str:
    """Lets through clients of source ranges.  `variant` as for external_chain."""
    return f"KUBE-FW-{hashed(text_of(name) + variant)}"


def endpoint_chain_of(text: str, endpoint: str) -> str:
    """Translates to one endpoint; for text_of() a Service port and the text of the endpoint, `ip:port` or `[ip]:port`."""
    return f"KUBE-SEP-{hashed(text + endpoint)}"
