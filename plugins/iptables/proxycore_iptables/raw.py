"""Legacy tables through python-iptables; the only module that imports it, and only the worker imports this one.

python-iptables holds state per process: one family, one thread, a table's copy that is taken with refresh() and written whole
with commit().  Rules are compared and counted as they are in memory: reading an extension's options would redirect our standard
output, and gives them back in other words.
"""

from __future__ import annotations

import ctypes
import errno as errnos
import glob
import importlib.util
import os
import shlex
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from proxycore.errors import KernelError
from proxycore.kernel import xtables
from proxycore.model import Family

ATTEMPTS = 5
"""So often a change is tried when a program that takes no lock gets in between."""
_LIBRARIES = ("/usr/lib/*/xtables", "/usr/lib/xtables", "/usr/lib64/xtables", "/lib/xtables")
_REVISION = struct.Struct("29sB")
"""struct xt_get_revision: name and revision."""
_GET_MATCH, _GET_MATCH6 = 66, 68
"""IPT_SO_GET_REVISION_MATCH and IP6T_SO_GET_REVISION_MATCH; the same for targets is one more."""
_libc = ctypes.CDLL(None, use_errno=True)
_RULE_OPTIONS = {
    "-s": "src",
    "-d": "dst",
    "-i": "in_interface",
    "-o": "out_interface",
    "-p": "protocol",
}


def _import_iptc() -> Any:
    """Import python-iptables without the modules of the kernel that it would load, and without running ldconfig."""
    found = importlib.util.find_spec("iptc")
    if found is None or not found.submodule_search_locations:
        raise KernelError("the Python package python-iptables is not installed")
    if "XTABLES_LIBDIR" not in os.environ:
        for pattern in _LIBRARIES:
            for folder in sorted(glob.glob(pattern)):
                if glob.glob(f"{folder}/libxt_*.so"):
                    os.environ.setdefault("XTABLES_LIBDIR", folder)
    file = os.path.join(found.submodule_search_locations[0], "util.py")
    spec = importlib.util.spec_from_file_location("iptc.util", file)
    assert spec is not None
    assert spec.loader is not None
    util = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(util)
    util.load_kernel = lambda name, exc_if_failed=False: None  # type: ignore[attr-defined]
    sys.modules["iptc.util"] = util
    import iptc
    from iptc import ip4tc, ip6tc

    del ip4tc, ip6tc
    return iptc


class Entry(NamedTuple):
    """A rule as it lies in memory.  `target`: the chain it leads to, empty if none, or a verdict."""

    target: str
    packets: int
    bytes: int


