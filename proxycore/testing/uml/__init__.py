"""A kernel with IPVS for one command, where the host's has none: a guest of user-mode Linux, gone with its command.

    python -m proxycore.testing.uml -- ipvsadm -Ln

The command runs as root in the caller's folder and sees the caller's whole file system through an overlay: every write lands in
the guest's memory and vanishes, except below the folders named as writable.  That guards against accidents, not against
hostile code.  There is no terminal, no input, no network but what the guest makes, and one CPU.

This kernel, of Debian's package user-mode-linux, lacks nf_tables for ip, ip6 and inet: iptables-legacy works, nft does not.

`guest` runs commands; `grouptests` is a pytest plugin that runs tests marked `ipvs` in one.
"""

from __future__ import annotations

from .guest import (
    MODULES,
    Completed,
    Guest,
    GuestTimeout,
    GuestUnavailable,
    missing_modules,
    problem,
    run,
)

__all__ = [
    "Completed",
    "Guest",
    "GuestTimeout",
    "GuestUnavailable",
    "MODULES",
    "missing_modules",
    "problem",
    "run",
]
