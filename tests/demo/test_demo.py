"""The demo proves something: a page of right rules passes it, and each rule that is wrong makes it fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir

import pytest

NAIVE = Path(__file__).with_name("naive_proxy.py")
SCRIPT = (
    "import sys; from proxycore.demo import demo; "
    "sys.exit(demo(seconds=10, plain=True, command=(sys.executable, sys.argv[1])))"
)
FAULTS = {
    "": ("every one as it should be",),
    "masquerade,ranges,local,refuse,stale": (
        "saw 192.168.1.10, the client is 192.168.1.10: masquerade should be yes",
        "from stranger: got api-",
        "from office: got api-3, expected api-1 or api-2",
        "shop/checkout at 10.96.0.66:80 from pod: got dropped, expected refused",
        "got web-2, expected web-1 or web-3 or web-4",
    ),
    "affinity,slow": (
        "but this client belongs to api-",
        "no answer from web-4 while web-4 becomes ready",
        "from pod: got refused, expected checkout-1",
    ),
    "stop": ("proxyctl ended with status 1 after SIGTERM",),
    "crash": ("ended with status 3",),
}

pytestmark = [pytest.mark.root, pytest.mark.slow]


def start(faults: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, NAIVE],
        env={**os.environ, "FAULTS": faults},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All demos at the same time: each waits most of its time."""
    started = {faults: start(faults) for faults in FAULTS}
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("faults", FAULTS)
def test_verdict(faults: str, runs: dict[str, subprocess.Popen[str]]) -> None:
    output, _ = runs[faults].communicate(timeout=120)
    assert [text for text in FAULTS[faults] if text not in output] == [], output
    assert runs[faults].returncode == (1 if faults else 0), output


def leftovers() -> set[str]:
    return {name for name in os.listdir(gettempdir()) if name.startswith("proxycore-demo-")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(number: signal.Signals) -> None:
    before = leftovers()
    process = start("")
    assert process.stdout is not None
    while "on the node:" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    deadline = time.monotonic() + 5
    while leftovers() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert leftovers() <= before


def test_proxyctl_passes() -> None:
    command = [sys.executable, "-m", "proxycore", "demo", "--backend", "nft", "--plain", "--for", "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every one as it should be" in done.stdout
