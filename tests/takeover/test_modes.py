"""The three modes, a kube-proxy that goes on running, and what other backends left."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest

from proxycore import logs
from proxycore.errors import KernelError
from proxycore.kernel import kubeproxy, presence, xtables
from proxycore.model import ServicePortName
from proxycore.source import Health
from proxycore.status import Status
from proxycore.takeover import Takeover, clean_up_apart, other_backends, reason_to_wait
from proxycore.testing.netns import Namespace

from .rules import Served, kube_proxy, load, others, saved

pytestmark = pytest.mark.root

SERVICES = (Served("default/web:http", "172.30.0.41", ("10.180.0.1:8080",)),)
RULES = kube_proxy(SERVICES, "IPv4", pod_cidr="10.0.0.0/8")
NAME = ServicePortName("default", "web", "http", "TCP", "IPv4")
QUICK = (0.01, 0.01, 0.01)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace("modes") as made:
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


def entries(said: StringIO, level: str) -> list[dict[str, object]]:
    return [entry for line in said.getvalue().splitlines() if (entry := json.loads(line))["level"] == level]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Other backends have tests of their own below."""
    monkeypatch.setattr("proxycore.takeover.other_backends", lambda chosen: ())


def made(mode: str, **options) -> Takeover:
    return Takeover(mode, backend="nft", log=logs.get("takeover"), **{"pauses": QUICK, **options})


def test_refusing_names_what_is_there_and_what_to_do(namespace, said):
    load(namespace, "nft", "IPv4", RULES)
    before = saved(namespace, "nft", "IPv4")
    with pytest.raises(KernelError) as caught:
        namespace.call(made("refuse").refuse_if_needed)
    text = str(caught.value)
    assert "KUBE-* chains in iptables-nft table nat" in text
    assert "kube-proxy --cleanup" in text
    assert "--takeover auto" in text
    assert saved(namespace, "nft", "IPv4") == before


@pytest.mark.parametrize("mode", ["auto", "refuse", "leave"])
@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_what_an_init_container_of_ours_remembers_is_not_kube_proxys(namespace, said, mode, variant):
    load(namespace, variant, "IPv4", "*nat\n:KUBE-SVC-LOCALNET - [0:0]\nCOMMIT\n")
    takeover = made(mode)
    namespace.call(takeover.refuse_if_needed)
    assert namespace.call(takeover.after_first_sync)
    assert takeover.problem is None
    assert entries(said, "warning") == []
    assert ":KUBE-SVC-LOCALNET" in saved(namespace, variant, "IPv4")


@pytest.mark.parametrize("mode", ["auto", "refuse", "leave"])
def test_an_empty_node_is_nobodys(namespace, said, mode):
    takeover = made(mode, pauses=(60.0,))
    namespace.call(takeover.refuse_if_needed)
    assert namespace.call(takeover.after_first_sync)
    assert takeover.problem is None
    assert said.getvalue() == ""


def test_rules_of_others_alone_are_no_reason(namespace, said):
    load(namespace, "legacy", "IPv4", others("IPv4", uses_mark=False))
    namespace.call(made("refuse").refuse_if_needed)


def test_leaving_is_one_warning(namespace, said):
    load(namespace, "nft", "IPv4", RULES)
    namespace.run(["nft", "add", "table", "ip", "kube-proxy"])
    before = saved(namespace, "nft", "IPv4")
    takeover = made("leave")
    namespace.call(takeover.refuse_if_needed)
    assert not namespace.call(takeover.after_first_sync)
    assert saved(namespace, "nft", "IPv4") == before
    [line] = [json.loads(text) for text in said.getvalue().splitlines()]
    assert line["level"] == "warning"
    assert line["found"][0] == "nftables table ip kube-proxy"
    assert "in force beside ours" in takeover.problem


