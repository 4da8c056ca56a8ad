"""The tools of one variant and family in a network namespace, for tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

from proxycore.testing.netns import Namespace

VARIANTS = ("legacy", "nft")
FAMILIES = ("IPv4", "IPv6")


class Tables:
    """Writes and lists a namespace's tables.  `lock`: the file for the xtables lock, a test's own."""

    def __init__(self, namespace: Namespace, variant: str, family: str, lock: Path) -> None:
        self.namespace = namespace
        self._tool = f"{'iptables' if family == 'IPv4' else 'ip6tables'}-{variant}"
        self._env = ["env", f"XTABLES_LOCKFILE={lock}"]

    def restore(self, text: str, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Write; by default without touching what the text does not name."""
        return self.namespace.run(
            [*self._env, f"{self._tool}-restore", "-w", "2", *(options or ("--noflush",))],
            stdin=text,
            check=check,
        )

    def save(self, *options: str) -> list[str]:
        """The listing, line by line."""
        return self.namespace.run([*self._env, f"{self._tool}-save", *options]).stdout.splitlines()

    def rules(self, table: str) -> dict[str, tuple[str, ...]]:
        """Chains of a table with their rules."""
        chains: dict[str, list[str]] = {}
        for line in self.save("-t", table):
            if line.startswith(":"):
                chains[line[1:].partition(" ")[0]] = []
            elif line.startswith("-A "):
                _, chain, rule = line.split(" ", 2)
                chains[chain].append(rule)
        return {chain: tuple(rules) for chain, rules in chains.items()}
