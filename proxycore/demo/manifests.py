"""The folder of manifests that the proxy follows, and the two edits that the demo makes to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

CONFIG = "kubeproxy-config.yaml"


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that the manifests name: `node` it runs on, its addresses, and the ports that it serves."""

    name: str
    node: str
    addresses: tuple[str, ...]
    ports: frozenset[tuple[str, int]]


def examples() -> Path:
    """The folder of example manifests; a checkout has a link here to the one at its root."""
    folder = Path(__file__).with_name("examples")
    if not (folder / CONFIG).is_file():
        raise ConfigError("the example manifests are missing; install proxycore anew", file=str(folder))
    return folder.resolve()


class Folder:
    """A copy of the examples in `path`.  Files are only ever renamed into place, so that no reader sees half of one."""

    def __init__(self, path: Path, origin: Path) -> None:
        self._path = path
        for file in sorted(origin.glob("*.yaml")):
            if file.name != CONFIG:
                self._write(file.name, file.read_text())

    def _write(self, name: str, text: str) -> None:
        fresh = self._path.parent / f"{name}.new"
        fresh.write_text(text)
        fresh.rename(self._path / name)

    def _objects(self) -> Iterator[dict[str, Any]]:
        for file in sorted(self._path.glob("*.yaml")):
            yield from yaml.safe_load_all(file.read_text())

    def pods(self) -> tuple[Pod, ...]:
        """Every pod that an EndpointSlice names, both families together."""
        addresses: dict[tuple[str, str], set[str]] = {}
        ports: dict[tuple[str, str], set[tuple[str, int]]] = {}
        for item in self._objects():
            if item["kind"] != "EndpointSlice":
                continue
            for endpoint in item["endpoints"]:
                key = (endpoint["targetRef"]["name"], endpoint["nodeName"])
                addresses.setdefault(key, set()).add(endpoint["addresses"][0])
                ports.setdefault(key, set()).update((p["protocol"], p["port"]) for p in item["ports"])
        return tuple(
            Pod(name, node, tuple(sorted(found)), frozenset(ports[name, node]))
            for (name, node), found in sorted(addresses.items())
        )

    def add_endpoint(self, file: str, pod: Pod) -> None:
        """Put `pod` into the EndpointSlice of that file, ready."""
        endpoint = {
            "addresses": [pod.addresses[0]],
            "nodeName": pod.node,
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "targetRef": {"kind": "Pod", "namespace": "shop", "name": pod.name},
        }
        self._edit(file, lambda endpoints: [*endpoints, endpoint])

    def remove_endpoint(self, file: str, pod_name: str) -> None:
        """Take the pod of that name out of the EndpointSlice of that file."""
        self._edit(file, lambda endpoints: [e for e in endpoints if e["targetRef"]["name"] != pod_name])

    def _edit(self, file: str, change: Callable[[list[Any]], list[Any]]) -> None:
        items = list(yaml.safe_load_all((self._path / file).read_text()))
        for item in items:
            if item["kind"] == "EndpointSlice":
                item["endpoints"] = change(item["endpoints"])
        self._write(file, yaml.safe_dump_all(items, sort_keys=False))
