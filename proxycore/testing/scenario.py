"""Conformance scenarios: the values that a YAML file of them stands for.

The form is described in `scenarios/README.md`.  Everything is checked on loading: an unknown key or a wrong type is a
ConfigError that names file and scenario, so that a misspelt expectation cannot pass as none.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from ..errors import ConfigError
from .lab import CLIENT_ADDRESSES, NODE_NAME, ClientKind
from .responder import join_host_port

DIRECTORY = Path(__file__).with_name("scenarios")
Verdict = Literal["reject", "drop", "unproxied"]
Transport = Literal["tcp", "udp"]


@dataclass(frozen=True, slots=True)
class ExpectEndpoints:
    """Exactly these answer, as `ip:port`; `masquerade` by endpoint, where it matters.  `sticky`: one of them only."""

    endpoints: tuple[str, ...]
    masquerade: Mapping[str, bool] = field(default_factory=dict)
    sticky: bool = False


@dataclass(frozen=True, slots=True)
class ExpectVerdict:
    """No endpoint answers: refused, silence, or left alone by the proxy."""

    result: Verdict


@dataclass(frozen=True, slots=True)
class ExpectHTTP:
    """An HTTP response with this status, whose JSON body has these fields among others."""

    status: int
    json: Mapping[str, Any] = field(default_factory=dict)


Expect = ExpectEndpoints | ExpectVerdict | ExpectHTTP


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """Traffic from one client to one address, and what must come of it.  Each is itself alone, equal to no other."""

    name: str
    kind: ClientKind
    source: str
    source_port: int
    """0: each try from a new one."""
    address: str
    port: int
    proto: Transport
    expect: Expect
    http: str | None = None
    backends: tuple[str, ...] = ()
    connection: str | None = None
    pause: float = 0.0

    def __str__(self) -> str:
        source = f"{self.kind} {self.source}" + (f" port {self.source_port}" if self.source_port else "")
        return f"{source} -> {self.proto} {join_host_port(self.address, self.port)}"


@dataclass(frozen=True, slots=True)
class Render:
    """Texts that a dump of all rules must contain, and must not."""

    contains: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ObjectName:
    """Names one API object; `namespace` is empty for Node and ServiceCIDR."""

    kind: str
    namespace: str
    name: str

    @classmethod
    def of(cls, item: Mapping[str, Any]) -> ObjectName:
        """Of an API object as YAML gives it."""
        metadata = item["metadata"]
        return cls(item["kind"], metadata.get("namespace", ""), metadata["name"])


@dataclass(frozen=True, slots=True)
class Step:
    """A change and what holds after it.  `node_local_ips` None: as before."""

    delete: tuple[ObjectName, ...] = ()
    apply: tuple[Mapping[str, Any], ...] = ()
    node_local_ips: tuple[str, ...] | None = None
    flows: tuple[Flow, ...] = ()
    render: Render | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario.  `objects`, `flows`, `render` and `node_local_ips` describe the start, `steps` what comes after."""

    file: str
    name: str
    source: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    objects: tuple[Mapping[str, Any], ...]
    flows: tuple[Flow, ...] = ()
    render: Render | None = None
    steps: tuple[Step, ...] = ()
    backends: tuple[str, ...] = ()
    canary: bool = False
    node_local_ips: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.file}/{self.name}"

    def states(self) -> Iterator[Step]:
        """The start as a step, then the steps."""
        yield Step(
            apply=self.objects, node_local_ips=self.node_local_ips, flows=self.flows, render=self.render
        )
        yield from self.steps


DEFAULT_NODE: Mapping[str, Any] = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": NODE_NAME, "labels": {"kubernetes.io/hostname": NODE_NAME}},
    "spec": {"podCIDR": "10.180.0.0/24", "podCIDRs": ["10.180.0.0/24", "fd00:10:180::/120"]},
    "status": {
        "addresses": [
            {"type": "InternalIP", "address": "192.168.0.2"},
            {"type": "InternalIP", "address": "2001:db8::1"},
            {"type": "Hostname", "address": NODE_NAME},
        ]
    },
}
"""The Node object of a scenario that brings none."""

MODES = {"nft": "nftables", "iptables": "iptables", "ipvs": "ipvs"}
_SYNC = {"minSyncPeriod": "0s", "syncPeriod": "30s"}


