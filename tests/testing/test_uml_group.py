"""Tests marked `ipvs` are run in a guest and reported as if they had run here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from proxycore.errors import KernelError
from proxycore.testing.uml import group as groups
from proxycore.testing.uml import guest

CONFTEST = """
from proxycore.kernel import ipvs
ipvs.there = lambda: False  # Also where it is.
pytest_plugins = ["proxycore.testing.uml.grouptests"]
"""

INI = """
[pytest]
addopts = --strict-markers
filterwarnings = error
junit_family = legacy
junit_logging = all
"""

MIXED = """
import pathlib
import pytest

@pytest.fixture(scope="class")
def things():
    made = []
    yield made
    assert made == ["here"] or "there" in made, made

@pytest.fixture(autouse=True)
def boot(record_property):
    record_property("boot", pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())

def test_here():
    assert not pathlib.Path("/proc/net/ip_vs").exists() or pathlib.Path("/proc/1/comm").read_text() != "init\\n"

class TestMixed:
    def test_here(self, things):
        things.append("here")

    @pytest.mark.ipvs
    def test_there(self, things):
        things.append("there")
        assert pathlib.Path("/proc/net/ip_vs").exists()

class TestOther:
    def test_here(self, things):
        things.append("here")

@pytest.mark.ipvs
@pytest.mark.parametrize("number", [41, 42], ids=["a b", "c::d"])
def test_value(number):
    print("printed in the guest")
    assert number == 42, "the guest's word"

@pytest.mark.ipvs
def test_skipped():
    pytest.skip("for its own reason")

@pytest.mark.ipvs
@pytest.mark.xfail(reason="known")
def test_xfailed():
    raise ValueError

@pytest.fixture
def broken():
    yield
    raise ValueError("the guest's teardown")

@pytest.mark.ipvs
def test_teardown(broken):
    pass
"""

DYING = """
import os, pathlib, signal, time
import pytest

pytestmark = pytest.mark.ipvs

def test_before():
    pass

def test_deadly():
    print("never seen")
    {deed}
    time.sleep(1000)

def test_after():
    pass