def test_auto_touches_nothing_before_and_removes_all_after(namespace, said):
    load(namespace, "legacy", "IPv4", RULES)
    before = saved(namespace, "legacy", "IPv4")
    takeover = made("auto")
    namespace.call(takeover.refuse_if_needed)
    assert saved(namespace, "legacy", "IPv4") == before
    assert namespace.call(takeover.after_first_sync)
    assert "KUBE" not in saved(namespace, "legacy", "IPv4")
    removed = [entry["what"] for entry in entries(said, "info") if entry["msg"] == "removed"]
    assert any("chains KUBE-" in str(what) for what in removed)
    assert entries(said, "info")[-1]["msg"].startswith("the node is taken over")
    assert takeover.problem is None


def running_kube_proxy(namespace: Namespace, monkeypatch, times: int) -> list[int]:
    """Writes its rules again after each removal, so often."""
    written: list[int] = []
    remove = kubeproxy.remove_ipvs

    def removed(found, told):
        remove(found, told)
        if len(written) < times:
            written.append(1)
            load(namespace, "nft", "IPv4", RULES)

    monkeypatch.setattr(kubeproxy, "remove_ipvs", removed)
    load(namespace, "nft", "IPv4", RULES)
    return written


def test_a_running_kube_proxy_is_named_and_not_fought(namespace, said, monkeypatch):
    written = running_kube_proxy(namespace, monkeypatch, times=100)
    takeover = made("auto")
    assert not namespace.call(takeover.after_first_sync)
    [line] = entries(said, "error")
    assert "kube-proxy is still running" in line["msg"]
    assert "stop kube-proxy" in line["do"]
    assert "still running" in takeover.problem
    assert len(written) == 2
    assert "KUBE-SERVICES" in saved(namespace, "nft", "IPv4")


def test_the_last_thing_that_kube_proxy_did_is_removed_too(namespace, said, monkeypatch):
    written = running_kube_proxy(namespace, monkeypatch, times=1)
    takeover = made("auto")
    assert namespace.call(takeover.after_first_sync)
    assert written == [1]
    assert entries(said, "error") == []
    assert "KUBE" not in saved(namespace, "nft", "IPv4")


def test_an_old_kubelets_chains_come_back_and_that_is_no_kube_proxy(namespace, said, monkeypatch):
    kubelets = "*nat\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\nCOMMIT\n"
    remove, written = kubeproxy.remove_ipvs, []

    def removed(found, told):
        remove(found, told)
        written.append(1)
        load(namespace, "nft", "IPv4", kubelets)

    monkeypatch.setattr(kubeproxy, "remove_ipvs", removed)
    load(namespace, "nft", "IPv4", RULES)
    assert namespace.call(made("auto").after_first_sync)
    assert len(written) == 1 + len(QUICK)
    assert entries(said, "error") == []


def test_a_removal_that_fails_is_tried_again(namespace, said, monkeypatch):
    load(namespace, "nft", "IPv4", RULES)
    restore, left = xtables.restore, [1, 1]

    def unlucky(tools, text):
        if left:
            left.pop()
            raise KernelError("out of luck")
        restore(tools, text)

    monkeypatch.setattr(xtables, "restore", unlucky)
    assert namespace.call(made("auto").after_first_sync)
    assert [entry["reason"] for entry in entries(said, "warning")] == ["out of luck"]
    assert "KUBE" not in saved(namespace, "nft", "IPv4")


def test_a_removal_that_always_fails_is_an_error_at_the_end(namespace, said, monkeypatch):
    load(namespace, "nft", "IPv4", RULES)

    def unlucky(tools, text):
        raise KernelError("out of luck")

    monkeypatch.setattr(xtables, "restore", unlucky)
    takeover = made("auto")
    assert not namespace.call(takeover.after_first_sync)
    [line] = entries(said, "error")
    assert line["error"] == "out of luck"
    assert "out of luck" in takeover.problem


def test_a_bug_ends_in_the_log(namespace, said, monkeypatch):
    def broken(**options):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(kubeproxy, "census", broken)
    takeover = made("auto")
    assert not namespace.call(takeover.after_first_sync)
    assert "oh" in takeover.problem
    assert "traceback" in entries(said, "error")[0]