class Raw:
    """Tables of one family in the network namespace of the process; to be used by one thread.

    Raises KernelError if python-iptables or its libraries cannot be used.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        try:
            self._iptc = _import_iptc()
        except KernelError:
            raise
        except Exception as error:
            # Whatever it meets while it looks for its libraries.
            raise KernelError(
                f"python-iptables cannot be loaded (it needs the package iptables and its libraries): {error}"
            ) from error
        v4 = family == "IPv4"
        self._table = self._iptc.Table if v4 else self._iptc.Table6
        self._rule = self._iptc.Rule if v4 else self._iptc.Rule6
        module = sys.modules["iptc.ip4tc" if v4 else "iptc.ip6tc"]
        self._library = module._libiptc
        self._prefix = "iptc" if v4 else "ip6tc"
        self._errno: Callable[[], Any] = sys.modules["iptc.ip4tc"]._get_errno_loc
        self._know_only("")

    def names(self) -> frozenset[str]:
        """Tables that exist: opening another would make it.  Raises KernelError."""
        tables = xtables.legacy_tables(self.family)
        if tables is None:
            raise KernelError("the names of tables in /proc/net may not be read", errno=errnos.EACCES)
        return tables

    def open(self, name: str) -> RawTable:
        """A fresh copy of a table.  Raises KernelError: it is not there, or we may not read it."""
        if name not in self.names():
            raise KernelError(f"there is no {self.family} table {name}", errno=errnos.ENOENT)
        self._know_only(name)
        try:
            known = self._table._cache.get(name)
            table = known if known is not None else self._table(name, autocommit=False)
            table.autocommit = False
            if known is not None:
                table.refresh()
        except self._iptc.IPTCError as error:
            lacking = xtables.missing_rights("legacy")
            needs = f"; that needs {' and '.join(lacking)}, which this process lacks" if lacking else ""
            raise KernelError(
                f"{self.family} table {name} cannot be read: {plain(error)}{needs}",
                errno=errnos.EPERM if lacking else self._errno()[0],
            ) from error
        return RawTable(self, table)

    def _know_only(self, name: str) -> None:
        """It looks for the name of a target among the chains of all tables, and would make those that are not there."""
        self._table.existing_table_names.update({other: other == name for other in self._table.ALL})

    def rule(self, text: str) -> Any:
        """A rule from its text.  Raises KernelError naming what is wrong: it is never put together from what is left."""
        try:
            return self._parse(text)
        except Exception as error:
            raise KernelError(f"python-iptables cannot make the rule `{text}`: {plain(error)}") from error

    def _parse(self, text: str) -> Any:
        rule = self._rule()
        part: Any = None
        words = shlex.split(text)[::-1]
        inverted = False
        while words:
            word = words.pop()
            if word == "!":
                inverted = True
                continue
            if word in _RULE_OPTIONS:
                setattr(rule, _RULE_OPTIONS[word], ("!" if inverted else "") + words.pop())
            elif word in ("-m", "-j", "-g"):
                _check(part)
                name = words.pop()
                part = (
                    rule.create_match(name) if word == "-m" else rule.create_target(name, goto=word == "-g")
                )
            elif word.startswith("--") and part is not None:
                values = ["!"] if inverted else []
                if word == "--comment":
                    values.append(words.pop())
                while words and not words[-1].startswith("-") and words[-1] != "!":
                    values.append(words.pop())
                part.set_parameter(word[2:], values or "")
            else:
                raise ValueError(f"unexpected {word!r}")
            inverted = False
        _check(part)
        return rule

    def load(self, name: str, options: tuple[str, ...], *, target: bool) -> str:
        """Load an extension; empty, or why it cannot be."""
        rule = self._rule()
        try:
            part = rule.create_target(name) if target else rule.create_match(name)
            for option in options:
                part.set_parameter(option, "")
        except Exception as error:  # noqa: BLE001 - python-iptables raises of many kinds
            said = plain(error)
            unknown = ": its library is missing, or the kernel has no such thing"
            return said + unknown if "can't find" in said else said
        if self._is_in_kernel(name, part._revision, target=target):
            return ""
        return f"the kernel has no {'target' if target else 'match'} {name}"

    def _is_in_kernel(self, name: str, revision: int, *, target: bool) -> bool:
        """Newer libraries load an extension that the kernel does not have, and only warn."""
        domain, level, option = (
            (socket.AF_INET, socket.IPPROTO_IP, _GET_MATCH)
            if self.family == "IPv4"
            else (socket.AF_INET6, socket.IPPROTO_IPV6, _GET_MATCH6)
        )
        asked = ctypes.create_string_buffer(_REVISION.pack(name.encode(), revision), _REVISION.size)
        size = ctypes.c_uint32(_REVISION.size)
        with socket.socket(domain, socket.SOCK_RAW, socket.IPPROTO_RAW) as on:
            failed = _libc.getsockopt(on.fileno(), level, option + target, asked, ctypes.byref(size))
        return not failed or ctypes.get_errno() not in (errnos.ENOENT, errnos.EPROTONOSUPPORT)


def _check(part: Any) -> None:
    """Are all options there that a match or target needs?

    Right after they were set and not at the end, since the library knows only what was set last; its own way round that
    is to read all options back, which is what we avoid.
    """
    if part is not None:
        part._final_check()


class RawTable:
    """A copy of one table; close() it when done, it may be large."""

    def __init__(self, raw: Raw, table: Any) -> None:
        self._raw = raw
        self._table = table
        self._call = table._iptc

    def __enter__(self) -> RawTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the copy; what was not committed is lost."""
        self._table.close()

    def chains(self) -> list[str]:
        """Names of all chains."""
        handle, names = self._table._handle, []
        name = self._call.iptc_first_chain(handle)
        while name:
            names.append(name.decode())
            name = self._call.iptc_next_chain(handle)
        return names

    def is_built_in(self, chain: str) -> bool:
        return bool(self._call.iptc_builtin(chain.encode(), self._table._handle))

    def entries(self, chain: str) -> Iterator[Entry]:
        """Rules of a chain, in order."""
        handle, following, target = self._table._handle, self._call.iptc_next_rule, self._call.iptc_get_target
        found = self._call.iptc_first_rule(chain.encode(), handle)
        while found:
            counters = found.contents.counters
            yield Entry((target(found, handle) or b"").decode(), counters.pcnt, counters.bcnt)
            found = following(found, handle)

    def counters(self, chain: str) -> list[int]:
        """Packets and bytes of each rule, one after the other."""
        handle, following = self._table._handle, self._call.iptc_next_rule
        numbers: list[int] = []
        found = self._call.iptc_first_rule(chain.encode(), handle)
        while found:
            counters = found.contents.counters
            numbers += (counters.pcnt, counters.bcnt)
            found = following(found, handle)
        return numbers

    def is_empty(self, chain: str) -> bool:
        return not self._call.iptc_first_rule(chain.encode(), self._table._handle)

    def has(self, chain: str, text: str) -> bool:
        """Is there a rule of the same meaning, as `iptables -C` tells?"""
        rule = self._raw.rule(text)
        entry, mask = rule.rule, rule.mask
        same = getattr(self._raw._library, f"{self._raw._prefix}_check_entry")
        return bool(same(chain.encode(), ctypes.byref(entry), mask, self._table._handle))

    def insert(self, chain: str, text: str) -> None:
        """Put a rule at the head of a chain."""
        self._do(self._table.insert_entry, chain, self._raw.rule(text).rule, 0)

    def flush(self, chain: str) -> None:
        self._do(self._table.flush_entries, chain)

    def delete_chain(self, chain: str) -> None:
        self._do(self._table.delete_chain, chain)

    def delete_at(self, chain: str, position: int) -> None:
        """Delete a rule by its position, counted from 0."""
        if self._call.iptc_delete_num_entry(chain.encode(), position, self._table._handle) != 1:
            raise KernelError(f"cannot delete rule {position} of {chain}: {plain(self._table.strerror())}")

    def _do(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            function(*arguments)
        except self._raw._iptc.IPTCError as error:
            raise KernelError(f"table {self._table.name}: {plain(error)}") from error

    def commit(self) -> bool:
        """Bring the copy into force; False: somebody changed the table since it was taken, and nothing holds.

        Raises KernelError: nothing holds.
        """
        if self._call.iptc_commit(self._table._handle) == 1:
            return True
        number = self._raw._errno()[0]
        if number == errnos.EAGAIN:
            return False
        raise KernelError(
            f"{self._raw.family} table {self._table.name} cannot be written: {plain(self._table.strerror())}",
            errno=number,
        )


def plain(error: object) -> str:
    """The words of an error of python-iptables, which shows texts of the C library as Python's bytes."""
    text = error.decode("utf-8", "replace") if isinstance(error, bytes) else str(error)
    return text.replace("b'", "").replace('b"', "").rstrip("'\"") if "b'" in text or 'b"' in text else text
