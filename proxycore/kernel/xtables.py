"""The iptables tools: which are here, and running them.

There are two kernels' worth of iptables: `legacy` tables and those in nf_tables, each with tools of its own; a host may have
rules in both.  Nothing here loads a kernel module: only tables that exist are read, only what was read is written.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from ..errors import KernelError
from ..model import Family

T = TypeVar("T")
Variant = Literal["legacy", "nft"]

READ_SECONDS = 120.0
WRITE_SECONDS = 600.0
LOCK_SECONDS = 10
_PREFIX: dict[Family, str] = {"IPv4": "iptables", "IPv6": "ip6tables"}
_LEGACY_NAMES: dict[Family, str] = {"IPv4": "ip_tables_names", "IPv6": "ip6_tables_names"}


class Tools(NamedTuple):
    """Programs for one variant and family."""

    variant: Variant
    family: Family
    save: str
    restore: str

    def __str__(self) -> str:
        return f"{_PREFIX[self.family]}-{self.variant}"


def find(which: Callable[[str], str | None] = shutil.which) -> tuple[Tools, ...]:
    """Tools that are installed, by variant and family.

    Where the variants have no names of their own, the plain ones are asked which they are.
    """
    found = [
        Tools(variant, family, save, restore)
        for variant in ("legacy", "nft")
        for family, prefix in _PREFIX.items()
        if (save := which(f"{prefix}-{variant}-save")) and (restore := which(f"{prefix}-{variant}-restore"))
    ]
    for family, prefix in _PREFIX.items():
        if any(tools.family == family for tools in found):
            continue
        save, restore = which(f"{prefix}-save"), which(f"{prefix}-restore")
        if save and restore:
            found.append(Tools(_variant_of(save), family, save, restore))
    return tuple(found)


def _variant_of(program: str) -> Variant:
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, errors="replace", timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "legacy"
    return "nft" if "nf_tables" in done.stdout else "legacy"


def legacy_tables(family: Family) -> frozenset[str] | None:
    """Legacy tables that exist in this thread's network namespace, whether a tool for them is here or not.

    None: we may not know.
    """
    try:
        return frozenset(Path("/proc/thread-self/net", _LEGACY_NAMES[family]).read_text().split())
    except PermissionError:
        return None
    except OSError:
        return frozenset()


def save(tools: Tools, read: Callable[[Iterable[str]], T]) -> T:
    """What `read` makes of the lines of all tables that exist; they may be hundreds of thousands.

    Raises KernelError: the tool failed or took too long.
    """
    # In memory: a container may have no place for temporary files.
    with os.fdopen(os.memfd_create("complaints"), "w+", errors="replace") as complaints:
        try:
            process = subprocess.Popen(
                [tools.save], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, text=True,
                encoding="utf-8", errors="surrogateescape",
            )  # fmt: skip
        except OSError as error:
            raise KernelError(f"cannot run {tools.save}: {error.strerror}", errno=error.errno or 0) from error
        timer = threading.Timer(READ_SECONDS, process.kill)
        timer.daemon = True
        timer.start()
        try:
            assert process.stdout is not None
            with process.stdout:
                result = read(process.stdout)
                for _ in process.stdout:
                    pass
            status = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                process.kill()
                process.wait()
        if status == -signal.SIGKILL:
            raise KernelError(f"{tools.save} did not end within {READ_SECONDS:g} s and was killed")
        if status:
            complaints.seek(0)
            raise KernelError(f"{tools.save} ended with {status}: {_short(complaints.read())}")
    return result


def restore(tools: Tools, text: str) -> None:
    """Bring `--noflush` input into force, each of its tables in one step.

    Raises KernelError: the table at fault and those after it are as they were.
    """
    try:
        done = subprocess.run(
            [tools.restore, "--noflush", "-w", str(LOCK_SECONDS)],
            input=text.encode("utf-8", "surrogateescape"),
            capture_output=True,
            timeout=WRITE_SECONDS,
            check=False,
        )
    except OSError as error:
        raise KernelError(f"cannot run {tools.restore}: {error.strerror}", errno=error.errno or 0) from error
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{tools.restore} did not end within {WRITE_SECONDS:g} s") from error
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace")
        raise KernelError(f"{tools.restore} ended with {done.returncode}: {_short(said)}")


def _short(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return " / ".join(lines[:3])[:300] or "it said nothing"
