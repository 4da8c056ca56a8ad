"""A backend that goes on with rules of one variant of iptables: those of the other are the take-over's."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from io import StringIO

import pytest

from proxycore import logs
from proxycore.errors import KernelError
from proxycore.kernel import kubeproxy
from proxycore.takeover import Takeover
from proxycore.testing.netns import Namespace

from .rules import OTHER_VARIANT, PREFIX, VARIANTS, Served, kube_proxy, load, saved

pytestmark = pytest.mark.root

SERVICES = (
    Served("default/web:http", "172.30.0.41", ("10.180.0.1:8080",)),
    Served("default/web6:http", "fd00:172:30::41", ("[fd00:10::1]:8080",)),
)
ADDED = Served("default/more:http", "172.30.0.43", ("10.180.0.2:8080",))
POD_CIDR = {"IPv4": "10.0.0.0/8", "IPv6": "fd00:10::/64"}
MARK = "*nat\n:KUBE-SVC-PROXYCORE - [0:0]\nCOMMIT\n"
NO_MARK = "*nat\n:KUBE-SVC-PROXYCORE - [0:0]\n-X KUBE-SVC-PROXYCORE\nCOMMIT\n"
QUICK = (0.01, 0.01, 0.01)


@pytest.fixture
def namespace(tmp_path, monkeypatch) -> Iterator[Namespace]:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    with Namespace("holding") as made:
        yield made


@pytest.fixture
def said() -> Iterator[StringIO]:
    stream = StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure("json", stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr("proxycore.takeover.other_backends", lambda chosen: ())


def entries(said: StringIO, level: str) -> list[dict[str, object]]:
    return [entry for line in said.getvalue().splitlines() if (entry := json.loads(line))["level"] == level]


def load_all(namespace: Namespace, variant: str, *more: Served, mark: bool = False) -> None:
    for family in PREFIX:
        load(namespace, variant, family, kube_proxy((*SERVICES, *more), family, pod_cidr=POD_CIDR[family]))
        if mark:
            load(namespace, variant, family, MARK)


def listing(namespace: Namespace, variant: str) -> str:
    return "\n".join(saved(namespace, variant, family) for family in PREFIX)


def names(variant: str, *families: str) -> tuple[str, ...]:
    return tuple(f"{PREFIX[family]}-{variant}" for family in families or PREFIX)


def made(variant: str, mode: str = "auto", *families: str, **options) -> Takeover:
    """Of a backend that holds a variant, of these families or of both."""
    return Takeover(
        mode,
        backend="iptables",
        log=logs.get("takeover"),
        **{"without": ("iptables",), "holds": lambda: names(variant, *families), "pauses": QUICK, **options},
    )


@pytest.mark.parametrize("held", VARIANTS)
def test_only_what_is_not_held_goes(namespace, said, held):
    """Of the other variant all goes, whoever made it."""
    load_all(namespace, held, mark=True)
    load_all(namespace, OTHER_VARIANT[held], mark=True)
    load(namespace, OTHER_VARIANT[held], "IPv4", "*nat\n:KUBE-SVC-LOCALNET - [0:0]\nCOMMIT\n")
    ours = listing(namespace, held)
    takeover = made(held)
    namespace.call(takeover.refuse_if_needed)
    assert namespace.call(takeover.after_first_sync)
    assert "KUBE" not in listing(namespace, OTHER_VARIANT[held])
    assert listing(namespace, held) == ours
    assert takeover.problem is None


@pytest.mark.parametrize("held", VARIANTS)
def test_a_family_that_is_not_served_is_not_held(namespace, said, held):
    load_all(namespace, held, mark=True)
    ours = saved(namespace, held, "IPv4")
    assert namespace.call(made(held, "auto", "IPv4").after_first_sync)
    assert saved(namespace, held, "IPv4") == ours
    assert "KUBE" not in saved(namespace, held, "IPv6")


def test_a_backend_that_does_not_say_what_it_holds_holds_all(namespace, said):
    for variant in VARIANTS:
        load_all(namespace, variant, mark=True)
    before = [listing(namespace, variant) for variant in VARIANTS]
    assert namespace.call(made("nft", holds=tuple).after_first_sync)
    assert [listing(namespace, variant) for variant in VARIANTS] == before


@pytest.mark.parametrize("held", VARIANTS)
def test_leaving_names_what_is_beside_and_not_what_is_held(namespace, said, held):
    load_all(namespace, held, mark=True)
    assert namespace.call(made(held, "leave").after_first_sync)
    assert said.getvalue() == ""
    load_all(namespace, OTHER_VARIANT[held])
    takeover = made(held, "leave")
    assert not namespace.call(takeover.after_first_sync)
    assert f"iptables-{OTHER_VARIANT[held]}" in takeover.problem
    assert f"iptables-{held}" not in takeover.problem


@pytest.mark.parametrize("held", VARIANTS)
def test_nothing_goes_while_something_is_to_be_waited_for_and_then_what_there_is_by_then(
    namespace, said, monkeypatch, held
):
    """A kube-proxy that still works in the other variant adds a Service meanwhile."""
    monkeypatch.setattr("proxycore.takeover._HOLD_LOOK_SECONDS", 0.001)
    other = OTHER_VARIANT[held]
    load_all(namespace, held, mark=True)
    load_all(namespace, other)
    seen: list[bool] = []

    def hold() -> str | None:
        seen.append("172.30.0.41" in listing(namespace, other))
        if len(seen) == 2:
            load_all(namespace, other, ADDED)
        return "not all is in force" if len(seen) < 4 else None

    takeover = made(held, hold=hold)
    namespace.call(takeover.refuse_if_needed)
    assert "172.30.0.41" in listing(namespace, other)
    assert namespace.call(takeover.after_first_sync)
    assert seen == [True] * 4
    assert "KUBE" not in listing(namespace, other)
    assert "172.30.0.43" not in listing(namespace, other)
    assert [entry["reason"] for entry in entries(said, "warning")] == ["not all is in force"]


@pytest.mark.parametrize("where", VARIANTS)
@pytest.mark.parametrize("held", VARIANTS)
def test_before_the_start_all_counts_but_what_bears_the_mark(namespace, said, held, where):
    load_all(namespace, where)
    with pytest.raises(KernelError, match=rf"takeover: refuse.*iptables-{where} table nat"):
        namespace.call(made(held, "refuse").refuse_if_needed)
    for family in PREFIX:
        load(namespace, where, family, MARK)
    namespace.call(made(held, "refuse").refuse_if_needed)


# -- a kube-proxy in the variant that is held --


@pytest.mark.parametrize("held", VARIANTS)
def test_the_marker_tells_whose_rules_they_are(namespace, held):
    def strangers() -> frozenset[str]:
        return namespace.call(lambda: kubeproxy.strangers(names(held)))

    assert strangers() == frozenset()
    load_all(namespace, OTHER_VARIANT[held])
    assert strangers() == frozenset()
    load_all(namespace, held)
    assert strangers() == frozenset(names(held))
    assert namespace.call(kubeproxy.marked) == frozenset()
    load(namespace, held, "IPv4", MARK)
    assert strangers() == {f"ip6tables-{held}"}
    assert namespace.call(kubeproxy.marked) == {f"iptables-{held}"}
    load(namespace, held, "IPv6", MARK)
    assert strangers() == frozenset()
    assert namespace.call(kubeproxy.marked) == frozenset(names(held))
    # A table of the backend's own where nothing is left is nobody's.
    for family in PREFIX:
        load(
            namespace, held, family, "*nat\n-F\n:KUBE-SVC-PROXYCORE - [0:0]\n-X KUBE-SVC-PROXYCORE\nCOMMIT\n"
        )
    assert strangers() == frozenset(names(held))


@pytest.mark.parametrize("held", VARIANTS)
def test_a_marker_that_stays_away_is_a_kube_proxy_at_work(namespace, said, held):
    load_all(namespace, held)
    ours = listing(namespace, held)
    takeover = made(held)
    namespace.call(takeover.refuse_if_needed)
    assert not namespace.call(takeover.after_first_sync)
    [line] = entries(said, "error")
    assert "kube-proxy is still running" in line["msg"]
    assert line["found"] == sorted(names(held))
    assert "stop kube-proxy" in line["do"]
    assert "still running" in takeover.problem
    assert listing(namespace, held) == ours


def lose_the_marker(namespace: Namespace, held: str, monkeypatch, times: int) -> list[bool]:
    """kube-proxy syncs so often, and the backend makes the marker anew each time, a little later."""
    strangers = kubeproxy.strangers
    looks: list[bool] = []

    def look(tools):
        found = strangers(tools)
        looks.append(bool(found))
        if found:
            load(namespace, held, "IPv4", MARK)
        elif sum(looks) < times:
            load(namespace, held, "IPv4", NO_MARK)
        return found

    monkeypatch.setattr(kubeproxy, "strangers", look)
    return looks


@pytest.mark.parametrize("held", VARIANTS)
@pytest.mark.parametrize(("times", "running"), [(1, False), (2, True)])
def test_a_marker_that_goes_again_is_a_kube_proxy_at_work(namespace, said, monkeypatch, held, times, running):
    """Once may be the last thing that it did."""
    load_all(namespace, held, mark=True)
    takeover = made(held)
    lose_the_marker(namespace, held, monkeypatch, times)
    monkeypatch.setattr("proxycore.takeover._STRANGERS_LOOK_SECONDS", 0.001)
    takeover._expected = True
    assert namespace.call(takeover.after_first_sync) is not running
    assert [entry["msg"] for entry in entries(said, "error")] == (
        ["kube-proxy is still running: it changes the rules that this proxy goes on with"] if running else []
    )
    assert (takeover.problem is not None) is running


def test_between_two_looks_at_everything_the_marker_is_looked_at_often(namespace, said, monkeypatch):
    """It is away for a second or two, and the looks are half a minute apart."""
    load_all(namespace, "nft", mark=True)
    takeover = made("nft", pauses=(20.0,))
    looks = lose_the_marker(namespace, "nft", monkeypatch, 2)
    monkeypatch.setattr("proxycore.takeover._STRANGERS_LOOK_SECONDS", 0.001)
    takeover._expected = True
    assert not namespace.call(takeover.after_first_sync)
    assert looks == [False, True, False, True]
