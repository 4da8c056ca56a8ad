"""Every error that proxycore raises on purpose.

Few classes, each of which says what state you are in after it.  `InternalError` means a bug of ours.
"""

from __future__ import annotations

from collections.abc import Sequence


class ProxyError(Exception):
    """Base of all errors of proxycore.  The message is one sentence for the person at 3 a.m."""


class ConfigError(ProxyError):
    """Configuration cannot be used; nothing was touched.

    `field` is the path of the value (`iptables.masqueradeBit`), `file` where it stands, if in a file.
    `lines`: everything that is wrong, one sentence each, which stand for the message where they are given;
    the others are about the first.  `warnings`: what else was odd.
    """

    def __init__(
        self,
        message: str = "",
        *,
        field: str | None = None,
        file: str | None = None,
        lines: Sequence[str] = (),
        warnings: Sequence[str] = (),
    ) -> None:
        self.field = field
        self.file = file
        self.warnings = tuple(warnings)
        self.lines = tuple(lines) or (": ".join(part for part in (file, field, message) if part),)
        super().__init__("; ".join(self.lines))


class DecodeError(ProxyError):
    """One API object cannot be understood; it is set aside, the last good one of its name stays in force.

    `subject` names the object (`Service default/web`), or the file and line it stands at.
    """

    def __init__(self, subject: str, reason: str) -> None:
        self.subject = subject
        self.reason = reason
        super().__init__(f"{subject}: {reason}")


class PluginError(ProxyError):
    """A plugin is missing, broken or incompatible; no other plugin is affected.

    `plugin` is its entry-point name, `distribution` the package and version that brings it, if known.
    """

    def __init__(self, plugin: str, reason: str, *, distribution: str | None = None) -> None:
        self.plugin = plugin
        self.distribution = distribution
        self.reason = reason
        origin = f" (from {distribution})" if distribution else ""
        super().__init__(f"plugin {plugin!r}{origin}: {reason}")


class SourceError(ProxyError):
    """A source of objects cannot be opened or has ended; what is programmed stays in force."""


class KernelError(ProxyError):
    """The kernel refused an operation.  What holds afterwards depends on the subsystem; nf_tables: nothing was changed.

    `errno` is the kernel's number.
    """

    def __init__(self, message: str, *, errno: int = 0) -> None:
        self.errno = errno
        super().__init__(message)


class InternalError(ProxyError):
    """A bug in proxycore."""
