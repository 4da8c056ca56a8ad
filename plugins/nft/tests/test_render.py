"""The text that `proxyctl render` shows, whole.

After a change that is meant, write the files in `golden/` anew and read the difference:

    PROXYCORE_UPDATE_GOLDEN=1 python -m pytest plugins/nft/tests/test_render.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from proxycore.api import FrontendKind, NodePortAddresses, WhenEmpty
from proxycore.testing.netns import Namespace
from proxycore.testing.states import (
    EXTERNAL_LOCAL,
    context,
    endpoint,
    frontend,
    full,
    host,
    name_of,
    node_port,
    pool,
    service,
)
from proxycore_nft import classes
from proxycore_nft.backend import NftBackend
from proxycore_nft.kernel import NetlinkKernel
from proxycore_nft.program import HOST_SETS
from proxycore_nft.rows import SERVICE_SETS
from proxycore_nft.skeleton import DIGEST_PREFIX

ROOT = Path(__file__).parents[3]
GOLDEN = Path(__file__).parent / "golden"
SETS = (*SERVICE_SETS, *HOST_SETS, "classes")
UPDATE = "PROXYCORE_UPDATE_GOLDEN"

WEB = service(
    name_of("web", "http"),
    frontend("172.30.0.41"),
    frontend(
        "192.0.2.10",
        kind=FrontendKind.LOAD_BALANCER_IP,
        routes=EXTERNAL_LOCAL,
        source_ranges=["198.51.100.0/24", "203.0.113.7/32"],
    ),
    node_port(30080, routes=EXTERNAL_LOCAL),
    cluster=pool(endpoint("10.180.0.1:8080", local=True), "10.180.1.1:8080"),
    local=pool(endpoint("10.180.0.1:8080", local=True)),
    affinity=10800,
)
DNS = service(
    name_of("dns", "dns", "UDP"),
    frontend("172.30.0.10", 53, protocol="UDP"),
    cluster=["10.180.0.2:5353", "10.180.1.2:5353", "10.180.1.3:5353"],
)
EMPTY = service(name_of("empty", ""), frontend("172.30.0.50", 443), cluster=pool(when_empty=WhenEmpty.DROP))
WEB6 = service(
    name_of("web", "http", family="IPv6"),
    frontend("fd00:172:30::41"),
    node_port(30080),
    cluster=pool(
        endpoint("[fd00:10:180::1]:8080", local=True), endpoint("[fd00:10:180:1::1]:8080", node=None)
    ),
    affinity=10,
)
CASES = {
    "services": (host(), [WEB, DNS, EMPTY, WEB6]),
    "nothing": (host(node_ports_ipv4=NodePortAddresses(all_local=True), detect_local=None), []),
}


def render(case: str) -> str:
    facts, states = CASES[case]
    text = NftBackend().proxycore_backend_render(context(facts), full(*states, facts=facts))
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("case", CASES)
def test_rendering_is_as_on_file(case):
    path = GOLDEN / f"{case}.nft"
    text = render(case)
    if os.environ.get(UPDATE):
        path.write_text(text)
    assert text.splitlines() == path.read_text().splitlines(), f"set {UPDATE}=1 to write {path.name} anew"


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_rendering_is_the_same_in_every_process(seed):
    """Nothing in it has the order of a set."""
    script = "from plugins.nft.tests.test_render import render; print(render('services'), end='')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == render("services")


def _chains(text: str) -> dict[tuple[str, str], list[str]]:
    """Lines of each chain that is written out, by family and name; comments and what a base chain is left out."""
    found: dict[tuple[str, str], list[str]] = {}
    for family, table in re.findall(r"^table (\S+) \S+ \{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE):
        for name, inner in re.findall(r"^\tchain (\S+) \{(.*?)\}$", table, re.DOTALL | re.MULTILINE):
            lines = [line.strip() for line in re.split("[\n;]", inner)]
            found.setdefault((family, name), []).extend(
                line for line in lines if line and not line.startswith(("comment", "type"))
            )
    return found


@pytest.fixture
def programmed(request, namespace):
    """A case, and what the kernel holds once the backend has programmed it: as nft lists it, and by netlink."""
    facts, states = CASES[request.param]
    backend = NftBackend()
    namespace.call(lambda: backend.proxycore_backend_start(context(facts)))
    result = namespace.call(lambda: backend.proxycore_backend_apply(full(*states, facts=facts)))
    assert result.outcome == "applied"
    assert not result.failed
    kernel = namespace.call(NetlinkKernel)
    try:
        yield request.param, namespace.run(["nft", "list", "ruleset"]).stdout, kernel
    finally:
        kernel.close()
        backend.proxycore_backend_stop()


@pytest.mark.root
@pytest.mark.parametrize("programmed", CASES, indirect=True)
def test_chains_are_rendered_as_nft_lists_those_that_we_make(programmed):
    case, listed, _ = programmed
    ours, theirs = _chains(render(case)), _chains(listed)
    assert ours.keys() == theirs.keys()
    made = {place for place in ours if classes.parse_chain(place[1]) or place[1].partition("sticky-")[1]}
    assert len(made) >= 64
    for place in made:
        assert [_as_listed(line) for line in ours[place]] == theirs[place], place


def _as_listed(line: str) -> str:
    """nft writes `meta priority` as a traffic control handle, and seconds as hours."""

    def handle(match: re.Match[str]) -> str:
        return f"{int(match[1], 16):x}:{int(match[2], 16):x}"

    return re.sub("0x([0-9a-f]{4})([0-9a-f]{4})", handle, line).replace("10800s", "3h")


@pytest.mark.root
@pytest.mark.parametrize("programmed", CASES, indirect=True)
def test_rendered_elements_are_what_is_programmed(programmed):
    """nft itself reads the rendered elements, beside chains that do nothing, and the kernel then holds the same bytes."""
    case, _, kernel = programmed
    bodies = rf"(^\tchain (?!{DIGEST_PREFIX})\S+ \{{)\n.*?^\t\}}$"
    text = re.sub(bodies, r"\1\n\t}", render(case), flags=re.DOTALL | re.MULTILINE)
    with Namespace("rendered") as other:
        other.run(["nft", "-f", "-"], stdin=text)
        beside = other.call(NetlinkKernel)
        try:
            for nft in ("ip", "ip6"):
                for name in SETS:
                    assert _held(beside, nft, name) == _held(kernel, nft, name), (nft, name)
        finally:
            beside.close()


def _held(kernel: NetlinkKernel, nft: str, name: str) -> list[object]:
    """All elements but the mark that nft itself sets before the first interval."""
    return sorted(
        (e.key, e.key_end or b"", e.data or b"", e.chain or "", e.flags, e.comment)
        for e in kernel.elements(nft, "proxycore", name)
        if any(e.key) or not e.flags
    )
