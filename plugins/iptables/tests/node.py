"""The backend inside a network namespace, on the real iptables of one variant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxycore.api import ApplyResult, ChangeBatch, Family, HostState, ServiceState, Verification
from proxycore.testing.netns import Namespace
from proxycore.testing.states import HOST, context, full
from proxycore_iptables.backend import IptablesBackend

from .meaning import assert_means

FAMILIES: tuple[Family, Family] = ("IPv4", "IPv6")
TOOLS: Mapping[Family, str] = {"IPv4": "iptables", "IPv6": "ip6tables"}
Chains = dict[tuple[str, str], tuple[str, ...]]


class Node:
    """One namespace, and one backend after the other in it.  `options`: those of the backend beside the variant."""

    def __init__(
        self, namespace: Namespace, variant: str, facts: HostState = HOST, **options: object
    ) -> None:
        self.namespace = namespace
        self.variant = variant
        self.facts = facts
        self.options: dict[str, object] = options
        self.backend = IptablesBackend()
        self.adopted: str | None = None

    def close(self) -> None:
        self.backend.proxycore_backend_stop()

    def start(self, facts: HostState | None = None, **options: object) -> None:
        """A new backend; the one before is stopped, as a process that ends."""
        self.backend.proxycore_backend_stop()
        self.facts = facts or self.facts
        self.options |= options
        self.backend = IptablesBackend()
        given = context(self.facts, options={"variant": self.variant, **self.options})
        started = self.namespace.call(lambda: self.backend.proxycore_backend_start(given))
        self.adopted = started.adopted

    def apply(self, batch: ChangeBatch) -> ApplyResult:
        result = self.namespace.call(lambda: self.backend.proxycore_backend_apply(batch))
        if batch.host is not None and result.outcome == "applied":
            self.facts = batch.host.after
        return result

    def run(self, *states: ServiceState, facts: HostState | None = None, **options: object) -> None:
        """Start, and bring these Services into force."""
        self.start(facts, **options)
        result = self.apply(full(*states, facts=self.facts))
        assert (result.outcome, result.failed) == ("applied", ()), result.message

    def verify(self, deep: bool = False) -> Verification:
        return self.namespace.call(lambda: self.backend.proxycore_backend_verify(deep))

    def call(self, name: str, *arguments: Any) -> Any:
        """Any other hook."""
        return self.namespace.call(lambda: getattr(self.backend, f"proxycore_backend_{name}")(*arguments))

    def iptables(self, *words: str, family: Family = "IPv4", stdin: str = "") -> str:
        """Run a tool of this variant; a first word `save` or `restore` names another one than `iptables`."""
        tool = f"{TOOLS[family]}-{self.variant}"
        if words[0] in ("save", "restore"):
            tool, words = f"{tool}-{words[0]}", words[1:]
        return self.namespace.run([tool, *words], stdin=stdin).stdout

    def ruleset(self, family: Family = "IPv4") -> str:
        """Everything there is, as the tool that saves prints it."""
        return self.iptables("save", family=family)

    def chains(self, family: Family = "IPv4") -> Chains:
        """The rules of every chain, by table and name."""
        return chains_of(self.ruleset(family))

    def assert_means(self, *states: ServiceState) -> None:
        for family in FAMILIES:
            assert_means(self.ruleset(family), states, family, self.facts)


def chains_of(text: str) -> Chains:
    """The same of what a tool printed."""
    found: dict[tuple[str, str], list[str]] = {}
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            found[table, line[1:].partition(" ")[0]] = []
        elif line.startswith("-A "):
            _, chain, rule = line.split(" ", 2)
            found[table, chain].append(rule.strip())
    return {place: tuple(rules) for place, rules in found.items()}
