"""The backend on a real kernel, with real packets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from proxycore.api import LocalPodsByCIDR
from proxycore.testing.clients import Call, ask, connected, who
from proxycore.testing.lab import CLIENT_ADDRESSES, Lab
from proxycore.testing.states import batch, context, frontend, full, host, name_of, node_port, service
from proxycore_ipvs.backend import IpvsBackend

from .inside import Inside

pytestmark = [pytest.mark.root, pytest.mark.ipvs, pytest.mark.slow]

FACTS = host(detect_local=LocalPodsByCIDR(("10.0.0.0/24", "fd00:10::/64")))
NAME = name_of()
CALL = Call("external", CLIENT_ADDRESSES["external"][0], "172.30.0.1")
SIX = name_of("six", family="IPv6")
CALL_SIX = Call("external", CLIENT_ADDRESSES["external"][1], "fd00:172:30::1")
HERE, THERE = "10.180.1.5:8080", "10.180.1.6:8080"
COMMANDS = (
    "ipvsadm -Sn",
    "ipset save",
    "iptables-legacy-save",
    "ip6tables-legacy-save",
    "ip -4 rule",
    "ip -6 rule",
    "ip -4 route show table all",
    "ip -6 route show table 310",
)


def web(*endpoints: str) -> Any:
    return service(NAME, frontend("172.30.0.1"), node_port(30080), cluster=endpoints)


def six() -> Any:
    return service(SIX, frontend("fd00:172:30::1"), cluster=["[fd00:10:180::5]:8080"])


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Lab]:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    with Lab([8080]) as made:
        made.put({call.source: "world" for call in (CALL, CALL_SIX)})
        yield made


@pytest.fixture
def start(lab: Lab) -> Iterator[Callable[..., Any]]:
    """Starts a backend in the node of the lab."""
    made: list[Any] = []

    def started(**options: object) -> Any:
        made.append(Inside(lab.node, IpvsBackend))
        made[-1].proxycore_backend_start(context(FACTS, options=options))
        return made[-1]

    yield started
    for backend in made:
        backend.proxycore_backend_stop()


def apply(backend: Any, given: Any) -> Any:
    result = backend.proxycore_backend_apply(given)
    assert (result.outcome, result.failed, result.unknown) == ("applied", (), ()), result
    return result


def there(lab: Lab) -> dict[str, list[str]]:
    """All that the backend could leave; counters of chains and times of listing are left out."""
    found = {}
    for command in COMMANDS:
        done = lab.node.run(command.split(), check=False)
        lines = [line for line in done.stdout.splitlines() if not line.startswith(("#", ":"))]
        found[command] = sorted(line.partition(" initval ")[0] for line in lines)
    return found


def test_from_the_start_to_the_cleanup(lab: Lab, start: Callable[..., Any]) -> None:
    before = there(lab)
    backend = start(drainSeconds=600)
    assert backend.proxycore_backend_probe(context(FACTS)).problems == ()
    apply(backend, full(web(HERE, THERE), six(), facts=FACTS))
    assert {ask(lab, CALL) for _ in range(8)} == {HERE, THERE}
    assert ask(lab, CALL_SIX) == "[fd00:10:180::5]:8080"
    assert backend.proxycore_backend_verify(True).drift == ()
    wanted = {NAME: 8, SIX: 1}
    for _ in range(100):
        counted = {each.name: each.connections for each in backend.proxycore_backend_counters()}
        if counted == wanted:
            break
        # The kernel adds its counters up every two seconds.
        time.sleep(0.1)
    assert counted == wanted
    kinds = [each.kind for each in backend.proxycore_backend_inspect(NAME)]
    assert sorted(set(kinds)) == ["destination", "set entry", "virtual server"]

    in_force = there(lab)
    backend.proxycore_backend_stop()
    again = start()
    assert apply(again, full(web(HERE, THERE), six(), facts=FACTS)).operations == 0
    assert there(lab) == in_force
    assert again.proxycore_backend_plan(context(FACTS), full(web(HERE, THERE), six(), facts=FACTS)) == ()

    again.proxycore_backend_stop()
    assert ask(lab, CALL) in (HERE, THERE)
    assert again.proxycore_backend_cleanup(context(FACTS)).removed
    left = there(lab)
    left.pop("iptables-legacy-save"), left.pop("ip6tables-legacy-save")
    assert left == {command: before[command] for command in left}
    rules = lab.node.run(["iptables-legacy-save"]).stdout + lab.node.run(["ip6tables-legacy-save"]).stdout
    assert "PX" not in rules
    assert again.proxycore_backend_cleanup(context(FACTS)).removed == ()


def test_an_endpoint_that_goes_drains(lab: Lab, start: Callable[..., Any]) -> None:
    backend = start()
    apply(backend, full(web(HERE), facts=FACTS))
    with connected(lab, CALL) as made:
        assert who(made) == HERE
        apply(backend, batch(web(THERE)))
        assert ask(lab, CALL) == THERE
        backend.proxycore_backend_verify(True)
        assert who(made) == HERE
        apply(backend, batch(removed=[NAME]))
        assert backend.proxycore_backend_verify(True).drift == ()
        assert who(made) == HERE
        with pytest.raises(OSError):
            ask(lab, CALL)


def test_what_others_take_away_is_found(lab: Lab, start: Callable[..., Any]) -> None:
    backend = start()
    apply(backend, full(web(HERE), facts=FACTS))
    for command in (
        "ipvsadm -d -f 1073741825 -r 10.180.1.5:8080",
        "ipset flush PX4-VIP",
        "ip rule del pref 300",
        "iptables-legacy -t mangle -F PX-KNOWN",
    ):
        lab.node.run(command.split())
    found = backend.proxycore_backend_verify(True)
    told = "\n".join(f"{each.service}: {each.what}" for each in found.drift)
    for text in ("-a -f 1073741825", "172.30.0.1,tcp:80", "pref 300", "PX-KNOWN"):
        assert text in told
    apply(backend, full(web(HERE), facts=FACTS))
    assert backend.proxycore_backend_verify(True).drift == ()
    assert ask(lab, CALL) == HERE


def test_timeouts_of_the_configuration(lab: Lab, start: Callable[..., Any]) -> None:
    start(tcpTimeoutSeconds=1234.0)
    assert "1234" in lab.node.run(["ipvsadm", "-L", "--timeout"]).stdout


def test_the_node_reaches_an_endpoint_on_its_own_address(lab: Lab, start: Callable[..., Any]) -> None:
    own = CLIENT_ADDRESSES["node"][0]
    lab.serve_node({own}, {8080})
    backend = start()
    apply(backend, full(web(f"{own}:8080"), facts=FACTS))
    assert ask(lab, Call("node", own, "172.30.0.1")) == f"{own}:8080"
    assert ask(lab, CALL) == f"{own}:8080"
