"""Two proxies in one network namespace see each other."""

from __future__ import annotations

import os

import pytest

from proxycore.errors import KernelError
from proxycore.kernel import presence
from proxycore.testing.netns import Namespace

pytestmark = pytest.mark.root


def test_only_one_has_the_name_until_it_ends():
    with Namespace("a") as node:
        assert node.call(presence.holder) is None
        first = node.call(presence.claim)
        holder = node.call(presence.holder)
        assert (holder.pid, holder.uid) == (os.getpid(), os.geteuid())
        with pytest.raises(KernelError, match=rf"another proxyctl run \(pid {os.getpid()}\) is at work"):
            node.call(lambda: presence.claim(wait_seconds=0))
        for _ in range(40):
            assert node.call(presence.holder) == holder
        presence.let_go(first)
        presence.let_go(node.call(lambda: presence.claim(wait_seconds=0)))


def test_another_network_namespace_is_another_node():
    with Namespace("a") as one, Namespace("b") as other:
        first, second = one.call(presence.claim), other.call(presence.claim)
        presence.let_go(first)
        presence.let_go(second)
