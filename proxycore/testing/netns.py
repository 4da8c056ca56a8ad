"""Network namespaces for tests and the demo: anonymous, quickly made, gone with their last user.

A thread of its own lives in each `Namespace` and a file descriptor holds it, so that nothing has to be swept
up after a crash and a user namespace does as well as root.  Sockets, processes and settings of the namespace
are made on that thread; a socket then works from any thread.  `publish()` names it under /run/netns, for
a person with `ip netns exec`.

Links, addresses and routes are written by `ip -batch`, one process for many commands: 3 ms, against 700 ms
for importing a netlink library.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ..errors import KernelError, ProxyError

T = TypeVar("T")

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
MS_BIND = 4096
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
MNT_DETACH = 2
PUBLISHED = Path("/run/netns")
NAME_PREFIX = "px"

_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count(1)


def _unshare(flags: int) -> None:
    """unshare(2) of the calling thread.  Raises OSError; nothing has changed then."""
    if _libc.unshare(flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def problem() -> str | None:
    """Why network namespaces cannot be made here, in a sentence; None if they can."""
    try:
        Namespace("probe").close()
    except OSError as error:
        return f"no network namespace can be made: {error.strerror}"
    return None


def become_root() -> None:
    """Make sure that this process may make network namespaces, if need be as root of a new user namespace.

    Call it early: the kernel lets only a process with a single thread enter a user namespace.  Raises
    ProxyError with what to do; the process is of no use for a lab then.
    """
    if problem() is None:
        return
    user, group = os.geteuid(), os.getegid()
    # A thread that Python has joined may still be ending in the kernel.
    patience = time.monotonic() + 1.0
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < patience:
        time.sleep(0.001)
    try:
        _unshare(CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError as error:
        raise ProxyError(
            f"neither root nor a user namespace to act as root in ({error.strerror}): run it with sudo, or "
            "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces)"
        ) from error
    reason = problem()
    if reason is not None:
        raise ProxyError(
            f"inside a user namespace {reason}: run it with sudo, or let unprivileged user namespaces have "
            "capabilities (sysctl kernel.apparmor_restrict_unprivileged_userns=0)"
        )


class Namespace:
    """One network namespace, loopback up.  Use as a context manager, or close() it.

    `label` is for people; it names the thread.  Raises OSError when the host does not allow it.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.name: str | None = None
        self._thread: int = 0
        self._processes: list[subprocess.Popen[Any]] = []
        # One thread that never leaves the namespace: whoever calls stays where they are.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"netns-{label}")
        try:
            self.fd = self._executor.submit(self._enter).result()
        except BaseException:
            self._executor.shutdown()
            raise

    def _enter(self) -> int:
        _unshare(CLONE_NEWNET)
        self._thread = threading.get_ident()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            request = struct.pack("16sh22x", b"lo", IFF_UP)
            fcntl.ioctl(any_socket, SIOCSIFFLAGS, request)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Namespace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Namespace({self.label!r}, fd={self.fd})"

    def close(self) -> None:
        """Leave the namespace; processes started in it are killed.  Twice does no harm."""
        if self.fd < 0:
            return
        self._unpublish()
        # A process that was started just now may not have asked for its signal yet.
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        self._processes.clear()
        self._executor.shutdown()
        os.close(self.fd)
        self.fd = -1

    def call(self, function: Callable[[], T]) -> T:
        """What `function` returns, or raises, when run inside the namespace.  Calls run one at a time."""
        if threading.get_ident() == self._thread:
            return function()
        return self._executor.submit(function).result()

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket that lives in the namespace, whichever thread uses it."""
        return self.call(lambda: socket.socket(family, kind, protocol))

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process in the namespace; `options` as for subprocess.Popen.

        It is killed when the namespace is closed and when this process dies, however it dies.
        """
        guard = shutil.which("setpriv")
        # The signal comes when the thread that forked ends, which is this namespace's own.
        command = [guard, "--pdeathsig", "KILL", "--", *argv] if guard else list(argv)
        process: subprocess.Popen[Any] = self.call(lambda: subprocess.Popen(command, **options))
        self._processes = [known for known in self._processes if known.poll() is None]
        self._processes.append(process)
        return process

    def run(
        self, argv: Sequence[str], *, stdin: str = "", check: bool = True, pass_fds: Sequence[int] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a process to its end in the namespace and return it with its output as text.

        Raises KernelError with the last lines of stderr when `check` and it fails; what it did stays done.
        """
        done = self.call(
            lambda: subprocess.run(
                argv, input=stdin, text=True, capture_output=True, check=False, pass_fds=pass_fds
            )
        )
        if check and done.returncode != 0:
            said = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            raise KernelError(f"{self.label}: {' '.join(argv)} ended with {done.returncode}: {said}")
        return done

    def ip(self, *commands: Sequence[str], ipv6: bool = False, pass_fds: Sequence[int] = ()) -> None:
        """Run `ip` commands, each given as its words without `ip`, by one process, in this order.

        `ipv6` is for commands that do not tell their family from an address.  Raises KernelError at the first that
        fails; those before it are in force, those after it are not.
        """
        lines = []
        for words in commands:
            if any(not word or set(word) & set(" \t\n\\\"'#") for word in words):
                raise ValueError(f"not words of an ip command: {words!r}")
            lines.append(" ".join(words))
        if not lines:
            return
        done = self.run(
            ["ip", *(["-6"] if ipv6 else []), "-batch", "-"],
            stdin="\n".join(lines) + "\n",
            check=False,
            pass_fds=pass_fds,
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            where = next((line.rpartition(":")[2] for line in said if line.startswith("Command failed")), "")
            command = lines[int(where) - 1] if where.isdigit() else lines[0]
            raise KernelError(f"{self.label}: ip {command}: {said[0] if said else 'failed'}")

    def sysctl(self, settings: Mapping[str, str | int]) -> None:
        """Write settings below /proc/sys/net by their path there, as `ipv4/ip_forward`.

        Raises KernelError naming the setting; those before it are written.
        """

        def write() -> None:
            for path, value in settings.items():
                try:
                    Path("/proc/sys/net", path).write_text(f"{value}\n")
                except OSError as error:
                    raise KernelError(
                        f"{self.label}: net/{path} = {value}: {error.strerror}", errno=error.errno or 0
                    ) from error

        self.call(write)

    def publish(self) -> str:
        """Give the namespace a unique name for `ip netns exec NAME`, until it is closed; needs real root."""
        if self.name is None:
            PUBLISHED.mkdir(mode=0o755, exist_ok=True)
            name = f"{NAME_PREFIX}-{os.getpid()}-{next(_numbers)}"
            path = PUBLISHED / name
            path.touch(mode=0o444, exist_ok=False)
            if (
                _libc.mount(f"/proc/self/fd/{self.fd}".encode(), str(path).encode(), b"none", MS_BIND, None)
                != 0
            ):
                number = ctypes.get_errno()
                path.unlink()
                raise OSError(number, os.strerror(number), str(path))
            self.name = name
        return self.name

    def _unpublish(self) -> None:
        if self.name is not None:
            _remove_name(PUBLISHED / self.name)
            self.name = None


def _remove_name(path: Path) -> None:
    _libc.umount2(str(path).encode(), MNT_DETACH)
    with contextlib.suppress(OSError):
        path.unlink()


def sweep() -> tuple[str, ...]:
    """Remove names that publish() of processes since dead left under /run/netns; returns them."""
    gone = []
    for path in sorted(PUBLISHED.glob(f"{NAME_PREFIX}-*-*")) if PUBLISHED.is_dir() else ():
        pid = path.name.removeprefix(f"{NAME_PREFIX}-").partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            _remove_name(path)
            gone.append(path.name)
    return tuple(gone)


def veth(
    here: Namespace, name: str, mac: str, there: Namespace, peer_name: str, peer_mac: str, *, mtu: int = 1500
) -> None:
    """Join two namespaces by a pair of interfaces, both up.

    The two know each other's hardware address only through what neigh() adds, or by asking.
    """
    peer = f"/proc/self/fd/{there.fd}"
    here.ip(
        ["link", "add", "name", name, "address", mac, "mtu", str(mtu), "type", "veth"]
        + ["peer", "name", peer_name, "address", peer_mac, "mtu", str(mtu), "netns", peer],
        ["link", "set", "dev", name, "up"],
        pass_fds=(there.fd,),
    )
    there.ip(["link", "set", "dev", peer_name, "up"])


def close_all(namespaces: Iterable[Namespace]) -> None:
    """Close every one, also when closing another fails."""
    with contextlib.ExitStack() as stack:
        for namespace in namespaces:
            stack.callback(namespace.close)
