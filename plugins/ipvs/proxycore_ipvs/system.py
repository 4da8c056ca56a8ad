"""What the backend holds of the host while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from proxycore.api import BackendContext, Family, KernelError

from .kernel import Kernel, NetlinkKernel
from .netrules import SYSCTLS
from .options import Options
from .routing import NetlinkRouting, Routing
from .servers import Timeouts
from .setkernel import NetlinkSets, Sets
from .tables import Tables, ToolTables, choose

_NEEDED = "net/ipv4/vs/conntrack"
"""Without it nothing can be masqueraded; the others make changes smoother."""


class System(Protocol):
    """The real one and the one of tests; belongs to the network namespace of the thread that made it."""

    kernel: Kernel
    sets: Sets
    routing: Routing
    tables: Mapping[Family, Tables]

    def prepare(self, options: Options) -> None:
        """Settings of the kernel; raises KernelError."""
        ...

    def checks_marks(self) -> bool:
        """Does the kernel look for the way back of an IPv4 packet by the mark that it carries?"""
        ...

    def close(self) -> None: ...


class RealSystem:
    """This network namespace.  Making it loads IPVS if need be; raises KernelError: what is missing."""

    def __init__(self, context: BackendContext, options: Options) -> None:
        tables = {
            family: ToolTables(tools, options.lock_seconds)
            for family, tools in choose(context.families, options).items()
        }
        self.tables: Mapping[Family, Tables] = tables
        self._tables = tables
        self.kernel: Kernel = NetlinkKernel()
        try:
            self.sets: Sets = NetlinkSets()
        except BaseException:
            self.kernel.close()
            raise
        self.routing: Routing = NetlinkRouting()

    def prepare(self, options: Options) -> None:
        for tables in self._tables.values():
            tables.prepare()
        for each in SYSCTLS:
            _set(each.path, each.value)
        set_timeouts(self.kernel, options)

    def checks_marks(self) -> bool:
        return any(_is_set(file) for file in Path("/proc/sys/net/ipv4/conf").glob("*/src_valid_mark"))

    def close(self) -> None:
        self.sets.close()
        self.kernel.close()


def _is_set(file: Path) -> bool:
    try:
        return file.read_text().strip() not in ("", "0")
    except OSError:
        return False


def _set(path: str, value: str) -> None:
    file = Path("/proc/sys", path)
    try:
        if file.read_text().strip() != value:
            file.write_text(f"{value}\n")
    except OSError as error:
        if path == _NEEDED:
            name = path.replace("/", ".")
            raise KernelError(
                f"{name} cannot be set to {value}: {error.strerror}", errno=error.errno or 0
            ) from error


def set_timeouts(kernel: Kernel, options: Options) -> None:
    """Those that the configuration names, if they differ.  Raises KernelError."""
    wanted = Timeouts(
        options.tcp_timeout_seconds, options.tcp_fin_timeout_seconds, options.udp_timeout_seconds
    )
    if any(want not in (0, have) for want, have in zip(wanted, kernel.timeouts(), strict=True)):
        kernel.set_timeouts(wanted)
