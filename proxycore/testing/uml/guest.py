"""One guest: started, read from, ended.

        runner -- pipe, never written to --> janitor (sh) -- unshare --> guest, in a process namespace
          ^------- stdout and stderr, two serial lines of the guest <------'

When the runner ends, however it ends, the janitor sees the pipe end, kills the guest and removes its folder.
"""

from __future__ import annotations

import functools
import os
import secrets
import select
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ...errors import KernelError

KERNEL = "linux.uml"
MODULE_FOLDER = Path("/usr/lib/uml/modules")
PACKAGES = "user-mode-linux kmod iproute2 util-linux"
SCHEDULERS = ("rr", "wrr", "lc", "wlc", "fo", "ovf", "lblc", "lblcr", "dh", "sh", "mh", "sed", "nq", "twos")
MODULES = (
    *("dummy", "veth", "bridge", "br_netfilter"),
    *("nf_conntrack", "nf_nat", "nf_conntrack_netlink", "nfnetlink_acct"),
    *(f"{ip}_tables" for ip in ("ip", "ip6")),
    *(
        f"{ip}table_{table}"
        for ip in ("ip", "ip6")
        for table in ("nat", "filter", "mangle", "security", "raw")
    ),
    *("ipt_REJECT", "ip6t_REJECT", "xt_MASQUERADE", "xt_nat", "xt_tcpudp", "xt_sctp", "xt_multiport"),
    *("xt_comment", "xt_mark", "xt_connmark", "xt_conntrack", "xt_addrtype", "xt_statistic", "xt_recent"),
    *("xt_nfacct", "xt_limit", "xt_set", "xt_ipvs"),
    *("ip_set", "ip_set_bitmap_port", "ip_set_list_set", "ip_set_hash_ip", "ip_set_hash_net"),
    *("ip_set_hash_ipport", "ip_set_hash_ipportip", "ip_set_hash_ipportnet"),
    *("sctp", "ip_vs"),
    *(f"ip_vs_{scheduler}" for scheduler in SCHEDULERS),
)
"""What is loaded unless others are named."""

MEMORY = "1G"
TIMEOUT_SECONDS = 600.0
TIMED_OUT = 124
NO_RESULT = 125

# One of these starts the guest in a process namespace, which the kernel empties when its first process ends.
_CONTAINERS = (
    ("unshare", "--pid", "--fork", "--kill-child"),
    ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"),
)
# Standard input ends with the runner.  The guest gets the two streams as 3 and 4, and this shell keeps neither; 5 ends with the
# last process of the guest, a moment after the one that is killed.
_JANITOR = """
control=$1
shift
mkfifo "$control/alive"
"$@" 3>&1 4>&2 5>"$control/alive" >"$control/console" 2>&1 &
exec 6<"$control/alive" >&- 2>&-
read -r nothing
kill -KILL $!
read -r nothing <&6
rm -rf "$control"
"""
# A kernel that panics aborts itself, which the first process of a namespace cannot.
_FIRST = '"$@"; exit $?'


class GuestUnavailable(KernelError):
    """User-mode Linux is installed and does not start on this host, as where ptrace is forbidden."""


class GuestTimeout(KernelError):
    """The command did not end in time; the guest is gone, its writes below writable folders may be incomplete."""


@dataclass(frozen=True, slots=True)
class Completed:
    """What a command left: its own exit status (128 + N when signal N killed it), and its streams."""

    status: int
    stdout: bytes
    stderr: bytes


@functools.cache
def problem() -> str | None:
    """Why no guest can be started here, and what to do about it, in a sentence; None if one can."""
    lacking = [command for command in (KERNEL, "modprobe", "unshare", "ip") if shutil.which(command) is None]
    if lacking:
        return f"no {' and no '.join(lacking)} here: apt-get install {PACKAGES}"
    if not _modules_at().is_dir():
        return f"no modules for {KERNEL} at {_modules_at()}: apt-get install --reinstall user-mode-linux"
    if _container() is None:
        return (
            "no process namespace can be made for user-mode Linux: run it as root, or allow user namespaces"
        )
    return None


@functools.cache
def _modules_at() -> Path:
    """The folder of the kernel's modules."""
    said = subprocess.run([KERNEL, "--version"], capture_output=True, text=True, check=False).stdout
    return MODULE_FOLDER / (said.strip() or "unknown")


