"""API objects in a folder, and `proxyctl run` beside it: a small cluster whose proxy comes and goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .lab import NODE_NAME, Lab
from .process import Manifests, ProxyProcess
from .scenario import DEFAULT_NODE, MODES, ObjectName

HTTP_PORT = 80
TARGET_PORT = 8080


class Cluster:
    """Services `default/web0`, `default/web1` ... at these addresses, port 80, to port 8080 of their endpoints.

    `node_ports`: of some Services, by number.  What configure() says holds from the next start of a proxy on.
    """

    def __init__(
        self,
        lab: Lab,
        directory: Path,
        addresses: Sequence[str],
        *,
        node_ports: Mapping[int, int] | None = None,
        backend: str = "nft",
    ) -> None:
        self.lab = lab
        self.addresses = tuple(addresses)
        self.endpoints: dict[int, list[str]] = {}
        self.manifests = Manifests(directory / "objects")
        self.directory = directory
        self._config = directory / "config.yaml"
        self.log = directory / "log"
        self.configure(backend)
        self.manifests.apply(DEFAULT_NODE)
        for number in range(len(self.addresses)):
            self.set_service(number, (node_ports or {}).get(number))

    def configure(
        self,
        backend: str,
        options: Mapping[str, Any] | None = None,
        values: Mapping[str, Any] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Choose a backend, its own settings, values of KubeProxyConfiguration and ones of ProxycoreConfiguration."""
        import yaml

        self.backend = backend
        kube_proxy = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "hostnameOverride": NODE_NAME,
            "mode": MODES.get(backend, ""),
            "detectLocalMode": "ClusterCIDR",
            "clusterCIDR": "10.0.0.0/8,fd00:10::/64",
            "nodePortAddresses": ["192.168.0.2/32", "2001:db8::1/128"],
            "conntrack": {"maxPerCore": 0, "min": 0},
            "healthzBindAddress": "",
            "metricsBindAddress": "",
            **(values or {}),
        }
        ours = {
            "apiVersion": "proxycore.io/v1alpha1",
            "kind": "ProxycoreConfiguration",
            "backendOptions": {backend: dict(options or {})},
            **(more or {}),
        }
        self._config.write_text(yaml.safe_dump_all([kube_proxy, ours]))

    def set_service(self, number: int, node_port: int | None = None) -> None:
        """Write Service `web<number>`."""
        address = self.addresses[number]
        port: dict[str, Any] = {"name": "http", "protocol": "TCP", "port": HTTP_PORT}
        if node_port is not None:
            port["nodePort"] = node_port
        self.manifests.apply(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"namespace": "default", "name": f"web{number}"},
                "spec": {
                    "type": "NodePort" if node_port is not None else "ClusterIP",
                    "clusterIP": address,
                    "clusterIPs": [address],
                    "ipFamilies": [_family(address)],
                    "ports": [port],
                },
            }
        )

    def add_service(self, address: str, endpoints: Sequence[str]) -> int:
        """One more; returns its number."""
        self.addresses = (*self.addresses, address)
        number = len(self.addresses) - 1
        self.set_service(number)
        self.set_endpoints(number, endpoints)
        return number

    def remove_service(self, number: int) -> None:
        """Take one that has endpoints away; numbers of others stay."""
        self.manifests.delete(ObjectName("EndpointSlice", "default", f"web{number}-1"))
        self.manifests.delete(ObjectName("Service", "default", f"web{number}"))
        del self.endpoints[number]

    def set_endpoints(self, number: int, addresses: Sequence[str]) -> None:
        """These, all of them pods of this node, are its endpoints."""
        self.endpoints[number] = list(addresses)
        self.manifests.apply(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "namespace": "default",
                    "name": f"web{number}-1",
                    "labels": {"kubernetes.io/service-name": f"web{number}"},
                },
                "addressType": _family(self.addresses[number]),
                "endpoints": [
                    {"addresses": [address], "conditions": {"ready": True}, "nodeName": NODE_NAME}
                    for address in addresses
                ],
                "ports": [{"name": "http", "protocol": "TCP", "port": TARGET_PORT}],
            }
        )

    def proxy(self, environment: Mapping[str, str] | None = None) -> ProxyProcess:
        """A proxy that runs while the block does; leaving it kills the process, whatever it is doing."""
        lock = {"XTABLES_LOCKFILE": str(self.directory / "xtables.lock")}
        return ProxyProcess(
            self.lab,
            backend=self.backend,
            folder=self.manifests.folder,
            config=self._config,
            log=self.log,
            environment={**lock, **(environment or {})},
        )

    def said(self) -> str:
        """The end of what the last proxy said."""
        return self.log.read_text(errors="replace")[-3000:]


def _family(address: str) -> str:
    return "IPv6" if ":" in address else "IPv4"
