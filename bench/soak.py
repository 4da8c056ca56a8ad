"""`./dev soak`: minutes of churn from an API server that misbehaves, and memory that has to stay flat.

Services come, change and go, those of jobs under ever new names; watches end, are cut and expire; the API server restarts;
somebody deletes our table.  At the end the kernel must hold what the API server says, and the process must be no larger than
it was after the first fifth of the time.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from statistics import fmean

from proxycore.testing.apiserver import FakeAPIServer
from proxycore.testing.netns import Namespace, problem

from . import cluster

SERVICES = 1000
PER_SECOND = 200
JOBS = 200
"""So many Services of jobs are there at a time."""
GROWTH = 1.05
SLACK_MB = 3.0
PORT = 6443


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    reason = problem()
    if reason is not None:
        print(f"soak: {reason}; root is needed", file=sys.stderr)
        return 2
    with Namespace("soak") as namespace, tempfile.TemporaryDirectory() as folder:
        return _Soak(namespace, Path(folder), random.Random(arguments.seed)).run(arguments.minutes * 60)


class _Soak:
    def __init__(self, namespace: Namespace, folder: Path, chance: random.Random) -> None:
        self._namespace = namespace
        self._folder = folder
        self._chance = chance
        self._server = FakeAPIServer(port=PORT)
        self._jobs: deque[int] = deque()
        self._job = SERVICES
        self._events = 0

    def run(self, seconds: float) -> int:
        self._listen()
        self._server.apply({"kind": "Node", "apiVersion": "v1", "metadata": {"name": cluster.NODE}})
        for number in range(SERVICES):
            self._server.apply(cluster.service(number))
            self._server.apply(cluster.endpoint_slice(number))
        config = self._folder / "config.yaml"
        kubeconfig = self._server.kubeconfig(self._folder / "kubeconfig", server=f"http://127.0.0.1:{PORT}")
        config.write_text(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n"
            f"clusterCIDR: 10.0.0.0/8\nclientConnection: {{kubeconfig: {kubeconfig}}}\n---\n"
            "apiVersion: proxycore.io/v1alpha1\nkind: ProxycoreConfiguration\n"
            f"lastKnownGood: {{file: {self._folder / 'state'}}}\n"
        )
        options = ["--config", str(config), "--node-name", cluster.NODE]
        with (self._folder / "log").open("wb") as log:
            process = self._namespace.popen(
                [sys.executable, "-m", "proxycore", "run", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            status = self._churn(process, seconds)
            status = self._agree(options) or status
            process.send_signal(signal.SIGTERM)
            return process.wait(10) or status
        finally:
            process.kill()
            self._server.stop()
            print(_summary(self._folder / "log"))

    def _listen(self) -> None:
        listener = self._namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", PORT))
        listener.listen(64)
        self._server.start(listener)

    def _churn(self, process: subprocess.Popen[bytes], seconds: float) -> int:
        time.sleep(5.0)
        began = time.monotonic()
        sizes: list[tuple[float, float]] = []
        said = next_fault = began
        while (now := time.monotonic()) < began + seconds:
            if process.poll() is not None:
                print(f"soak: the proxy ended with status {process.returncode}")
                return 1
            for _ in range(PER_SECOND // 10):
                self._event()
            if now >= next_fault:
                next_fault = now + 7.0
                self._fault()
            sizes.append((now - began, _resident_mb(process.pid)))
            if now >= said:
                said = now + 30.0
                print(
                    f"{now - began:6.0f} s  {sizes[-1][1]:6.1f} MB  {_cpu_seconds(process.pid):6.1f} s CPU  "
                    f"{self._events} events",
                    flush=True,
                )
            time.sleep(max(0.0, now + 0.1 - time.monotonic()))
        fifth = seconds / 5
        early = fmean(size for at, size in sizes if fifth <= at < 2 * fifth)
        late = fmean(size for at, size in sizes if at >= 4 * fifth)
        cpu = _cpu_seconds(process.pid)
        print(
            f"soak: {self._events} events in {seconds:.0f} s; resident {early:.1f} MB in the second fifth of the time, "
            f"{late:.1f} MB in the last (at most {max(size for _, size in sizes):.1f}); {cpu / seconds:.0%} of a core"
        )
        return 0 if late <= early * GROWTH + SLACK_MB else 1

    def _event(self) -> None:
        self._events += 1
        chance = self._chance.random()
        if chance < 0.7:
            number = self._chance.randrange(SERVICES)
            self._server.apply(
                cluster.endpoint_slice(
                    number, shift=self._chance.randrange(100), endpoints=self._chance.randint(1, 12)
                )
            )
        elif chance < 0.75:
            self._server.apply(cluster.service(self._chance.randrange(SERVICES)))
        else:
            self._next_job()

    def _next_job(self) -> None:
        """A Service under a name that was never there, and an end for the oldest of its kind."""
        self._job += 1
        service, slice_ = cluster.service(self._job % 20000), cluster.endpoint_slice(self._job % 20000)
        service["metadata"]["name"] = f"job-{self._job}"
        slice_["metadata"]["name"] = f"job-{self._job}-x"
        slice_["metadata"]["labels"]["kubernetes.io/service-name"] = f"job-{self._job}"
        self._server.apply(service)
        self._server.apply(slice_)
        self._jobs.append(self._job)
        if len(self._jobs) > JOBS:
            old = self._jobs.popleft()
            namespace = cluster.service(old % 20000)["metadata"]["namespace"]
            self._server.delete("Service", namespace, f"job-{old}")
            self._server.delete("EndpointSlice", namespace, f"job-{old}-x")

    def _fault(self) -> None:
        match self._chance.randrange(6):
            case 0:
                self._server.end_watches()
            case 1:
                self._server.cut_watches(reset=True)
            case 2:
                self._server.compact()
                self._server.cut_watches()
            case 3:
                self._server.stop()
                time.sleep(0.5)
                self._listen()
            case 4:
                self._namespace.run(["nft", "delete", "table", "ip", "proxycore"], check=False)
            case 5:
                self._server.bookmark()

    def _agree(self, options: list[str]) -> int:
        """Does the kernel hold what the API server says?"""
        deadline = time.monotonic() + 60.0
        while True:
            plan = self._namespace.run([sys.executable, "-m", "proxycore", "plan", *options], check=False)
            if plan.returncode == 0:
                print("soak: the kernel holds what the API server says")
                return 0
            if time.monotonic() > deadline:
                print(f"soak: the kernel differs:\n{plan.stdout[:2000]}{plan.stderr[:2000]}")
                return 1
            time.sleep(2.0)


def _resident_mb(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _summary(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    bad = [line for line in lines if "level=error" in line]
    return "\n".join([f"soak: {len(lines)} lines in the log, {len(bad)} of them errors", *bad[:5]])


if __name__ == "__main__":
    sys.exit(main())
