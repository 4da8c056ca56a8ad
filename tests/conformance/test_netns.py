"""Network namespaces: nothing is shared, nothing is left, and no root is needed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from proxycore.errors import KernelError
from proxycore.testing import netns
from proxycore.testing.netns import Namespace, veth

pytestmark = pytest.mark.root

MACS = ("02:00:00:00:00:01", "02:00:00:00:00:02")


def test_each_has_links_sockets_and_settings_of_its_own():
    with Namespace("a") as a, Namespace("b") as b:
        veth(a, "x0", MACS[0], b, "y0", MACS[1])
        a.ip(["addr", "add", "10.9.0.1/24", "dev", "x0"])
        b.ip(["addr", "add", "10.9.0.2/24", "dev", "y0"])
        listening = b.socket(socket.AF_INET, socket.SOCK_STREAM)
        client = a.socket(socket.AF_INET, socket.SOCK_STREAM)
        with listening, client:
            listening.bind(("10.9.0.2", 80))
            listening.listen()
            client.connect(("10.9.0.2", 80))
            assert client.getsockname()[0] == "10.9.0.1"
        a.sysctl({"ipv4/ip_forward": 1})
        assert b.run(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout == "0\n"
        assert a.run(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout == "1\n"


def test_a_name_that_ip_could_take_for_a_keyword_is_a_name():
    with Namespace("a") as a, Namespace("b") as b:
        veth(a, "a", MACS[0], b, "mtu", MACS[1])
        assert "mtu" in b.run(["ip", "-o", "link"]).stdout


def test_the_command_that_failed_is_named():
    with Namespace("a") as a:
        with pytest.raises(KernelError, match="a: ip link set nope up: Cannot find device"):
            a.ip(["addr", "add", "10.0.0.1/32", "dev", "lo"], ["link", "set", "nope", "up"])
        assert "10.0.0.1/32" in a.run(["ip", "addr"]).stdout
        with pytest.raises(KernelError, match=r"net/ipv4/no_such = 1: No such file"):
            a.sysctl({"ipv4/no_such": 1})
        with pytest.raises(ValueError, match="not words"):
            a.ip(["link", "set", "lo\nlink set lo up"])


def test_processes_end_with_the_namespace():
    namespace = Namespace("a")
    process = namespace.popen(["sleep", "1000"])
    namespace.close()
    namespace.close()
    assert process.wait(5) == -signal.SIGKILL


def test_names_last_as_long_as_the_namespace_and_stale_ones_are_swept():
    with Namespace("a") as a:
        name = a.publish()
        assert (netns.PUBLISHED / name).exists()
        assert a.publish() == name
        a.ip(["link", "add", "name", "told", "type", "veth"])
        listed = subprocess.run(
            ["ip", "netns", "exec", name, "ip", "link"], capture_output=True, text=True, check=True
        )
        assert "told" in listed.stdout
    assert not (netns.PUBLISHED / name).exists()

    script = "from proxycore.testing.netns import Namespace; import os; print(Namespace('x').publish(), flush=True)"
    dead = subprocess.run(
        [sys.executable, "-c", script + "; os._exit(1)"], capture_output=True, text=True, check=False
    ).stdout.strip()
    assert (netns.PUBLISHED / dead).exists()
    assert dead in netns.sweep()
    assert not (netns.PUBLISHED / dead).exists()


WITHOUT_ROOT = """
    import ctypes, os, encodings.idna, _posixsubprocess
    from proxycore.testing import netns
    from proxycore.testing.lab import Lab
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as for a process that this user has started.
    assert netns.problem() is not None
    netns.become_root()
    with Lab([80]) as lab:
        lab.node.run(["nft", "add table ip x"])
        client = lab.client("pod", "tcp", "10.0.0.2")
        client.setblocking(True)
        client.connect(("10.180.0.1", 80))
        client.send(b"?\\n")
        print(client.recv(1000).decode(), end="")
        client.close()
"""


def test_a_user_namespace_does_where_the_host_allows_it():
    if not _user_namespaces_work():
        pytest.skip("this host allows no user namespaces")
    script = textwrap.dedent(WITHOUT_ROOT)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert '"at": "10.180.0.1:80"' in done.stdout


def _user_namespaces_work() -> bool:
    probe = ["unshare", "--user", "--map-root-user", "--net", "true"]
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    return subprocess.run([*drop, *probe], capture_output=True, check=False).returncode == 0


def test_descriptors_are_given_back():
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Namespace("a") as a:
            a.run(["true"])
    assert set(os.listdir("/proc/self/fd")) == before
