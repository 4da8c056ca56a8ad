"""Runs conformance scenarios against a backend: the real command line, real objects, real packets.

For each scenario: a fresh lab, `proxyctl run` in its node, objects as files, then for each state all flows.  A state
counts as reached when the canary, a Service of the runner's own that changes after everything else, shows the newest
change; flows that fail are sent again until the state's time is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backend import BackendContext, Capability
from ..model import FAMILIES, HostState
from ..plugins import load_backend
from .flows import Traffic
from .lab import CLIENT_ADDRESSES, CLIENT_PLACES, NODE_NAME, Lab, Place, endpoint_place
from .needs import flow_needs, scenario_needs
from .netns import Namespace
from .process import PROXYCTL, Manifests, ProxyProcess
from .responder import join_host_port
from .scenario import (
    DEFAULT_NODE,
    ExpectEndpoints,
    Flow,
    ObjectName,
    Render,
    Scenario,
    Step,
    backend_options,
    configuration,
)

START_SECONDS = 10.0
CHANGE_SECONDS = 5.0
POLL_SECONDS = 0.02

CANARY_ADDRESS = "172.30.255.254"
CANARY_ENDPOINT = "10.0.0.254"
CANARY_PORTS = (19001, 19002)
CANARY_SECONDS = 0.5
CANARY = Flow(
    name="canary",
    kind="pod",
    source=CLIENT_ADDRESSES["pod"][0],
    source_port=0,
    address=CANARY_ADDRESS,
    port=80,
    proto="tcp",
    expect=ExpectEndpoints((CANARY_ENDPOINT,)),
)

DUMPS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "nft": (("nft", "list", "ruleset"),),
    "iptables": (("iptables-save",), ("ip6tables-save",)),
    "ipvs": (("ipvsadm", "-Sn"), ("ipset", "save")),
}
"""Commands that print all rules of a backend, as a person would look at them."""

VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "iptables": {"legacy": {"variant": "legacy"}, "nft": {"variant": "nft"}},
}
"""Backends that write to more than one part of the kernel: by a name for people, the options that choose one."""


def dump_of(backend: str, options: Mapping[str, Any] | None = None) -> tuple[tuple[str, ...], ...]:
    """The commands of DUMPS for a backend with these options; none for a backend that is not known."""
    commands = DUMPS.get(backend, ())
    variant = (options or {}).get("variant", "auto")
    if backend != "iptables" or variant == "auto":
        return commands
    return tuple((name.replace("-", f"-{variant}-"), *words) for name, *words in commands)


@dataclass(frozen=True, slots=True)
class Report:
    """What came of one scenario with one backend.

    `failures` a line each, empty when it passed; `skipped`: what was not held against this backend, and why; `log` is
    the end of what the proxy said.
    """

    scenario: Scenario
    backend: str
    failures: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0
    log: str = ""

    @property
    def passed(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        head = f"{self.scenario.id} on {self.backend}: " + ("passed" if self.passed else "FAILED")
        lines = [f"{head} ({self.seconds:.1f} s)", *(f"  {failure}" for failure in self.failures)]
        lines += [f"  not held: {reason}" for reason in self.skipped]
        if self.failures and self.log:
            lines += ["  the proxy said:", *(f"    {line}" for line in self.log.splitlines())]
        return "\n".join(lines)


def unheld(
    scenario: Scenario, backend: str, capabilities: Collection[Capability] | None = None
) -> str | None:
    """Why a scenario as a whole is not held against a backend; None if it is.  `capabilities` None: it can do all."""
    if scenario.backends and backend not in scenario.backends:
        return f"for {', '.join(scenario.backends)} only"
    if capabilities is not None and (missing := scenario_needs(scenario) - set(capabilities)):
        return f"needs {_words(missing)}"
    return None


def problems(backend: str, options: Mapping[str, Any] | None = None) -> str:
    """Why this host cannot carry an installed backend with these options, by the backend's own word; empty if it can."""
    context = BackendContext(
        host=HostState(node_name=NODE_NAME), families=FAMILIES, options=dict(options or {})
    )
    loaded = load_backend(backend)
    with Namespace("probe") as namespace:
        return "; ".join(namespace.call(lambda: loaded.probe(context)).problems)


