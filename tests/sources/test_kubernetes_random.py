"""Whatever happens on the way, what the source has said in the end is what the server holds."""

from __future__ import annotations

import random

import msgspec
import pytest

from proxycore.decode import decode_bytes, describe, encode
from proxycore.source import Applied, Deleted, Listed, Trouble
from proxycore.sources import listing, reflector
from proxycore.sources.listing import ListReader
from proxycore.store import Store
from proxycore.testing.apiserver import FakeAPIServer

from .conftest import Collected
from .kubernetes_run import endpoint_slice, followed, live, node, running, service, service_cidr, source_of

KINDS = ("Service", "EndpointSlice", "Node", "ServiceCIDR")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(reflector, "BACK_OFF_SECONDS", (0.01, 0.05))
    monkeypatch.setattr(reflector, "LIST_SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(reflector, "LIMIT", 7)
    monkeypatch.setattr(reflector, "SHORT_SECONDS", 0.2)
    monkeypatch.setattr(listing, "PORTION_BYTES", 400)


class Strict(Collected):
    """Also a store, and a judge: nothing is deleted that was not there, nothing is told twice in a row."""

    def __init__(self):
        super().__init__()
        self.store = Store("n1")
        self.wrong = []

    def _take(self, event):
        if isinstance(event, Deleted):
            key = (event.kind, event.namespace, event.name)
            if key not in self.objects:
                if describe(key) not in self.troubles:
                    self.wrong.append(event)
                return
        if isinstance(event, Applied | Deleted | Listed):
            self.store.apply(event)
        if isinstance(event, Trouble) and not event.reason and event.subject not in self.troubles:
            self.wrong.append(event)
            return
        super()._take(event)


def truth(server):
    """The server's objects as a proxy reads them."""
    return {
        (kind, *key): decode_bytes(kind, msgspec.json.encode(value))
        for kind in KINDS
        for key, value in server.get(kind).items()
        if kind != "Node" or key[1] == "n1"
    }


def agrees(server):
    expected = truth(server)
    return lambda sink: (
        {k: encode(v) for k, v in sink.objects.items()} == {k: encode(v) for k, v in expected.items()}
    )


def change(server, rng):
    number = rng.randrange(12)
    kind = rng.choice(["Service", "Service", "EndpointSlice", "EndpointSlice", "Node", "ServiceCIDR"])
    namespace = "default" if kind in ("Service", "EndpointSlice") else ""
    name = {"Node": "n1", "ServiceCIDR": f"c{number % 3}"}.get(kind, f"o{number}")
    if rng.random() < 0.3:
        if (namespace, name) in server.get(kind):
            server.delete(kind, namespace, name)
        return
    port, address = rng.randrange(1, 60000), f"10.0.{rng.randrange(256)}.{rng.randrange(256)}"
    server.apply(
        {
            "Service": lambda: service(name, address, port),
            "EndpointSlice": lambda: endpoint_slice(name, f"o{rng.randrange(12)}", address),
            "Node": lambda: node(zone=rng.choice("abc")),
            "ServiceCIDR": lambda: service_cidr(name, f"10.{number}.0.0/16"),
        }[kind]()
    )


def misbehave(server, rng):
    resource = rng.choice(["services", "endpointslices", "nodes", "servicecidrs", None])
    what = rng.randrange(12)
    if what == 0:
        server.compact()
    elif what == 1:
        server.store.expire_pages()
    elif what == 2:
        server.bookmark(resource)
    elif what == 3:
        server.end_watches(resource)
    elif what == 4:
        server.cut_watches(resource, reset=rng.random() < 0.5)
    elif what == 5:
        server.stop()
        for _ in range(rng.randrange(4)):
            change(server, rng)
        if rng.random() < 0.5:
            server.compact()
        server.start()
    elif what == 6:
        server.fail(resource, rng.choice(["list", "watch"]), status=rng.choice([410, 429, 500, 503]))
    elif what == 7:
        server.fail(resource, "watch", gone=True)
    elif what in (8, 9):
        server.fail(resource, None, cut=rng.randrange(1500), reset=rng.random() < 0.5)
    elif what == 10:
        server.fail(resource, None, dribble=rng.randrange(1, 50))
    else:
        server.fail(resource, "list", chunk=rng.randrange(1, 300))


@pytest.mark.parametrize("seed", range(12))
def test_the_final_state_is_the_servers(seed):
    rng = random.Random(seed)
    with FakeAPIServer() as server:
        for _ in range(20):
            change(server, rng)
        sink = Strict()
        with running(source_of(server), sink):
            for _ in range(40):
                for _ in range(rng.randrange(4)):
                    change(server, rng)
                if rng.random() < 0.4:
                    misbehave(server, rng)
                if rng.random() < 0.3:
                    sink.until(agrees(server))
            server.heal()
            sink.until(lambda s: s.synced)
            sink.until(agrees(server))
            sink.until(live)
            assert sink.wrong == []
            assert sink.troubles == {}
            expected = truth(server)
            names = {key[1:] for key in expected if key[0] == "Service"}
            assert set(sink.store.services) == names


@pytest.mark.parametrize("seed", range(6))
def test_a_watch_cut_at_any_byte_loses_and_invents_nothing(seed):
    rng = random.Random(1000 + seed)
    with FakeAPIServer() as server:
        server.apply(service("web"))
        sink = Strict()
        with running(source_of(server), sink):
            sink.until(live)
            for _ in range(12):
                server.fail("services", "watch", cut=rng.randrange(1, 900), reset=rng.random() < 0.3)
            server.cut_watches("services")
            for number in range(30):
                server.apply(service(f"s{rng.randrange(5)}", port=number + 1))
            sink.until(agrees(server))
            # Every change was told, in its order, and once.
            told = [
                e.object.spec.ports[0].port
                for e in sink.events
                if isinstance(e, Applied) and e.object.metadata.name != "web"
            ]
            assert told == list(range(1, 31))
            assert server.count("services", "list") == 1


@pytest.mark.parametrize("chunk", [None, 40])
def test_a_list_cut_at_any_byte_is_asked_for_again(chunk):
    rng = random.Random(chunk or 0)
    with FakeAPIServer() as server:
        for number in range(6):
            server.apply(service(f"s{number}", f"10.0.0.{number}"))
        for _ in range(8):
            server.fail("services", "list", cut=rng.randrange(700), chunk=chunk, reset=rng.random() < 0.3)
        with followed(server) as sink:
            sink.until(live)
            sink.until(agrees(server))
            assert server.count("services", "list") == 9
            assert sum(isinstance(e, Listed) and e.kind == "Service" for e in sink.events) == 1


def body(items):
    return msgspec.json.encode(
        {"kind": "ServiceList", "apiVersion": "v1", "metadata": {"resourceVersion": "7"}, "items": items}
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_list_in_pieces_of_any_size_says_what_the_whole_says(seed):
    """Also with seams in text and in fields of ours, where a cut would be wrong, and with objects that are no good."""
    rng = random.Random(seed)
    items = []
    for number in range(40):
        item = service(f"s{number}", f"10.0.0.{number}")
        del item["kind"]
        trap = rng.randrange(5)
        if trap == 0:
            item["metadata"]["annotations"] = {"a": '},{"metadata":{"name":"x"', "b": '"items":['}
        elif trap == 1:
            item["nested"] = [{"metadata": {"name": "inner"}}, {"metadata": {"name": "inner"}}]
        elif trap == 2:
            item["spec"]["ports"] = [{"port": rng.choice([0, "x", 70000])}]
        items.append(item)
    data = body(items)
    whole = ListReader("Service")
    whole.feed(data)
    assert whole.finish() == ("7", "")
    pieces = ListReader("Service")
    start = 0
    while start < len(data):
        size = rng.randrange(1, 300)
        pieces.feed(data[start : start + size])
        start += size
    assert pieces.finish() == ("7", "")
    assert [item.metadata.name for item in pieces.objects] == [item.metadata.name for item in whole.objects]
    assert pieces.objects == whole.objects
    assert sorted(pieces.misfits) == sorted(whole.misfits)
    assert len(whole.objects) + len(whole.misfits) == 40
