"""What decides has no effects: it does not even load what could have some."""

from __future__ import annotations

import subprocess
import sys

PURE = (
    "marks",
    "ids",
    "shape",
    "fates",
    "entries",
    "servers",
    "plane",
    "host",
    "netrules",
    "diff",
    "desired",
)
EFFECTS = ("_ctypes", "_posixsubprocess", "pyroute2", "select", "socket", "subprocess", "threading")


def test_modules_that_decide_load_nothing_that_acts():
    script = (
        "import sys\n"
        f"before = set(sys.modules)\n{''.join(f'import proxycore_ipvs.{name}{chr(10)}' for name in PURE)}"
        f"print(*sorted((set(sys.modules) - before) & {set(EFFECTS)!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
