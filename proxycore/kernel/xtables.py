"""The iptables tools: which are here, and running them.

There are two kernels' worth of iptables: `legacy` tables and those in nf_tables, each with tools of its own; a host may have
rules in both.  Nothing here loads a kernel module: only tables that exist are read, only what was read is written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno as errnos
import functools
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from ..errors import KernelError
from ..model import Family
from . import nftables, xtlock
from .xtlock import LockHeld as LockHeld

T = TypeVar("T")
Variant = Literal["legacy", "nft"]

READ_SECONDS = 120.0
WRITE_SECONDS = 180.0
KILLED_SECONDS = 5.0
"""So long a killed tool is waited for; one that hangs inside the kernel does not end."""
HELP_SECONDS = 10.0
LOCK_SECONDS = 10
_PREFIX: dict[Family, str] = {"IPv4": "iptables", "IPv6": "ip6tables"}
_LEGACY_NAMES: dict[Family, str] = {"IPv4": "ip_tables_names", "IPv6": "ip6_tables_names"}
_CAPABILITIES: dict[Variant, tuple[tuple[str, int], ...]] = {
    "legacy": (("CAP_NET_ADMIN", 12), ("CAP_NET_RAW", 13)),
    "nft": (("CAP_NET_ADMIN", 12),),
}
"""With their bits in /proc."""
_NFT: dict[Family, nftables.NftFamily] = {"IPv4": "ip", "IPv6": "ip6"}


class RestoreRefused(KernelError):
    """`iptables-restore` did not accept its input.

    Tables whose COMMIT stands before the fault in the same input hold; the table at fault and those after it are as they
    were.  `line` is the line of the input at fault, counted from 1; None if it is a COMMIT's, that is any of its table's, or
    unknown.  `lines`: all those that the kernel named, in order.  `said`: what the tool said, shortened.
    """

    def __init__(
        self, message: str, *, line: int | None, lines: tuple[int, ...], said: str, errno: int = 0
    ) -> None:
        self.line = line
        self.lines = lines
        self.said = said
        super().__init__(message, errno=errno)


class Tools(NamedTuple):
    """Programs for one variant and family; `command`: of single commands, empty if it is not here."""

    variant: Variant
    family: Family
    save: str
    restore: str
    command: str = ""

    def __str__(self) -> str:
        return name_of(self.variant, self.family)


def name_of(variant: Variant, family: Family) -> str:
    """How the tools for a variant and family are called, whether they are here or not: `iptables-nft`."""
    return f"{_PREFIX[family]}-{variant}"


def find(which: Callable[[str], str | None] = shutil.which) -> tuple[Tools, ...]:
    """Tools that are installed, by variant and family.

    Where the variants have no names of their own, the plain ones are asked which they are.
    """
    found = [
        Tools(variant, family, save, restore, which(f"{prefix}-{variant}") or "")
        for variant in ("legacy", "nft")
        for family, prefix in _PREFIX.items()
        if (save := which(f"{prefix}-{variant}-save")) and (restore := which(f"{prefix}-{variant}-restore"))
    ]
    for family, prefix in _PREFIX.items():
        if any(tools.family == family for tools in found):
            continue
        save, restore = which(f"{prefix}-save"), which(f"{prefix}-restore")
        if save and restore:
            found.append(Tools(_variant_of(save), family, save, restore, which(prefix) or ""))
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


def save(
    tools: Tools,
    read: Callable[[Iterable[str]], T],
    *,
    tables: Collection[str] | None = None,
    counters: bool = False,
) -> T:
    """What `read` makes of the lines of all tables that exist; they may be hundreds of thousands.

    `tables`: only these, in this order, as one listing; those that do not exist are left out, and not made.  `counters`: rules
    start with `[packets:bytes] `.  Raises KernelError: the tool failed or took too long.
    """
    with contextlib.closing(_listing(tools, tables, ("-c",) if counters else ())) as lines:
        result = read(lines)
        for _ in lines:
            pass
    return result


def _listing(
    tools: Tools, tables: Collection[str] | None, options: tuple[str, ...]
) -> Generator[str, None, None]:
    if tables is None:
        yield from _lines(tools, options)
        return
    there = _existing(tools)
    for table in tables:
        if table in there:
            yield from _lines(tools, (*options, "-t", table))


def advice_for_unreadable(family: Family, table: str) -> str:
    """What to do about a table of nf_tables that iptables-nft-save leaves out as incompatible, without a full stop."""
    return (
        f"somebody put rules there with nft; `nft -a list table {_NFT[family]} {table}` shows them and their handles, take "
        f"them away (`nft delete rule {_NFT[family]} {table} CHAIN handle N`)"
    )


def _existing(tools: Tools) -> frozenset[str]:
    """Tables that are there: asking the tool for another would make it, in legacy, and load its module."""
    if tools.variant == "legacy":
        tables = legacy_tables(tools.family)
        if tables is None:
            raise KernelError(
                f"cannot see which tables of {tools} there are: /proc/net/{_LEGACY_NAMES[tools.family]} may not be read",
                errno=errnos.EACCES,
            )
        return tables
    with nftables.NfTables() as kernel:
        return kernel.tables(_NFT[tools.family])


def _lines(tools: Tools, options: tuple[str, ...]) -> Generator[str, None, None]:
    """What one run of the tool prints; it is ended if the reader leaves early."""
    # In memory: a container may have no place for temporary files.
    with os.fdopen(os.memfd_create("complaints"), "w+", errors="replace") as complaints:
        process = _start(
            tools.save, options, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints,
            text=True, encoding="utf-8", errors="surrogateescape",
        )  # fmt: skip
        timer = threading.Timer(READ_SECONDS, _kill, (process,))
        timer.daemon = True
        timer.start()
        try:
            assert process.stdout is not None
            with process.stdout:
                yield from process.stdout
            status = process.wait()
        finally:
            timer.cancel()
            _end(process)
        if status == -signal.SIGKILL:
            raise _hung(tools, tools.save, process.pid, READ_SECONDS)
        if status:
            complaints.seek(0)
            said = complaints.read()
            raise KernelError(f"{tools.save} ended with {status}: {_short(said)}{_rights(tools, said)[0]}")


def list_chain(tools: Tools, table: str, chain: str) -> tuple[str, ...] | None:
    """Rules of one chain as `iptables-save` prints them, without `-A CHAIN `; None: there is no such chain.

    Quick in the nft variant; legacy reads the whole table for it, and makes the table if there is none.  Raises
    KernelError: the tool failed, or the chain holds rules that iptables cannot read.
    """
    if not tools.command:
        raise KernelError(f"the program {tools} is not installed (package iptables)")
    wait = ("-w", str(LOCK_SECONDS)) if tools.variant == "legacy" else ()
    try:
        done = subprocess.run(
            [tools.command, *wait, "-t", table, "-S", chain],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=READ_SECONDS, check=False,
        )  # fmt: skip
    except OSError as error:
        raise _cannot_run(tools.command, error) from error
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{tools.command} did not end within {READ_SECONDS:g} s") from error
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace")
        if is_missing_chain(said) and not _there(tools, table, chain, said):
            return None
        raise KernelError(
            f"{tools.command} -t {table} -S {chain} ended with {done.returncode}: {_short(said)}"
        )
    start = f"-A {chain} "
    text = done.stdout.decode("utf-8", "surrogateescape")
    return tuple(line.removeprefix(start) for line in text.splitlines() if line.startswith(start))


def _there(tools: Tools, table: str, chain: str, said: str) -> bool:
    """Is the chain there after all?  The nft variant says `incompatible` of missing ones as well."""
    if tools.variant != "nft" or "incompatible" not in said:
        return False
    with nftables.NfTables() as kernel:
        return (table, chain) in kernel.chains(_NFT[tools.family])


def lacks(tools: Tools, kind: Literal["-m", "-j"], name: str, option: str) -> str:
    """Why a match (`-m`) or target (`-j`) cannot be used, or not with this option; empty if it can.

    By what the tool says when it is asked for help about it: for that it takes no lock, and neither makes nor reads a table,
    but it asks the kernel whether the extension is there.  Raises KernelError: the tool could not be run.
    """
    if not tools.command:
        raise KernelError(f"the program {tools} is not installed (package iptables)")
    try:
        done = subprocess.run(
            [tools.command, kind, name, "--help"],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=HELP_SECONDS, check=False,
        )  # fmt: skip
    except OSError as error:
        raise _cannot_run(tools.command, error) from error
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{tools.command} did not end within {HELP_SECONDS:g} s") from error
    said = done.stderr.decode("utf-8", "replace")
    if done.returncode or is_missing_module(said):
        return _short(said)
    known = option in done.stdout.decode("utf-8", "replace").split()
    return "" if known else f"{name} has no option {option}"


def restore(tools: Tools, text: str, lock_seconds: int = LOCK_SECONDS, *, test: bool = False) -> None:
    """Bring `--noflush` input into force, each of its tables in one step.

    `lock_seconds`: so long the xtables lock may be another's; the nft variant needs none.  `test`: only see whether the tool
    can read the input, and the kernel knows its matches and targets; nothing is changed, but legacy makes tables.

    Raises RestoreRefused, which says what holds then; LockHeld: the lock is taken for each table anew, so that tables
    before the one for which it was held are in force; KernelError: the tool could not be run (nothing was changed), or
    was ended because it took too long: each table is as it was or as it should be.
    """
    options = ("--noflush", "-w", str(lock_seconds), *(("--test",) if test else ()))
    status, said = _fed(tools, options, text.encode("utf-8", "surrogateescape"))
    if status or (test and is_missing_module(said)):
        if is_lock_held(status, said):
            raise LockHeld(lock_seconds, xtlock.holders(), xtlock.path())
        raise _refused(tools, status, said, text)


def _fed(tools: Tools, options: tuple[str, ...], text: bytes) -> tuple[int, str]:
    """One run of the tool on this input: its exit status and complaints."""
    pipe = subprocess.PIPE
    process = _start(tools.restore, options, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        _, complaints = process.communicate(text, timeout=WRITE_SECONDS)
    except subprocess.TimeoutExpired as error:
        ended = _end(process)
        raise _hung(tools, tools.restore, process.pid, WRITE_SECONDS, ended=ended) from error
    except BaseException:
        _end(process)
        raise
    return process.returncode, complaints.decode("utf-8", "replace")


def _kill(process: subprocess.Popen[Any]) -> None:
    """Kill a tool and what it started: the program may be a script around another."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[Any]) -> bool:
    """Kill a tool; has it ended?  Its pipes are closed unread: who left its group may hold them for ever."""
    _kill(process)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        process.wait(KILLED_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


_PR_SET_PDEATHSIG = 1
# Found beforehand: between fork and exec no library may be looked for, as another thread may hold the loader's lock.
_PRCTL = ctypes.CDLL(None).prctl


def _start(program: str, options: tuple[str, ...], **streams: Any) -> subprocess.Popen[Any]:
    """Start a tool, in a process group of its own, that is killed when the thread that starts it ends.

    However this process ends: a tool that is left behind would hold the xtables lock, or write old rules over new ones.
    Of a script that starts another program and waits for it, the script alone ends so.
    """
    guard = _guard() if os.access(program, os.X_OK) else ()
    try:
        return subprocess.Popen(
            [*guard, program, *options],
            process_group=0,
            preexec_fn=None if guard else _ending_with(os.getpid()),
            **streams,
        )
    except OSError as error:
        raise _cannot_run(program, error) from error


@functools.cache
def _guard() -> tuple[str, ...]:
    """What makes a program end with whoever starts it; empty: the `setpriv` here cannot, or there is none.

    Asking the kernel ourselves takes a fork, which copies the page tables: some 30 ms with 400 MB in use, where this takes 1.
    """
    program = shutil.which("setpriv")
    if program is None:
        return ()
    guard = (program, "--pdeathsig", "KILL", "--")
    try:
        done = subprocess.run(
            [*guard, program, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=HELP_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return () if done.returncode else guard


def _ending_with(parent: int) -> Callable[[], None]:
    """What the tool's process calls before it becomes the tool."""

    def ask_to_be_killed() -> None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return ask_to_be_killed


def _hung(tools: Tools, program: str, pid: int, seconds: float, *, ended: bool = True) -> KernelError:
    """A tool that was killed because it took too long."""
    what = f"{program} (process {pid}) did not end within {seconds:g} s and was killed"
    if not ended:
        return KernelError(
            f"{what}, but hangs in the kernel: `cat /proc/{pid}/stack` shows where; if it does not end, restart the host"
        )
    lock = f"who holds {xtlock.path()} (`lslocks`), " if tools.variant == "legacy" else ""
    return KernelError(
        f"{what}: see {lock}whether `{tools.save}` ends when it is run by hand, and what the kernel says (`dmesg`)"
    )


def _cannot_run(program: str, error: OSError) -> KernelError:
    return KernelError(f"cannot run {program}: {error.strerror}", errno=error.errno or 0)


def _refused(tools: Tools, status: int, said: str, text: str) -> RestoreRefused:
    short = _short(said)
    message = f"{tools.restore} ended with {status}: {short}"
    lines = tuple(number for number in refused_lines(said) if _is_rule(text, number))
    if lines:
        message += f"; line {lines[0]} is `{_line(text, lines[0])[:300]}`"
    about_rights, errno = _rights(tools, said)
    return RestoreRefused(
        message + about_rights, line=lines[0] if lines else None, lines=lines, said=short, errno=errno
    )


def _rights(tools: Tools, said: str) -> tuple[str, int]:
    """What to add to the words of a tool that failed for want of a capability, and the error's number."""
    lacking = missing_rights(tools.variant)
    if lacking:
        return f"; {tools} needs {' and '.join(lacking)}, which this process lacks", errnos.EPERM
    return ("", errnos.EPERM) if is_missing_right(said) else ("", 0)


def missing_rights(variant: Variant) -> tuple[str, ...]:
    """Capabilities that a variant needs and this thread lacks."""
    try:
        status = Path("/proc/thread-self/status").read_text()
    except OSError:
        return ()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    have = int(found[1], 16) if found else -1
    return tuple(name for name, bit in _CAPABILITIES[variant] if not have >> bit & 1)


def _is_rule(text: str, number: int) -> bool:
    """May this line alone be at fault, being neither a table's first nor its last nor outside of the input?"""
    return _line(text, number)[:1] in ("-", ":", "[")


def _line(text: str, number: int) -> str:
    """A line of the input, counted from 1; empty if there is none."""
    start = 0
    for _ in range(number - 1):
        start = text.find("\n", start) + 1
        if not start:
            return ""
    end = text.find("\n", start)
    return text[start : len(text) if end < 0 else end]


# -- what the tools say --

_REFUSED = (
    re.compile(r"^Error occurred at line: (\d+)$"),
    re.compile(r"^(?:\S+: )?line (\d+) failed\b"),
    # Of the kernel through the nft variant: `line 3: RULE_APPEND failed (Invalid argument): rule in chain X`.
    re.compile(r"^line (\d+): \w+ failed \("),
)
_RESOURCE_PROBLEM = 4
"""With which the tools end for the lock, and for much else."""
_HELD = "currently holding the xtables lock. "
_WAITING = "currently holding the xtables lock; "
_NO_RIGHT = ("you must be root", "Operation not permitted")
_MISSING = ("No chain/target/match by that name", "' is incompatible, use 'nft' tool", "does not exist")


def refused_lines(said: str) -> Iterator[int]:
    """Lines of the input that `iptables-restore` names as it fails, in its order."""
    for line in said.splitlines():
        for pattern in _REFUSED:
            if found := pattern.match(line.strip()):
                yield int(found[1])
                break


def is_lock_held(status: int, said: str) -> bool:
    """Did a tool give up for the xtables lock?

    Versions before 1.8.8 say that it is held while they wait as well (`lock; still 1s ...`), and may have it in the end.
    """
    lines = _meaningful(said)
    return (
        status == _RESOURCE_PROBLEM
        and bool(lines)
        and _HELD in lines[-1]
        and next(refused_lines(said), None) is None
    )


def is_missing_module(said: str) -> bool:
    """Did a tool, of 1.8.8 or later, only warn that the kernel does not know a match or target?  Earlier ones fail."""
    return "not supported, missing kernel module" in said


def is_missing_right(said: str) -> bool:
    """Did a tool fail for want of a capability?"""
    return any(part in said for part in _NO_RIGHT)


def is_missing_chain(said: str) -> bool:
    """Did a tool fail because there is no such chain?  The nft variant may say the same of one with rules it cannot read."""
    return any(part in said for part in _MISSING)


def _meaningful(text: str) -> list[str]:
    return [
        line.strip() for line in text.splitlines() if line.strip() and not line.startswith(("#", "Try `"))
    ]


def _short(text: str) -> str:
    lines = [line for line in _meaningful(text) if _WAITING not in line]
    return " / ".join(lines[:3])[:300] or "it said nothing"