@pytest.mark.parametrize("error", [KernelError("no rights"), ZeroDivisionError("no rights")])
@pytest.mark.parametrize("mode", ["auto", "refuse", "leave"])
def test_what_cannot_be_looked_at_keeps_only_a_refusing_start_from_it(said, monkeypatch, mode, error):
    def broken(**options):
        raise error

    monkeypatch.setattr(kubeproxy, "census", broken)
    if mode == "refuse":
        with pytest.raises(KernelError, match=r"cannot tell whether .* no rights"):
            made(mode).refuse_if_needed()
    else:
        made(mode).refuse_if_needed()
        assert "cannot look for kube-proxy's rules" in said.getvalue()


def test_stopping_ends_the_watch(namespace, said):
    load(namespace, "nft", "IPv4", RULES)
    takeover = made("auto", pauses=(600.0,))
    thread = threading.Thread(target=lambda: namespace.call(takeover.after_first_sync))
    thread.start()
    takeover.stop()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_while_ours_serve_too_little_everything_stays(namespace, said, monkeypatch):
    monkeypatch.setattr("proxycore.takeover._HOLD_LOOK_SECONDS", 0.001)
    load(namespace, "nft", "IPv4", RULES)
    before = saved(namespace, "nft", "IPv4")
    reasons = ["no Service", "still none", "and now a bad one"]
    seen: list[tuple[bool, str | None]] = []

    def hold() -> str | None:
        seen.append((saved(namespace, "nft", "IPv4") == before, takeover.problem))
        return reasons.pop(0) if reasons else None

    takeover = made("auto", hold=hold)
    assert namespace.call(takeover.after_first_sync)
    assert [stays for stays, _ in seen] == [True] * 4
    assert "no Service" in str(seen[1][1])
    assert [entry["reason"] for entry in entries(said, "warning")] == ["no Service"]
    assert "KUBE" not in saved(namespace, "nft", "IPv4")
    assert takeover.problem is None


def test_on_an_empty_node_waiting_is_not_worth_a_word(namespace, said, monkeypatch):
    monkeypatch.setattr("proxycore.takeover._HOLD_LOOK_SECONDS", 0.001)
    reasons = ["no Service"]
    takeover = made("auto", hold=lambda: reasons.pop() if reasons else None)
    assert namespace.call(takeover.after_first_sync)
    assert said.getvalue() == ""


@pytest.mark.parametrize(
    ("status", "wanted"),
    [
        (Status(service_changes_total=1), None),
        (Status(service_changes_total=1, unsupported={NAME: "no"}), None),
        (Status(service_changes_total=1, source=Health("ended", "over")), None),
        (Status(), "no Service"),
        (Status(service_changes_total=1, held="a file cannot be read"), "a file"),
        (Status(service_changes_total=1, refused="out of memory"), "out of memory"),
        (Status(service_changes_total=1, quarantined={NAME: "too big"}), "default/web:http.*too big"),
        (Status(service_changes_total=1, troubles={"servicecidrs": "403"}), None),
        (
            Status(service_changes_total=1, troubles={"a.yaml": "broken"}, lacking=frozenset({"a.yaml"})),
            "a.yaml: broken",
        ),
        (Status(service_changes_total=1, source=Health("stale", "an hour old")), "an hour old"),
    ],
)
def test_what_there_is_to_wait_for(status, wanted):
    reason = reason_to_wait(status)
    assert reason is None if wanted is None else re.search(wanted, str(reason))


# -- other backends --

CODE = """
import atexit, os, sys, time
from proxycore.api import *


class Plugin:
    @hookimpl
    def proxycore_backend_describe(self):
        return BackendInfo(name=NAME, summary="x", api=">=0.1,<0.2", capabilities=frozenset({Capability.TCP}))

    @hookimpl
    def proxycore_backend_start(self, context):
        return Started()

    @hookimpl
    def proxycore_backend_apply(self, batch):
        return ApplyResult(generation=batch.generation)

    @hookimpl
    def proxycore_backend_cleanup(self, context):
        print("noise on standard output")
        atexit.register(print, "and more of it at the end", flush=True)
        open(os.environ["MARKER"], "a").write(NAME + " " + context.host.node_name + "\\n")
        BODY
"""


