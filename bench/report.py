"""One measurement beside its bar, the table of all of them, and what machine they were taken on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

HEADINGS = ("what", "measured", "bar", "met")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure.  Without a bar it is there to be read beside its neighbours."""

    section: str = ""
    what: str
    value: float
    unit: str
    bar: float | None = None
    sense: Literal["<=", ">="] = "<="
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.value <= self.bar if self.sense == "<=" else self.value >= self.bar

    def cells(self) -> tuple[str, str, str, str]:
        bar = "" if self.bar is None else f"{self.sense} {figure(self.bar)} {self.unit}"
        met = {None: "", True: "yes", False: "NO"}[self.met]
        what = f"{self.what} ({self.note})" if self.note else self.what
        return what, f"{figure(self.value)} {self.unit}", bar, met


def figure(value: float) -> str:
    """Three digits that count."""
    if value and abs(value) < 10:
        return f"{value:.3g}"
    return f"{value:,.1f}".removesuffix(".0") if abs(value) < 100 else f"{value:,.0f}"


def table(rows: Sequence[Row]) -> str:
    """All rows in aligned columns, a heading for each section."""
    lines = []
    cells = [row.cells() for row in rows]
    widths = [max(len(line[i]) for line in (HEADINGS, *cells)) for i in range(len(HEADINGS))]

    def line(texts: Sequence[str]) -> str:
        what, measured, bar, met = (text.ljust(width) for text, width in zip(texts, widths, strict=True))
        return f"  {what}  {measured.strip().rjust(widths[1])}  {bar}  {met}".rstrip()

    section = None
    for row, texts in zip(rows, cells, strict=True):
        if row.section != section:
            section = row.section
            lines += ["", section, line(HEADINGS)]
        lines.append(line(texts))
    return "\n".join(lines[1:])


def machine() -> dict[str, str]:
    """What the figures depend on besides the code."""
    return {
        "commit": commit(),
        "cpu": f"{os.cpu_count()} x {_cpu_model()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') >> 30} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "msgspec": msgspec.__version__,
        "nft": _output("nft", "--version"),
        "load average": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def commit() -> str:
    """The commit that is measured, and whether the tree differs from it."""
    here = str(Path(__file__).parent)
    head = _output("git", "-C", here, "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", here, "status", "--porcelain", "--", "../proxycore", "../plugins")
    return f"{head} and uncommitted changes" if head and changed else head or "unknown"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _output(*argv: str) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