def run_scenario(
    scenario: Scenario,
    backend: str,
    *,
    capabilities: Collection[Capability] | None = None,
    options: Mapping[str, Any] | None = None,
    command: Sequence[str] = PROXYCTL,
    dump: Sequence[Sequence[str]] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Report:
    """Run one scenario from an empty lab to SIGTERM.

    `options` are the backend's own settings (`backendOptions`).  `dump` are the commands whose output `render` is about, for a
    backend that DUMPS does not know.  Raises OSError or KernelError when the lab cannot be set up; every fault of the proxy is
    a failure of the report.
    """
    begun = time.monotonic()
    if (reason := unheld(scenario, backend, capabilities)) is not None:
        return Report(scenario, backend, skipped=(reason,))
    with Lab(_ports(scenario)) as lab, tempfile.TemporaryDirectory(prefix="px-") as directory:
        dump = dump or dump_of(backend, options)
        run = _Run(scenario, backend, lab, Path(directory), capabilities, dump, options or {})
        failures, log = run.play(command, environment)
    return Report(scenario, backend, failures, tuple(run.skipped), time.monotonic() - begun, log)


class _Run:
    """One scenario under way."""

    def __init__(
        self,
        scenario: Scenario,
        backend: str,
        lab: Lab,
        directory: Path,
        capabilities: Collection[Capability] | None,
        dump: Sequence[Sequence[str]],
        options: Mapping[str, Any],
    ) -> None:
        self.scenario = scenario
        self.backend = backend
        self.lab = lab
        self.directory = directory
        self.capabilities = capabilities
        self.dump = dump
        self.options = options
        self.skipped: list[str] = []
        self.traffic = Traffic(lab)
        self.manifests = Manifests(directory / "objects")
        self.objects: dict[ObjectName, Mapping[str, Any]] = {}
        self.node_local: tuple[str, ...] = ()
        self._canary_turn = 0

    def play(
        self, command: Sequence[str], environment: Mapping[str, str] | None
    ) -> tuple[tuple[str, ...], str]:
        """All states in order, to the first that is not as it should be.  Failures, and the proxy's last words."""
        start, *steps = self.scenario.states()
        if not any(item["kind"] == "Node" for item in start.apply):
            self.manifests.apply(DEFAULT_NODE)
        self.manifests.apply(canary_service())
        self._change(start)
        try:
            with self._proxy(command, environment) as proxy:
                failures = self._judge(start, proxy, START_SECONDS)
                for number, step in enumerate(steps, start=1):
                    if failures:
                        break
                    self._change(step)
                    failures = [f"step {number}: {said}" for said in self._judge(step, proxy, CHANGE_SECONDS)]
                if (said := proxy.stop()) is not None:
                    failures.append(said)
                return tuple(failures), proxy.tail()
        finally:
            self.traffic.close()

    def _proxy(self, command: Sequence[str], environment: Mapping[str, str] | None) -> ProxyProcess:
        import yaml

        config = self.directory / "config.yaml"
        documents = [configuration(self.scenario, self.backend)]
        if self.options:
            documents.append(backend_options(self.backend, self.options))
        config.write_text(yaml.safe_dump_all(documents))
        # One lock file for the whole host would make labs side by side wait for each other.
        lock = {"XTABLES_LOCKFILE": str(self.directory / "xtables.lock")}
        return ProxyProcess(
            self.lab,
            backend=self.backend,
            folder=self.manifests.folder,
            config=config,
            log=self.directory / "log",
            command=command,
            environment={**lock, **(environment or {})},
        )

    def _change(self, step: Step) -> None:
        """The lab's routes for the objects as they will be, then the objects, then the canary."""
        for name in step.delete:
            self.objects.pop(name, None)
        self.objects.update((ObjectName.of(item), item) for item in step.apply)
        if step.node_local_ips is not None:
            self.node_local = step.node_local_ips
            self.lab.set_node_local(self.node_local)
        self._place()
        for name in step.delete:
            self.manifests.delete(name)
        for item in step.apply:
            self.manifests.apply(item)
        self._canary_turn ^= 1
        self.manifests.apply(canary_slice(CANARY_PORTS[self._canary_turn]))

    def _place(self) -> None:
        """Route endpoints and clients to where they live; endpoints on the node's own network answer there."""
        places: dict[str, Place] = {
            flow.source: CLIENT_PLACES[flow.kind]
            for state in self.scenario.states()
            for flow in state.flows
            if flow.kind in ("pod", "remote-pod", "other-node")
        }
        at_node = set()
        for address, node_name in _endpoints(self.objects.values()):
            place = endpoint_place(address, node_name, self.node_local)
            if place == "node":
                at_node.add(address)
            else:
                places[address] = place
        self.lab.put(places)
        self.lab.serve_node(at_node, _endpoint_ports(self.objects.values()))

    def _judge(self, state: Step, proxy: ProxyProcess, seconds: float) -> list[str]:
        """Wait for the state, send its flows, look at its rules; all within `seconds` from now."""
        deadline = time.monotonic() + seconds
        if (said := self._await_canary(proxy, deadline)) is not None:
            return [f"not in force after {seconds:g} s: {said}"]
        failures = self.traffic.judge(self._held(state.flows))
        while failures and time.monotonic() < deadline and proxy.ended() is None:
            time.sleep(POLL_SECONDS)
            failures = self.traffic.judge(failures)
        lines = list(failures.values())
        if state.render is not None:
            while (wrong := self._compare(state.render)) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            lines += wrong
        return lines

    def _held(self, flows: Iterable[Flow]) -> Iterator[Flow]:
        for flow in flows:
            if flow.backends and self.backend not in flow.backends:
                self.skipped.append(f"{flow.name!r}: for {', '.join(flow.backends)} only")
            elif self.capabilities is not None and (missing := flow_needs(flow) - set(self.capabilities)):
                self.skipped.append(f"{flow.name!r}: needs {_words(missing)}")
            else:
                yield flow

    def _await_canary(self, proxy: ProxyProcess, deadline: float) -> str | None:
        """Wait until the newest change is in force; None, or what is seen instead."""
        expected = join_host_port(CANARY_ENDPOINT, CANARY_PORTS[self._canary_turn])
        while (reply := asyncio.run(self.traffic.send(CANARY, CANARY_SECONDS))).at != expected:
            if (ended := proxy.ended()) is not None:
                return ended
            if time.monotonic() > deadline:
                return f"the canary Service {CANARY_ADDRESS} should reach {expected}, but {reply}"
            time.sleep(POLL_SECONDS)
        return None

    def _compare(self, render: Render) -> list[str]:
        """What is missing from the rules, and what is there too much."""
        if not self.dump:
            self.skipped.append("render: how to print this backend's rules was not said")
            return []
        rules = "\n".join(self.lab.node.run(list(argv)).stdout for argv in self.dump)

        def is_in(text: str) -> bool:
            return text in rules or text.replace(":", " . ") in rules

        lines = [f"the rules lack {text!r}" for text in render.contains if not is_in(text)]
        return lines + [f"the rules still hold {text!r}" for text in render.absent if is_in(text)]


def _words(needs: Iterable[Capability]) -> str:
    return ", ".join(sorted(need.value for need in needs))


def canary_service() -> dict[str, Any]:
    """The Service by which the runner sees that a change is in force."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": "conformance", "name": "canary"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": CANARY_ADDRESS,
            "clusterIPs": [CANARY_ADDRESS],
            "ports": [{"name": "canary", "protocol": "TCP", "port": CANARY.port}],
        },
    }


def canary_slice(port: int) -> dict[str, Any]:
    """Its only endpoint, at a port that tells one change from the next."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": "conformance",
            "name": "canary-1",
            "labels": {"kubernetes.io/service-name": "canary"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [CANARY_ENDPOINT], "conditions": {"ready": True}, "nodeName": NODE_NAME}],
        "ports": [{"name": "canary", "protocol": "TCP", "port": port}],
    }


def _slices(objects: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (item for item in objects if item["kind"] == "EndpointSlice")


def _endpoints(objects: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str | None]]:
    """Address and node name of every endpoint; what is no address is the proxy's business, not the lab's."""
    for item in _slices(objects):
        for endpoint in item.get("endpoints") or ():
            for address in endpoint.get("addresses") or ():
                with contextlib.suppress(ValueError):
                    yield str(ipaddress.ip_address(address)), endpoint.get("nodeName")


def _endpoint_ports(objects: Iterable[Mapping[str, Any]]) -> set[int]:
    ports = (port.get("port") for item in _slices(objects) for port in item.get("ports") or ())
    return {port for port in ports if isinstance(port, int) and 0 < port < 65536}


def _ports(scenario: Scenario) -> set[int]:
    """Where the lab's peers must answer: as endpoints, and beyond ext0 under every address that a flow calls."""
    ports = set(CANARY_PORTS)
    for state in scenario.states():
        ports |= {flow.port for flow in state.flows} | _endpoint_ports(state.apply)
    return ports
