"""Verdicts: each rule, and what must not turn an endpoint red."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from proxycore import health, healthbody
from proxycore.health import (
    CHECKS,
    ENDPOINTS,
    ENGINE_DEADLINE_SECONDS,
    NAMED,
    Check,
    Verdict,
    judge,
    sentence,
)
from proxycore.model import ServicePortName
from proxycore.source import Health
from proxycore.status import (
    ConfigStatus,
    Facts,
    NodeStatus,
    ObserverStatus,
    SavedStatus,
    ServerStatus,
    Status,
)

NOW, MONOTONIC = 1_800_000_000.0, 5000.0
WELL = Status(
    synced=True,
    started=True,
    generation=7,
    applied_total=3,
    families=("IPv4", "IPv6"),
    last_success=NOW - 100,
    source_since=NOW - 500,
    node=NodeStatus(eligible=True, why=""),
)


def facts(status: Status = WELL, **more) -> Facts:
    """Facts about a proxy that is well, but for what is given: fields of Facts, or `status__x` of the Status."""
    changed = {k.removeprefix("status__"): more.pop(k) for k in list(more) if k.startswith("status__")}
    status = msgspec.structs.replace(status, **changed)
    return Facts(now=NOW, monotonic=MONOTONIC, status=status, **more)


def red(given: Facts) -> set[str]:
    verdict = judge(given)
    return {endpoint for endpoint in ENDPOINTS if not verdict.healthy(endpoint)}


def check(given: Facts, name: str) -> Check:
    (found,) = (check for check in judge(given).checks if check.name == name)
    return found


def port(number: int) -> ServicePortName:
    return ServicePortName("shop", f"web-{number:02}", "http", "TCP", "IPv4")


ALL = {"livez", "readyz", "healthz"}
STALE = Health("stale", "connection refused")
RULES = {
    "well": (facts(), set()),
    "fresh process": (facts(Status(node=WELL.node)), {"readyz", "healthz"}),
    "synced, first batch under way": (facts(status__applied_total=0), {"readyz", "healthz"}),
    "engine slow": (facts(engine_silent_seconds=ENGINE_DEADLINE_SECONDS), set()),
    "engine hangs": (facts(engine_silent_seconds=ENGINE_DEADLINE_SECONDS + 1), ALL),
    "backend hangs": (facts(backend_overdue="apply of nft has been running for 31 s"), ALL),
    "backend hung once": (facts(backend_overdue_total=4), set()),
    "pending, not long": (facts(status__pending_since=MONOTONIC - 59.9), set()),
    "pending although the kernel answers": (facts(status__pending_since=MONOTONIC - 60), ALL),
    "pending, longer period": (
        facts(status__pending_since=MONOTONIC - 60, sync_period_seconds=300.0),
        set(),
    ),
    "pending as the kernel refuses": (
        facts(status__pending_since=MONOTONIC - 60, status__refused="no such device"),
        {"readyz", "healthz"},
    ),
    "pending as it is held": (
        facts(status__pending_since=MONOTONIC - 60, status__held="Service a/b cannot be read"),
        {"readyz", "healthz"},
    ),
    "pending as the backend hangs": (
        facts(status__pending_since=MONOTONIC - 60, backend_overdue="apply hangs"),
        ALL,
    ),
    "refused a moment ago": (facts(status__refused="busy"), set()),
    "never synced": (facts(status__synced=False), {"readyz"}),
    "API server absent at start for an hour": (
        facts(Status(source=STALE, source_since=NOW - 3600, node=WELL.node)),
        {"readyz", "healthz"},
    ),
    "stale for a moment": (facts(status__source=STALE, status__source_since=NOW - 60), set()),
    "stale too long": (facts(status__source=STALE, status__source_since=NOW - 61), {"readyz"}),
    "stale, more patience": (
        facts(status__source=STALE, status__source_since=NOW - 61, stale_after_seconds=90.0),
        set(),
    ),
    "stale, nobody knows since when": (facts(status__source=STALE, status__source_since=0.0), {"readyz"}),
    "recording is over": (facts(status__source=Health("ended"), status__source_since=NOW - 9999), set()),
    "source has a bug": (
        facts(status__source=Health("failed", "KeyError")),
        {"livez", "readyz", "healthz"},
    ),
    "node is being deleted": (facts(status__node=NodeStatus(why="Node n is being deleted")), {"healthz"}),
    "quarantined": (facts(status__quarantined={port(1): "refused"}), set()),
    "unsupported": (facts(status__unsupported={port(1): "SCTP"}), set()),
    "unreadable": (facts(status__troubles={"Service shop/web": "spec.ports[0]: no"}), set()),
    "drift": (facts(status__drift_total=3, status__drift_unrepaired=True), set()),
    "observer fails": (facts(observers=(ObserverStatus(name="x", error="KeyError: 'y'"),)), set()),
    "observer hangs": (facts(observers=(ObserverStatus(name="x", overdue="applied of x hangs"),)), set()),
    "observer left out": (facts(left_out=("plugin 'x': no",)), set()),
    "disk full": (facts(saved=SavedStatus(path="/var/lib/x", problem="no space left on device")), set()),
    "takeover": (facts(takeover="kube-proxy is running"), set()),
    "configuration refused": (facts(config=ConfigStatus(loaded_at=NOW, problem="mode: no")), set()),
    "configuration waits": (facts(config=ConfigStatus(loaded_at=NOW, needs_restart=("mode",))), set()),
    "port taken": (facts(servers=(ServerStatus(address="0.0.0.0:10256", problem="in use"),)), set()),
}


@pytest.mark.parametrize("case", RULES, ids=str)
def test_rule(case: str) -> None:
    given, expected = RULES[case]
    assert red(given) == expected


INFORMATION = {
    "quarantined": "quarantined",
    "unsupported": "unsupported",
    "unreadable": "objects",
    "drift": "drift",
    "observer fails": "observers",
    "observer hangs": "observers",
    "observer left out": "observers",
    "disk full": "saved-state",
    "takeover": "takeover",
    "configuration refused": "configuration",
    "configuration waits": "configuration",
    "port taken": "servers",
}


@pytest.mark.parametrize("case", INFORMATION)
def test_what_gates_nothing_is_shown_nevertheless(case: str) -> None:
    found = check(RULES[case][0], INFORMATION[case])
    assert not found.healthy
    assert found.gates == frozenset()
    assert found.detail


@pytest.mark.parametrize("case", RULES, ids=str)
def test_every_check_is_there_every_time_with_a_detail(case: str) -> None:
    checks = judge(RULES[case][0]).checks
    assert tuple(check.name for check in checks) == tuple(CHECKS)
    assert all(check.detail and check.detail.isprintable() for check in checks)
    assert all(check.gates == CHECKS[check.name] for check in checks if check.healthy)
    assert all(check.gates <= CHECKS[check.name] for check in checks)


def test_the_proxy_may_be_well_on_a_node_that_goes() -> None:
    leaving = judge(RULES["node is being deleted"][0])
    assert leaving.proxy_healthy
    assert not leaving.healthy("healthz")
    assert not judge(RULES["backend hangs"][0]).proxy_healthy


@pytest.mark.parametrize(
    ("case", "name", "detail", "age"),
    [
        ("engine hangs", "engine", "its loop has not turned for 31 s, past the deadline of 30 s", 31.0),
        ("backend hangs", "backend", "apply of nft has been running for 31 s", None),
        (
            "pending although the kernel answers",
            "pending",
            "the oldest change has been waiting for 60 s, past the limit of 60 s, although the kernel answers",
            60.0,
        ),
        (
            "pending as the kernel refuses",
            "pending",
            "the oldest change has been waiting for 60 s, past the limit of 60 s: the backend refuses",
            60.0,
        ),
        (
            "pending as it is held",
            "pending",
            "the oldest change has been waiting for 60 s, past the limit of 60 s: "
            "something cannot be read that only the kernel still knows",
            60.0,
        ),
        ("stale too long", "source", "stale for 61 s", 61.0),
        ("stale for a moment", "source", "stale for 60 s (not ready after 60 s)", 60.0),
        (
            "API server absent at start for an hour",
            "source",
            "has not delivered everything yet, stale for 3600 s",
            3600.0,
        ),
        (
            "fresh process",
            "programmed",
            "nothing has been programmed yet: the source has not delivered everything",
            None,
        ),
        (
            "synced, first batch under way",
            "programmed",
            "nothing has been programmed yet: the first batch is under way",
            None,
        ),
        ("node is being deleted", "node", "Node n is being deleted", None),
        ("quarantined", "quarantined", "1 Service port set aside after a failure", None),
        ("unreadable", "objects", "1 object or file cannot be read, the last good state stays", None),
        ("port taken", "servers", "cannot be opened: 0.0.0.0:10256: in use", None),
        (
            "disk full",
            "saved-state",
            "/var/lib/x, not written yet: no space left on device",
            None,
        ),
        ("configuration waits", "configuration", "waits for a restart: mode", None),
        ("observer fails", "observers", "x failed", None),
    ],
)
def test_detail_and_age(case: str, name: str, detail: str, age: float | None) -> None:
    found = check(RULES[case][0], name)
    assert (found.detail, found.age_seconds) == (detail, age)


def test_the_source_is_named() -> None:
    stale = facts(status__source=STALE, status__source_since=NOW - 75, source_name="kubernetes")
    found = check(stale, "source")
    assert found.detail == "kubernetes stale for 75 s"
    # Why is not for everybody: it may quote what a credential plugin says.
    assert found.more == ("connection refused",)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"status__synced": False}, "the source has not delivered everything"),
        (
            {"status__held": "Service a/b cannot be read"},
            "something cannot be read that only the kernel still knows",
        ),
        ({"status__started": False}, "the backend has not started"),
        (
            {"status__started": False, "status__refused": "the backend cannot start: no"},
            "the backend refuses",
        ),
    ],
)
def test_why_nothing_is_programmed_yet(more, why: str) -> None:
    given = facts(status__applied_total=0, **more)
    assert check(given, "programmed").detail == f"nothing has been programmed yet: {why}"


def test_few_services_are_named_and_never_in_the_detail() -> None:
    found = check(facts(status__quarantined={port(n): f"reason {n}" for n in range(20)}), "quarantined")
    assert found.detail == "20 Service ports set aside after a failure"
    assert len(found.more) == NAMED
    assert found.more[0] == "shop/web-00:http TCP IPv4: reason 0"


def test_what_comes_from_elsewhere_is_one_printable_line_of_limited_length() -> None:
    evil = "a\r\nb\x1b[31m" + "x" * 10_000
    found = check(facts(backend_overdue=evil), "backend")
    assert found.detail.isprintable()
    assert len(found.detail) == health.LONGEST_TEXT
    named = check(facts(status__troubles={evil: evil}), "objects").more[0]
    assert named.isprintable()
    assert len(named) == health.LONGEST_TEXT


@pytest.mark.parametrize(
    ("case", "name", "more"),
    [
        ("pending as the kernel refuses", "pending", "no such device"),
        ("pending as it is held", "pending", "Service a/b cannot be read"),
        ("observer fails", "observers", "x: KeyError: 'y'"),
        ("observer left out", "observers", "plugin 'x': no"),
        ("configuration refused", "configuration", "mode: no"),
        ("unreadable", "objects", "Service shop/web: spec.ports[0]: no"),
    ],
)
def test_particulars_are_not_for_everybody(case: str, name: str, more: str) -> None:
    found = check(RULES[case][0], name)
    assert found.more == (more,)
    assert more not in found.detail
    assert more in sentence([found])


def test_a_sentence_for_observers() -> None:
    verdict = judge(facts(backend_overdue="apply hangs", engine_silent_seconds=99.0))
    assert sentence(verdict.proxy_failing) == (
        "engine: its loop has not turned for 99 s, past the deadline of 30 s; backend: apply hangs"
    )
    assert sentence(judge(facts()).proxy_failing) == ""


# -- bodies ------------------------------------------------------------------------------------------------------


def body(given: Facts, endpoint: str = "healthz", since=None, in_full: bool = False):
    return json.loads(healthbody.json_body(endpoint, given, judge(given), since or {}, in_full=in_full))


def test_healthz_body_has_kube_proxys_keys() -> None:
    found = body(facts())
    del found["checks"]
    now, then = "2027-01-15T08:00:00.000000Z", "2027-01-15T07:58:20.000000Z"
    family = {"lastUpdated": then, "healthy": True}
    assert found == {
        "lastUpdated": now,
        "currentTime": now,
        "nodeEligible": True,
        "healthy": True,
        "status": {"IPv4": family, "IPv6": family},
    }


def test_an_ineligible_node_leaves_the_proxy_healthy_in_the_body() -> None:
    found = body(RULES["node is being deleted"][0])
    assert (found["nodeEligible"], found["healthy"], found["status"]["IPv4"]["healthy"]) == (
        False,
        True,
        True,
    )
    assert found["lastUpdated"] == "2027-01-15T07:58:20.000000Z", "not now: the answer is 503"


@pytest.mark.parametrize("endpoint", ["livez", "readyz"])
def test_the_others_do_not_speak_of_the_node(endpoint: str) -> None:
    assert set(body(facts(), endpoint)) == {"lastUpdated", "currentTime", "healthy", "status", "checks"}


def test_a_time_that_has_not_come() -> None:
    assert body(RULES["fresh process"][0])["lastUpdated"] == "0001-01-01T00:00:00Z"


def test_checks_in_the_body() -> None:
    given = RULES["quarantined"][0]
    checks = body(given, since={"quarantined": NOW - 5})["checks"]
    assert tuple(checks) == tuple(CHECKS)
    assert checks["quarantined"] == {
        "healthy": False,
        "detail": "1 Service port set aside after a failure",
        "since": "2027-01-15T07:59:55.000000Z",
        "gates": [],
    }
    assert checks["source"]["gates"] == ["readyz"]
    assert "web-01" not in json.dumps(body(given)), "names are not for everybody"
    assert body(given, in_full=True)["checks"]["quarantined"]["more"] == [
        "shop/web-01:http TCP IPv4: refused"
    ]


def test_verbose() -> None:
    given = facts(status__source=STALE, status__source_since=NOW - 75, status__unsupported={port(1): "SCTP"})
    text = healthbody.verbose_body("readyz", given, judge(given), {"source": NOW - 75}, in_full=True).decode()
    assert text == (
        "[+]engine ok\n[+]backend ok\n[+]pending ok\n[+]source-thread ok\n[+]programmed ok\n"
        "[-]source failed (75 s): stale for 75 s\n    connection refused\n"
        "[i]node ok\n[i]quarantined ok\n"
        "[i]unsupported failed: 1 Service port not supported by the backend\n"
        "    shop/web-01:http TCP IPv4: SCTP\n"
        "[i]objects ok\n[i]drift ok\n[i]observers ok\n[i]saved-state ok\n[i]takeover ok\n[i]configuration ok\n[i]servers ok\n"
        "readyz check failed\n"
    )
    passed = healthbody.verbose_body("livez", given, judge(given), {}, in_full=False).decode()
    assert passed.endswith("livez check passed\n")
    assert "[i]source failed: stale" in passed
    assert "web-01" not in passed


def test_the_documentation_has_every_check_and_what_it_turns_red() -> None:
    page = (Path(__file__).parents[2] / "docs" / "health.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \|([a-z ]*)\|([a-z ]*)\|([a-z ]*)\| [^|]+ \|$", page, re.MULTILINE)
    found = [
        (name, {endpoint for endpoint, cell in zip(ENDPOINTS, cells, strict=True) if cell.strip() == "yes"})
        for name, *cells in rows
    ]
    assert found == [(name, set(gates)) for name, gates in CHECKS.items()]


def test_a_verdict_of_nothing_is_green() -> None:
    assert Verdict(()).healthy("livez")
