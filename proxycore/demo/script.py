"""Who dials what in the demo, who must answer, and what changes meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .lab import CLIENT, NODE, NODE_IPV4, OUTSIDE
from .manifests import Folder, Pod
from .probe import DROPPED, REFUSED, Probe

OFFICE, COLLEAGUE, STRANGER, _ = OUTSIDE
WEB, API, DNS, BLOG, CHECKOUT = "shop/web", "shop/api", "kube-system/kube-dns", "shop/blog", "shop/checkout"

WEB_4 = Pod("web-4", NODE, ("10.244.1.14",), frozenset({("TCP", 8080)}))
CHECKOUT_1 = Pod("checkout-1", NODE, ("10.244.1.61",), frozenset({("TCP", 8080)}))

POOLS = {
    "web": frozenset({"web-1", "web-2", "web-3"}),
    "api": frozenset({"api-1", "api-2", "api-3"}),
    "api here": frozenset({"api-1", "api-2"}),
    "dns": frozenset({"dns-1", "dns-2"}),
    "blog": frozenset({"blog-1", "blog-2"}),
    "checkout": frozenset({REFUSED}),
    "nobody": frozenset({DROPPED}),
}

NODE_PORT = Probe(
    service=WEB,
    client="outside",
    pod="",
    source=OFFICE,
    address=NODE_IPV4,
    port=30080,
    pool="web",
    masquerade="yes",
)

PROBES = (
    Probe(service=WEB, client="pod", pod=CLIENT.name, address="10.96.0.80", port=80, pool="web"),
    Probe(
        service=WEB,
        client="pod web-1",
        pod="web-1",
        address="10.96.0.80",
        port=80,
        pool="web",
        masquerade="hairpin",
    ),
    Probe(service=WEB, client="node", pod=None, address="10.96.0.80", port=80, pool="web", masquerade="yes"),
    NODE_PORT,
    Probe(
        service=API,
        client="office",
        pod="",
        source=OFFICE,
        address="203.0.113.10",
        port=443,
        pool="api here",
        sticky=True,
    ),
    Probe(
        service=API,
        client="office",
        pod="",
        source=COLLEAGUE,
        address="203.0.113.10",
        port=443,
        pool="api here",
        sticky=True,
    ),
    Probe(
        service=API,
        client="stranger",
        pod="",
        source=STRANGER,
        address="203.0.113.10",
        port=443,
        pool="nobody",
    ),
    Probe(
        service=API, client="pod", pod=CLIENT.name, address="203.0.113.10", port=443, pool="api", sticky=True
    ),
    Probe(
        service=DNS, client="pod", pod=CLIENT.name, address="10.96.0.10", port=53, protocol="UDP", pool="dns"
    ),
    Probe(
        service=DNS,
        client="node",
        pod=None,
        address="10.96.0.10",
        port=53,
        protocol="UDP",
        pool="dns",
        masquerade="yes",
    ),
    Probe(service=BLOG, client="pod", pod=CLIENT.name, address="10.96.0.90", port=80, pool="blog"),
    Probe(service=BLOG, client="pod", pod=CLIENT.name, address="fd00:10:96::90", port=80, pool="blog"),
    Probe(
        service=BLOG,
        client="node",
        pod=None,
        address="fd00:10:96::90",
        port=80,
        pool="blog",
        masquerade="yes",
    ),
    Probe(service=CHECKOUT, client="pod", pod=CLIENT.name, address="10.96.0.66", port=80, pool="checkout"),
    Probe(
        service=CHECKOUT,
        client="node",
        pod=None,
        address="10.96.0.66",
        port=80,
        pool="checkout",
        masquerade="yes",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """A part of the play: `edit` changes the manifests, after which `pool` must be answered by `answers`.

    `comes` and `goes` name the pod that does so; `share` is the act's part of the whole time; `stops`: it begins with
    the end of the proxy.
    """

    title: str
    share: float
    edit: Callable[[Folder], None] | None = None
    pool: str = ""
    answers: frozenset[str] = frozenset()
    comes: str = ""
    goes: str = ""
    stops: bool = False


ACTS = (
    Act(title="the manifests as they are", share=0.24),
    Act(
        title="web-4 becomes ready",
        share=0.2,
        edit=lambda folder: folder.add_endpoint("web.yaml", WEB_4),
        pool="web",
        answers=frozenset({"web-1", "web-2", "web-3", "web-4"}),
        comes="web-4",
    ),
    Act(
        title="web-2 goes",
        share=0.24,
        edit=lambda folder: folder.remove_endpoint("web.yaml", "web-2"),
        pool="web",
        answers=frozenset({"web-1", "web-3", "web-4"}),
        goes="web-2",
    ),
    Act(
        title="checkout gets its first pod",
        share=0.16,
        edit=lambda folder: folder.add_endpoint("checkout.yaml", CHECKOUT_1),
        pool="checkout",
        answers=frozenset({CHECKOUT_1.name}),
        comes=CHECKOUT_1.name,
    ),
    Act(title="the proxy is stopped, its rules stay", share=0.16, stops=True),
)
