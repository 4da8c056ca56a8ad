"""What tests of the tools and the kernel share."""

from __future__ import annotations

import sys

from proxycore.kernel import xtables
from proxycore.kernel.xtables import Tools
from proxycore.testing.netns import Namespace


def tools_of(name: str) -> Tools:
    """By a name as `ip6tables-nft`."""
    return next(found for found in xtables.find() if str(found) == name)


def load(namespace: Namespace, name: str, *lines: str) -> None:
    """Restore these lines, without flushing."""
    namespace.call(lambda: xtables.restore(tools_of(name), "\n".join((*lines, "")), 5))


def saved(namespace: Namespace, name: str) -> list[str]:
    """Rules and user chains of all tables, in the words of `iptables-save`."""
    lines = namespace.call(lambda: xtables.save(tools_of(name), list))
    return [line.strip() for line in lines if line.startswith(("-A", "*")) or " - [" in line]


def run_with(namespace: Namespace, capabilities: str, code: str) -> str:
    """What Python code prints that has these capabilities alone, as `net_admin,net_raw`."""
    words = "".join(f",+{name}" for name in capabilities.split(",") if name)
    command = ["setpriv", f"--bounding-set=-all{words}", f"--inh-caps=-all{words}", "--"]
    return namespace.run([*command, sys.executable, "-c", code]).stdout