"""


@pytest.fixture
def _booting() -> None:
    if (reason := guest.problem()) is not None:
        pytest.skip(reason)


def pytest_here(
    folder: Path, *words: str, conftest: str = CONFTEST, **environment: str
) -> dict[str, ElementTree.Element]:
    """Run pytest in the folder: by the name of a test, what JUnit's file says of it, in the order of the reports."""
    (folder / "conftest.py").write_text(conftest)
    (folder / "pytest.ini").write_text(INI)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    inherited.pop(groups.REQUIRE, None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--junitxml=result.xml", "-p", "no:cacheprovider", *words],
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (folder / "result.xml").exists(), done.stdout + done.stderr
    cases = ElementTree.parse(folder / "result.xml").iter("testcase")
    return {f"{case.get('classname')}.{case.get('name')}": case for case in cases}


def outcome(case: ElementTree.Element) -> str:
    kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
    return kinds[0] if kinds else "passed"


def text(case: ElementTree.Element) -> str:
    return " ".join(filter(None, (part for child in case for part in (child.get("message"), child.text))))


@pytest.mark.root
@pytest.mark.usefixtures("_booting")
@pytest.mark.parametrize("words", [["-n0"], ["-n2", "--dist=loadgroup"]], ids=["alone", "xdist"])
def test_every_outcome_is_the_guests(tmp_path, words):
    (tmp_path / "test_mixed.py").write_text(MIXED)
    (tmp_path / "test_more.py").write_text(MIXED)
    found = pytest_here(tmp_path, *words)
    assert {name: outcome(case) for name, case in found.items()} == {
        f"test_{module}.{name}": how
        for module in ("mixed", "more")
        for name, how in {
            "test_here": "passed",
            "TestMixed.test_here": "passed",
            "TestMixed.test_there": "passed",
            "TestOther.test_here": "passed",
            "test_value[a b]": "failure",
            "test_value[c::d]": "passed",
            "test_skipped": "skipped",
            "test_xfailed": "skipped",
            "test_teardown": "error",
        }.items()
    }
    failed = text(found["test_mixed.test_value[a b]"])
    assert "AssertionError: the guest's word" in failed
    line = 1 + next(number for number, line in enumerate(MIXED.splitlines()) if "number == 42" in line)
    assert f"test_mixed.py:{line}: AssertionError" in failed
    assert "printed in the guest" in failed
    assert "for its own reason" in text(found["test_mixed.test_skipped"])
    assert "the guest's teardown" in text(found["test_more.test_teardown"])
    boots = {
        name: {one.get("value") for one in case.iter("property") if one.get("name") == "boot"}
        for name, case in found.items()
    }
    here = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert {name for name, ids in boots.items() if ids == {here}} == {
        name for name in found if name.endswith("_here")
    }
    there = set[Any]().union(*(ids for name, ids in boots.items() if not name.endswith("_here")))
    assert len(there) == 1


@pytest.mark.root
@pytest.mark.usefixtures("_booting")
@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        (
            "pathlib.Path('/proc/sysrq-trigger').write_text('c')",
            "the guest ended without a result: Kernel panic",
        ),
        ("os._exit(3)", "the guest's pytest ended with 3"),
    ],
)
def test_a_guest_that_dies_fails_what_had_not_ended(tmp_path, deed, reason):
    (tmp_path / "test_dying.py").write_text(DYING.format(deed=deed))
    found = pytest_here(tmp_path)
    assert [outcome(case) for case in found.values()] == ["passed", "failure", "failure"]
    for name in ("test_deadly", "test_after"):
        said = text(found[f"test_dying.{name}"])
        assert reason in said
        assert "while test_dying.py::test_deadly ran" in said


NO_GUEST = (
    CONFTEST
    + "from proxycore.testing.uml import guest\nguest.problem = lambda: 'no linux.uml here: get it'\n"
)


@pytest.mark.parametrize(("environment", "how"), [({}, "skipped"), ({groups.REQUIRE: "1"}, "error")])
def test_where_there_is_no_guest(tmp_path, environment, how):
    (tmp_path / "test_dying.py").write_text(DYING.format(deed=""))
    found = pytest_here(tmp_path, conftest=NO_GUEST, **environment)
    assert [outcome(case) for case in found.values()] == [how] * 3
    assert "no IPVS in this kernel (modprobe ip_vs may change that), and no linux.uml here: get it" in text(
        found["test_dying.test_before"]
    )


FAKE_GUEST = (
    CONFTEST
    + """
import json, pathlib
from proxycore.errors import KernelError
from proxycore.testing.uml import guest
guest.problem = lambda: None

class FakeGuest:
    def __init__(self, command, *, writable, **options):
        folder = pathlib.Path(writable[0])
        wanted = json.loads((folder / "wanted.json").read_text())
        with pathlib.Path("booted").open("a") as log:
            log.write("booted")
        news = []
        for name in wanted:
            report = {"$report_type": "TestReport", "nodeid": name, "location": ["x", 1, "y"], "keywords": {},
                      "outcome": "passed", "longrepr": None, "sections": [], "user_properties": []}
            news.append({"started": name})
            for when in ("setup", "call", "teardown"):
                bad = when == "call" and "bad" in name
                change = {"when": when, "outcome": "failed", "longrepr": "bad"} if bad else {"when": when}
                news.append({"report": {**report, **change}})
        (folder / "news.jsonl").write_text("".join(json.dumps(one) + "\\\\n" for one in news))

    def wait(self, *arguments, **options):
        return 0

    def close(self):
        pass

guest.Guest = FakeGuest
""".replace("\\\\", "\\")
)

