"""A stand-in for `proxyctl run` that fits one page: nft text for the example manifests, rewritten whole at every change.

It lets the demo's lab be tested without the engine, and with a fault: `FAULTS=...` in the environment breaks what it names.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

FAULTS = set(os.environ.get("FAULTS", "").split(","))
PODS = {4: "10.244.0.0/16", 6: "fd00:10:244::/48"}


def numbered(endpoints: list[tuple[str, int]]) -> str:
    elements = ", ".join(f"{i} : {address} . {port}" for i, (address, port) in enumerate(endpoints))
    return f"numgen random mod {len(endpoints)} map {{ {elements} }}"


def sticky(endpoints: list[tuple[str, int]]) -> str:
    return numbered(endpoints).replace("numgen random", "jhash ip saddr").replace(" map {", " seed 0x1 map {")


def rules(folder: Path, family: int) -> str:
    objects = [o for f in sorted(folder.glob("*.yaml")) for o in yaml.safe_load_all(f.read_text())]
    ip = "ip" if family == 4 else "ip6"
    known: dict[tuple[str, str], list[tuple[str, int, str]]] = {}
    for piece in (o for o in objects if o["kind"] == "EndpointSlice"):
        if piece["addressType"] != f"IPv{family}":
            continue
        name = piece["metadata"]["labels"]["kubernetes.io/service-name"]
        for port in piece["ports"]:
            found = known.setdefault((name, port["name"]), [])
            found += [(e["addresses"][0], port["port"], e["nodeName"]) for e in piece["endpoints"]]
    nat, first, refuse = [], [], []
    for service in (o for o in objects if o["kind"] == "Service"):
        spec = service["spec"]
        vips = [a for a in spec["clusterIPs"] if ipaddress.ip_address(a).version == family]
        for port in spec["ports"]:
            protocol = port["protocol"].lower()
            endpoints = [(a, p) for a, p, _ in known.get((service["metadata"]["name"], port["name"]), [])]
            local = [
                (a, p)
                for a, p, n in known.get((service["metadata"]["name"], port["name"]), [])
                if n == "node-1"
            ]
            if "stale" in FAULTS and service["metadata"]["name"] == "web" and len(endpoints) == 3:
                endpoints = [*endpoints, ("10.244.1.12", 8080)]
            choose = (
                sticky if spec["sessionAffinity"] == "ClientIP" and "affinity" not in FAULTS else numbered
            )
            for vip in vips:
                there = f"{ip} daddr {vip} {protocol} dport {port['port']}"
                if not endpoints:
                    refuse.append(f"{there} {'drop' if 'refuse' in FAULTS else 'reject'}")
                    continue
                if "masquerade" not in FAULTS:
                    nat.append(f"{there} {ip} saddr != {PODS[family]} meta mark set 0x4000")
                nat.append(f"{there} dnat {ip} addr . port to {choose(endpoints)}")
            if family == 4 and spec["type"] == "NodePort":
                there = f"ip daddr 192.168.1.10 {protocol} dport {port['nodePort']}"
                nat.append(f"{there} meta mark set 0x4000 dnat {ip} addr . port to {numbered(endpoints)}")
            balancer = service.get("status", {}).get("loadBalancer", {})
            for entry in balancer.get("ingress", []) if family == 4 else []:
                there = f"ip daddr {entry['ip']} {protocol} dport {port['port']}"
                ranges = ", ".join(spec["loadBalancerSourceRanges"])
                if "ranges" not in FAULTS:
                    first.append(f"{there} ip saddr != {{ {ranges} }} drop")
                nat.append(f"{there} ip saddr {PODS[4]} dnat {ip} addr . port to {choose(endpoints)}")
                here = [e for e in endpoints if (e in local) is not ("local" in FAULTS)]
                nat.append(f"{there} dnat {ip} addr . port to {choose(here)}")
    new = "\n    ".join(first), "\n    ".join(nat), "\n    ".join(refuse)
    return f"""
table {ip} naive {{}}
delete table {ip} naive
table {ip} naive {{
  chain first {{ type filter hook prerouting priority -110;
    {new[0]}
  }}
  chain services {{
    {new[1]}
  }}
  chain prerouting {{ type nat hook prerouting priority -100; jump services; }}
  chain output {{ type nat hook output priority -100; jump services; }}
  chain refuse {{
    {new[2]}
  }}
  chain forward {{ type filter hook forward priority 0; jump refuse; }}
  chain local {{ type filter hook output priority 0; jump refuse; }}
  chain postrouting {{ type nat hook postrouting priority 100;
    meta mark 0x4000 masquerade
    ct status dnat {ip} saddr . {ip} daddr {{ {hairpins(known)} }} masquerade
  }}
}}
"""


def hairpins(known: dict[tuple[str, str], list[tuple[str, int, str]]]) -> str:
    addresses = sorted({a for found in known.values() for a, _, _ in found})
    return ", ".join(f"{a} . {a}" for a in addresses)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1 if "stop" in FAULTS else 0))
    folder = Path(sys.argv[sys.argv.index("--source") + 1].removeprefix("file:"))
    done: object = None
    while True:
        seen = [(f.name, f.stat().st_ino) for f in sorted(folder.glob("*.yaml"))]
        if "crash" in FAULTS and done and seen != done:
            sys.exit(3)
        if seen != done and not ("slow" in FAULTS and done):
            text = rules(folder, 4) + rules(folder, 6)
            subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)
            done = seen
        time.sleep(0.05)


main()