def configuration(scenario: Scenario, backend: str) -> dict[str, Any]:
    """The KubeProxyConfiguration of a scenario: the defaults with the scenario's parts laid over them."""
    defaults: dict[str, Any] = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "hostnameOverride": NODE_NAME,
        "detectLocalMode": "ClusterCIDR",
        "clusterCIDR": "10.0.0.0/8,fd00:10::/64",
        "nodePortAddresses": ["192.168.0.2/32", "2001:db8::1/128"],
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
        "iptables": {**_SYNC, "masqueradeAll": False},
        "nftables": {**_SYNC, "masqueradeAll": False},
        "ipvs": dict(_SYNC),
    }
    if backend in MODES:
        defaults["mode"] = MODES[backend]
    return _overlay(defaults, scenario.config)


def backend_options(backend: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The ProxycoreConfiguration that gives a backend its own settings; a second document of the configuration file."""
    return {
        "apiVersion": "proxycore.io/v1alpha1",
        "kind": "ProxycoreConfiguration",
        "backendOptions": {backend: dict(options)},
    }


def _overlay(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        result[key] = (
            _overlay(under, value) if isinstance(under, dict) and isinstance(value, Mapping) else value
        )
    return result


def load(paths: Iterable[Path] | None = None) -> list[Scenario]:
    """All scenarios of these files, or of the ones that come with the package, in the order of file and text.

    Raises ConfigError at the first mistake.
    """
    found: list[Scenario] = []
    for path in sorted(DIRECTORY.glob("*.yaml")) if paths is None else paths:
        found += parse(path.read_text(), path.stem)
    return found


def parse(text: str, file: str) -> list[Scenario]:
    """The scenarios of one YAML text; `file` is what their ids begin with.  Raises ConfigError."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        items = yaml.load(text, Loader=loader)  # A safe loader, in C where there is one.
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}", file=file) from error
    if not isinstance(items, list):
        raise ConfigError("a file of scenarios is a list", file=file)
    scenarios = [_scenario(item, file) for item in items]
    names = [scenario.name for scenario in scenarios]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two scenarios are named {name!r}", file=file)
    return scenarios