@functools.cache
def _container() -> tuple[str, ...] | None:
    for prefix in _CONTAINERS:
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    return None


def missing_modules(names: Iterable[str] = MODULES) -> tuple[str, ...]:
    """Those of the modules that the guest's kernel does not have, neither to load nor built in."""
    there = set()
    for index in ("modules.dep", "modules.builtin"):
        for line in (_modules_at() / index).read_text().splitlines():
            there.add(Path(line.partition(":")[0]).name.removesuffix(".ko").replace("-", "_"))
    return tuple(name for name in names if name not in there)


class Guest:
    """A guest that runs one command.  Use as a context manager, or close() it; wait() tells how it went.

    `writable`: existing folders of the host where writes stay.  `environment`: all of the command's; the caller's if None.
    `missing`: the modules that this kernel does not have; the others are loaded before the command starts.

    Raises KernelError: no guest can be started here, with what to install; ValueError: a folder to write to is not there.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        writable: Iterable[str | Path] = (),
        environment: Mapping[str, str] | None = None,
        directory: str | Path | None = None,
        modules: Iterable[str] = MODULES,
        memory: str = MEMORY,
    ) -> None:
        if (reason := problem()) is not None:
            raise KernelError(reason)
        modules = tuple(modules)
        self.missing = missing_modules(modules)
        folders = [Path(folder).resolve() for folder in writable]
        for folder in folders:
            if not folder.is_dir() or "," in str(folder):
                raise ValueError(f"not a folder that a guest can write to: {folder}")
        self._is_read = False
        self.control = Path(tempfile.mkdtemp(prefix="px-uml-"))
        self._end = b"\x1d\x1e" + secrets.token_hex(16).encode()
        try:
            _write_control(
                self.control,
                command,
                end=self._end.decode(),
                folders=folders,
                environment=os.environ if environment is None else environment,
                directory=Path(directory or Path.cwd()),
                modules=[name for name in modules if name not in self.missing],
            )
            self._start(memory)
        except BaseException:
            shutil.rmtree(self.control)
            raise

    def _start(self, memory: str) -> None:
        kernel = [
            *(KERNEL, f"mem={memory}", "quiet", "panic=-1", "random.trust_cpu=on"),
            *("root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"init={self.control}/init"),
            *("con=null", "con0=null,fd:1", "ssl=null", "ssl0=null,fd:3", "ssl1=null,fd:4"),
            *(f"uml_dir={self.control}", "umid=guest"),
        ]
        container = _container()
        assert container is not None
        self._janitor = subprocess.Popen(
            [
                "sh",
                "-c",
                _JANITOR,
                "janitor",
                str(self.control),
                *container,
                "sh",
                "-c",
                _FIRST,
                "first",
                *kernel,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "TMPDIR": _memory_folder(memory)},
            start_new_session=True,
        )

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def wait(
        self,
        on_stdout: Callable[[bytes], object],
        on_stderr: Callable[[bytes], object],
        *,
        timeout: float = TIMEOUT_SECONDS,
    ) -> int:
        """Hand the command's streams on as they come, until it ends; its exit status.  Call it once.

        Raises GuestTimeout after `timeout` seconds, GuestUnavailable when the kernel did not come up, and KernelError when the
        guest ends later without a result; the two with the last words on its console.  The guest is closed then.
        """
        self._is_read = True
        assert self._janitor.stdout is not None
        assert self._janitor.stderr is not None
        with self._janitor.stdout as stdout, self._janitor.stderr as stderr:
            streams = {
                stdout.fileno(): _Stream(self._end, on_stdout),
                stderr.fileno(): _Stream(self._end, on_stderr),
            }
            return self._pump(streams, timeout)

    def _pump(self, streams: dict[int, _Stream], timeout: float) -> int:
        deadline = time.monotonic() + timeout
        status, is_up = NO_RESULT, False
        while streams:
            ready, _, _ = select.select(list(streams), [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                self.close()
                raise GuestTimeout(f"the guest's command did not end within {timeout:g} s")
            for fd in ready:
                data = os.read(fd, 65536)
                ended = streams[fd].feed(data)
                is_up = is_up or bool(data)
                if ended is not None:
                    status = ended
                    del streams[fd]
                elif not data:
                    said = self.console() or "it said nothing"
                    self.close()
                    if is_up or "Kernel panic" in said:
                        raise KernelError(f"the guest ended without a result: {said}")
                    raise GuestUnavailable(f"user-mode Linux does not start here: {said}")
        return status

    def console(self, lines: int = 8) -> str:
        """The last words on the guest's console, or the first from a panic on; empty once it is closed."""
        try:
            text = (self.control / "console").read_text(errors="replace")
        except OSError:
            return ""
        said = [line.strip() for line in text.splitlines() if line.strip()]
        panic = next(
            (number for number, line in enumerate(said) if "Kernel panic" in line), len(said) - lines
        )
        return " / ".join(said[max(panic, 0) :][:lines])

    def close(self) -> None:
        """End the guest at once and remove what it had; twice does no harm, nor does a call while another thread waits."""
        assert self._janitor.stdin is not None
        self._janitor.stdin.close()
        self._janitor.wait()
        if not self._is_read:
            for stream in (self._janitor.stdout, self._janitor.stderr):
                assert stream is not None
                stream.close()