CHOICE = """
import pytest
def test_here(): pass
@pytest.mark.ipvs
class TestThere:
    def test_one(self): assert 0
    def test_bad(self): assert 0
    @pytest.mark.parametrize("n", [1, 2])
    def test_many(self, n): assert 0
"""


ALL_THERE = ("one", "bad", "many[1]", "many[2]")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ["a.here", "b.here", *(f"{file}.{name}" for file in "ab" for name in ALL_THERE)]),
        (
            ["-k", "many or test_here"],
            ["a.here", "b.here", "a.many[1]", "a.many[2]", "b.many[1]", "b.many[2]"],
        ),
        (["test_b.py::TestThere::test_many[2]"], ["b.many[2]"]),
        (["test_b.py::TestThere::test_many[2]", "test_a.py::TestThere::test_one"], ["b.many[2]", "a.one"]),
        (["-x"], ["a.here", "b.here", "a.one", "a.bad"]),
        (["-m", "not ipvs"], ["a.here", "b.here"]),
    ],
)
def test_the_host_chooses_and_one_guest_runs_them(tmp_path, words, names):
    for name in ("test_a.py", "test_b.py"):
        (tmp_path / name).write_text(CHOICE)
    found = pytest_here(tmp_path, *words, conftest=FAKE_GUEST)
    shorter = [name.replace("TestThere.", "").replace("test_", "") for name in found]
    assert shorter == names
    boots = (tmp_path / "booted").read_text() if (tmp_path / "booted").exists() else ""
    assert boots.count("booted") == any(not name.endswith("here") for name in names)


class SilentGuest:
    """Says that the first test is set up, and then nothing until it is closed."""

    def __init__(self, command: list[str], *, writable: list[Path], **_: object) -> None:
        self.folder = writable[0]
        self.closed = threading.Event()

    def wait(self, on_stdout: Any, on_stderr: Any, **_: object) -> int:
        on_stdout(b"collected 2 items\n")
        (name, _other) = json.loads((self.folder / "wanted.json").read_text())
        setup = pytest.TestReport(name, ("x", 1, "y"), {}, "passed", None, "setup")
        with (self.folder / "news.jsonl").open("a") as news:
            news.write(json.dumps({"started": name}) + "\n")
            news.write(json.dumps({"report": {**setup._to_json(), "$report_type": "TestReport"}}) + "\n")
        self.closed.wait()
        raise KernelError("the guest ended without a result: it was closed")

    def close(self) -> None:
        self.closed.set()


def test_a_guest_that_hangs_is_ended(monkeypatch, request):
    monkeypatch.setattr(guest, "Guest", SilentGuest)
    item = request.node
    group = groups.Group(request.config, [item, item], ["x::first", "x::second"], silence_seconds=0.3)
    try:
        first = list(group.reports("x::first", item))
        second = list(group.reports("x::second", item))
    finally:
        group.close()
    assert [(report.when, report.outcome) for report in first] == [("setup", "passed"), ("call", "failed")]
    assert [(report.when, report.outcome) for report in second] == [("call", "failed")]
    for report in (first[-1], *second):
        assert report.longrepr == "the guest was silent for 0.3 s and was ended, while x::first ran"
        assert "collected 2 items" in report.sections[0][1]


class StillbornGuest(SilentGuest):
    def wait(self, *_: object, **__: object) -> int:
        raise guest.GuestUnavailable("user-mode Linux does not start here: ptrace")


@pytest.mark.parametrize(("required", "outcome"), [("", "skipped"), ("1", "failed")])
def test_a_host_that_cannot_start_a_guest(monkeypatch, request, required, outcome):
    monkeypatch.setattr(guest, "Guest", StillbornGuest)
    monkeypatch.setenv(groups.REQUIRE, required)
    group = groups.Group(request.config, [request.node], ["x::first"], silence_seconds=60)
    try:
        (report,) = group.reports("x::first", request.node)
    finally:
        group.close()
    assert report.outcome == outcome
    assert "user-mode Linux does not start here: ptrace" in str(report.longrepr)