class Site:
    """A folder of made-up distributions, seen by this process and its children."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def install(self, name: str, body: str, *, state: str = "available") -> None:
        folder = self.root / f"made_up_{name}"
        folder.mkdir()
        code = textwrap.dedent(CODE).replace("NAME", repr(name)).replace("BODY", body)
        (folder / "__init__.py").write_text(code)
        (folder / "backend.toml").write_text(
            f'name = "{name}"\nsummary = "x"\napi = ">=0.1,<0.2"\ncapabilities = ["tcp"]\nstate = "{state}"\n'
        )
        info = self.root / f"made_up_{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: made-up-{name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[proxycore.backends]\n{name} = made_up_{name}:Plugin\n")
        importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path, monkeypatch) -> Site:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))
    return Site(tmp_path)


@pytest.fixture
def at_work(namespace) -> Iterator[None]:
    """This process is the run at work in the namespace."""
    sign = namespace.call(presence.claim)
    yield
    presence.let_go(sign)


def test_others_clean_up_in_a_process_of_their_own(namespace, site, at_work, said, monkeypatch):
    site.install("good", 'return Cleanup(removed=("table x", "table y"))')
    site.install("ends", "os.kill(os.getpid(), 9)")
    site.install("raises", 'raise KernelError("no luck with it")')
    site.install("bug", "1 / 0")
    site.install("wrong", 'return "nothing"')
    site.install("later", "return Cleanup()", state="planned")
    names = [name for name in other_backends("nft") if (site.root / f"made_up_{name}").exists()]
    assert names == ["bug", "ends", "good", "raises", "wrong"]
    assert "nft" not in other_backends("nft")
    assert "nft" in other_backends("good")
    monkeypatch.setattr("proxycore.takeover.other_backends", lambda chosen: tuple(names))
    assert namespace.call(made("auto", node_name="n1").after_first_sync)
    assert [entry["what"] for entry in entries(said, "info")] == ["table x", "table y"]
    errors = {entry["backend"]: str(entry["error"]) for entry in entries(said, "error")}
    assert "no luck with it" in errors["raises"]
    assert "ZeroDivisionError" in errors["bug"]
    assert "status -9" in errors["ends"]
    assert "not Cleanup" in errors["wrong"]
    assert set(errors) == {"raises", "bug", "ends", "wrong"}
    assert all("proxyctl cleanup --backend" in str(entry["do"]) for entry in entries(said, "error"))
    assert (site.root / "marker").read_text().split("\n")[0] == "bug n1"
    assert not [module for module in sys.modules if module.startswith("made_up_")]


def test_one_that_hangs_is_killed(namespace, site, at_work):
    site.install("hangs", "os.fork() or time.sleep(600); time.sleep(600)")
    answer = namespace.call(lambda: clean_up_apart("hangs", "n1", 3.0))
    assert "did not end within 3 s" in answer.error


def test_one_whose_run_is_killed_goes_with_it(namespace, site):
    site.install(
        "slow", 'open(os.environ["MARKER"] + "-pid", "w").write(f"{os.getpid()}\\n"); time.sleep(600)'
    )
    code = (
        "from proxycore.kernel import presence; from proxycore.takeover import clean_up_apart\n"
        "sign = presence.claim(); print(clean_up_apart('slow', 'n1', 60.0))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = namespace.popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    marker = site.root / "marker-pid"
    wait_until(lambda: run.poll() is not None or (marker.exists() and marker.read_text().endswith("\n")))
    pid = int(marker.read_text())
    assert running(pid)
    run.kill()
    run.communicate()
    wait_until(lambda: not running(pid))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_nobody_else_may_have_it_done(namespace, site):
    """Without a run at work nothing is touched, and neither beside that of another process."""
    site.install("good", 'return Cleanup(removed=("table x",))')
    code = "import sys; from proxycore.kernel import presence; presence.claim(); print(flush=True); sys.stdin.read()"
    refused = [namespace.call(lambda: clean_up_apart("good", "n1", 30.0))]
    holder = namespace.popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline()
    refused.append(namespace.call(lambda: clean_up_apart("good", "n1", 30.0)))
    holder.communicate()
    assert all("use `proxyctl cleanup`" in answer.error for answer in refused)
    assert not (site.root / "marker").exists()