class _Fields:
    """Takes the keys of one mapping, with their types, and complains about those that nobody took."""

    def __init__(self, value: Any, file: str, where: str) -> None:
        if not isinstance(value, Mapping):
            raise ConfigError(f"must be a mapping, not {value!r}", file=file, field=where)
        self._left = dict(value)
        self.file, self.where = file, where

    def has(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = self._left.pop(key, default)
        if value is not None and not isinstance(value, kind):
            raise self.error(f"{key} must not be {value!r}")
        return value

    def must(self, key: str, kind: type | tuple[type, ...]) -> Any:
        value = self.take(key, kind)
        if value is None:
            raise self.error(f"{key} is missing")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        values = self.take(key, list) or []
        if not all(isinstance(value, str) for value in values):
            raise self.error(f"{key} must be a list of texts, not {values!r}")
        return tuple(values)

    def end(self) -> None:
        if self._left:
            raise self.error(f"unknown keys: {', '.join(map(str, self._left))}")

    def error(self, message: str) -> ConfigError:
        return ConfigError(message, file=self.file, field=self.where)


def _scenario(value: Any, file: str) -> Scenario:
    name = value.get("name") if isinstance(value, Mapping) else None
    fields = _Fields(value, file, str(name))
    state = _state(fields)
    scenario = Scenario(
        file=file,
        name=fields.must("name", str),
        source=fields.take("source", str, ""),
        tags=fields.texts("tags"),
        config=fields.take("config", Mapping) or {},
        objects=tuple(_object(item, fields) for item in fields.must("objects", list)),
        flows=state.flows,
        render=state.render,
        node_local_ips=state.node_local_ips or (),
        steps=tuple(_step(item, fields) for item in fields.take("steps", list) or ()),
        backends=fields.texts("backends"),
        canary=fields.take("canary", bool, False),
    )
    fields.end()
    return scenario


def _state(fields: _Fields) -> Step:
    """What the start and every step have in common."""
    local = fields.texts("node_local_ips") if fields.has("node_local_ips") else None
    flows = tuple(_flow(item, fields) for item in fields.take("flows", list) or ())
    render = fields.take("render", Mapping)
    return Step(
        flows=flows, render=_render(render, fields) if render is not None else None, node_local_ips=local
    )


def _step(value: Any, outer: _Fields) -> Step:
    fields = _Fields(value, outer.file, f"{outer.where}.steps")
    state = _state(fields)
    step = Step(
        delete=tuple(_name(item, fields) for item in fields.take("delete", list) or ()),
        apply=tuple(_object(item, fields) for item in fields.take("apply", list) or ()),
        node_local_ips=state.node_local_ips,
        flows=state.flows,
        render=state.render,
    )
    fields.end()
    return step


def _name(value: Any, outer: _Fields) -> ObjectName:
    fields = _Fields(value, outer.file, f"{outer.where}.delete")
    named = ObjectName(fields.must("kind", str), fields.take("namespace", str, ""), fields.must("name", str))
    fields.end()
    return named


def _object(value: Any, outer: _Fields) -> Mapping[str, Any]:
    """Only what the runner needs is checked: the proxy under test is to judge the rest."""
    try:
        ObjectName.of(value)
    except (KeyError, TypeError) as error:
        raise outer.error(f"an object needs kind and metadata.name: {value!r}") from error
    return cast("Mapping[str, Any]", value)


def _render(value: Any, outer: _Fields) -> Render:
    fields = _Fields(value, outer.file, f"{outer.where}.render")
    render = Render(contains=fields.texts("contains"), absent=fields.texts("absent"))
    fields.end()
    return render


def _flow(value: Any, outer: _Fields) -> Flow:
    name = value.get("name") if isinstance(value, Mapping) else None
    fields = _Fields(value, outer.file, f"{outer.where}: {name}")
    origin = _Fields(fields.must("from", Mapping), outer.file, f"{fields.where}.from")
    target = _Fields(fields.must("to", Mapping), outer.file, f"{fields.where}.to")
    kind: ClientKind = _one_of(origin, "kind", get_args(ClientKind))
    address = _address(target.must("ip", str), target)
    source = origin.take("ip", str) or CLIENT_ADDRESSES[kind][":" in address]
    flow = Flow(
        name=fields.must("name", str),
        kind=kind,
        source=_address(source, origin),
        source_port=origin.take("port", int, 0),
        address=address,
        port=target.must("port", int),
        proto=_one_of(target, "proto", get_args(Transport)),
        http=target.take("http", str),
        expect=_expect(fields.must("expect", Mapping), fields),
        backends=fields.texts("backends"),
        connection=fields.take("conn", str),
        pause=float(fields.take("pause", (int, float), 0)),
    )
    if (":" in flow.source) != (":" in flow.address):
        raise fields.error("source and destination are of different families")
    if (flow.http is not None) != isinstance(flow.expect, ExpectHTTP):
        raise fields.error("to.http and http_status go together")
    for each in (fields, origin, target):
        each.end()
    return flow


def _expect(value: Any, outer: _Fields) -> Expect:
    fields = _Fields(value, outer.file, f"{outer.where}.expect")
    result: Expect
    if "result" in value:
        result = ExpectVerdict(_one_of(fields, "result", get_args(Verdict)))
    elif "http_status" in value:
        result = ExpectHTTP(fields.must("http_status", int), fields.take("json", Mapping) or {})
    else:
        endpoints = tuple(_endpoint(text, fields) for text in fields.texts("endpoints"))
        if not endpoints:
            raise fields.error("needs endpoints, result or http_status")
        masquerade = fields.take("masq", (bool, Mapping))
        if isinstance(masquerade, bool):
            masquerade = dict.fromkeys(endpoints, masquerade)
        by_endpoint = {_endpoint(text, fields): bool(flag) for text, flag in (masquerade or {}).items()}
        if by_endpoint.keys() - set(endpoints):
            raise fields.error("masq names an endpoint that is not expected")
        result = ExpectEndpoints(endpoints, by_endpoint, fields.take("sticky", bool, False))
    fields.end()
    return result


def _one_of(fields: _Fields, key: str, allowed: Sequence[str]) -> Any:
    value = fields.must(key, str)
    if value not in allowed:
        raise fields.error(f"{key} must be one of {', '.join(allowed)}, not {value!r}")
    return value


def _address(text: str, fields: _Fields) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise fields.error(str(error)) from error


def _endpoint(text: str, fields: _Fields) -> str:
    """`ip:port` or `[ip]:port` in canonical form."""
    address, _, port = text.rpartition(":")
    if not port.isdigit():
        raise fields.error(f"an endpoint is written ip:port, not {text!r}")
    return join_host_port(_address(address.strip("[]"), fields), int(port))