class _Stream:
    """One stream of the command, up to the mark that ends it.  Bytes go on at once unless they may begin the mark."""

    def __init__(self, end: bytes, sink: Callable[[bytes], object]) -> None:
        self.end = end
        self.sink = sink
        self.held = b""

    def feed(self, data: bytes) -> int | None:
        """Take what was read; the exit status when the mark is complete."""
        self.held += data
        at = self.held.find(self.end)
        if at < 0:
            at = len(self.held) - self._begun()
        if at:
            self.sink(self.held[:at])
            self.held = self.held[at:]
        status = self.held[len(self.end) :]
        return int(status) if len(status) == 3 else None

    def _begun(self) -> int:
        """How many of the last bytes are the mark's first."""
        longest = min(len(self.held), len(self.end) - 1)
        return next(size for size in range(longest, -1, -1) if self.held.endswith(self.end[:size]))


def _write_control(
    control: Path,
    command: Sequence[str],
    *,
    end: str,
    folders: Sequence[Path],
    environment: Mapping[str, str],
    directory: Path,
    modules: Sequence[str],
) -> None:
    """All that the guest's first process needs, in one folder."""
    (control / "layer").mkdir()
    (control / "bin").mkdir()
    # Without their set-uid bits; see init.sh.
    for tool in ("mount", "umount"):
        shutil.copyfile(shutil.which(tool) or f"/bin/{tool}", control / "bin" / tool)
        (control / "bin" / tool).chmod(0o755)
    (control / "lib").mkdir()
    (control / "lib" / "modules").symlink_to(MODULE_FOLDER)
    shutil.copyfile(Path(__file__).with_name("init.sh"), control / "init")
    (control / "init").chmod(0o755)
    settings = {"end": end, "modules": " ".join(modules), "module_folder": str(MODULE_FOLDER)}
    lines = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    (control / "settings").write_text("\n".join([*lines, f"set -- {shlex.join(map(str, folders))}"]) + "\n")
    variables = [f"{name}={value}" for name, value in environment.items()]
    words = shlex.join(["env", "-i", *variables, *command])
    (control / "command").write_text(f"cd {shlex.quote(str(directory))} || exit {NO_RESULT}\nexec {words}\n")


def _memory_folder(memory: str) -> str:
    """Where the guest's memory goes, a file that user-mode Linux makes and unlinks: in memory if it fits."""
    size = int(memory[:-1]) << {"K": 10, "M": 20, "G": 30}[memory[-1].upper()]
    try:
        there = os.statvfs("/dev/shm")
    except OSError:
        return tempfile.gettempdir()
    fits = there.f_bavail * there.f_frsize >= size and not there.f_flag & os.ST_NOEXEC
    return "/dev/shm" if fits else tempfile.gettempdir()


def run(command: Sequence[str], *, timeout: float = TIMEOUT_SECONDS, **options: object) -> Completed:
    """Run a command in a guest of its own, to its end; `options` as for Guest, which also tells what is raised."""
    stdout, stderr = bytearray(), bytearray()
    with Guest(command, **options) as guest:  # type: ignore[arg-type]
        status = guest.wait(stdout.extend, stderr.extend, timeout=timeout)
    return Completed(status, bytes(stdout), bytes(stderr))
