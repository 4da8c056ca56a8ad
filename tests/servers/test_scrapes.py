"""The metrics page over real HTTP, and those who break it."""

from __future__ import annotations

import logging
import socket
import threading

from prometheus_client import Counter

from proxycore import httpserver

# -- /metrics and those who break it -------------------------------------------------------------------------------


def test_content_type(proxy):
    proxy.serve()
    assert (
        proxy.ask(proxy.metrics, "/metrics").headers["Content-Type"]
        == "text/plain; version=0.0.4; charset=utf-8"
    )


def test_another_observers_metrics_are_shown_as_the_go_client_would(proxy):
    Counter("mine_total", "Mine.", registry=proxy.registry).inc()
    proxy.serve()
    text = proxy.ask(proxy.metrics, "/metrics").body.decode()
    assert "# TYPE mine_total counter\nmine_total 1.0\n" in text
    assert "_created" not in text


class Broken:
    def collect(self):
        raise RuntimeError("no")


class Copy:
    """Says what somebody else says already, which the registry cannot know beforehand."""

    def __init__(self) -> None:
        self._counter = Counter("mine_total", "Mine.", registry=None)

    def collect(self):
        return self._counter.collect()


def test_a_broken_collector_costs_nobody_else_a_metric(proxy, caplog):
    Counter("mine_total", "Mine.", registry=proxy.registry).inc()
    proxy.registry.register(Broken())
    proxy.registry.register(Copy())
    proxy.serve()
    series = proxy.series()
    assert series["mine_total",] == 1
    assert series["proxycore_collector_failures_total",] == 2
    assert proxy.ask(proxy.metrics, "/metrics").body.count(b"\nmine_total ") == 1
    told = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(told) == 2, "once each"


class Hanging:
    def __init__(self) -> None:
        self.calls = 0
        self.let_go = threading.Event()

    def collect(self):
        self.calls += 1
        assert self.let_go.wait(20.0)
        return []


def test_a_hanging_collector_does_not_keep_health_from_answering(proxy, monkeypatch):
    hanging = Hanging()
    proxy.registry.register(hanging)
    proxy.serve()
    monkeypatch.setattr(httpserver, "ANSWER_SECONDS", 0.05)
    assert proxy.ask(proxy.metrics, "/metrics").status == 503
    assert proxy.ask(proxy.metrics, "/metrics").status == 503
    assert hanging.calls == 1, "no second one is started meanwhile"
    assert proxy.ask(proxy.metrics, "/livez").status == 200
    assert proxy.ask(proxy.health, "/livez").status == 200
    monkeypatch.setattr(httpserver, "ANSWER_SECONDS", proxy.PATIENCE)
    hanging.let_go.set()
    proxy.wait_until(lambda: proxy.ask(proxy.metrics, "/metrics").status == 200)


def test_who_asks_at_the_same_time_gets_the_same_page(proxy):
    hanging = Hanging()
    proxy.registry.register(hanging)
    proxy.serve()
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(proxy.ask(proxy.metrics, "/metrics").status))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    proxy.wait_until(lambda: len(proxy.servers._server._conversations) == 5)
    hanging.let_go.set()
    for thread in threads:
        thread.join(proxy.PATIENCE)
    assert found == [200] * 5
    assert hanging.calls <= 2, "one who comes late may have a page of its own"


def test_a_bug_behind_one_path_is_that_paths_alone(proxy, caplog):
    proxy.serve()
    proxy.configz = {"x": {1j: 1}}
    for _ in range(3):
        assert proxy.ask(proxy.metrics, "/configz").status == 500
    assert proxy.ask(proxy.metrics, "/livez").status == 200
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1


def test_a_closed_server_forgets_a_page_that_is_being_written(proxy):
    hanging = Hanging()
    proxy.registry.register(hanging)
    proxy.serve()
    client = socket.create_connection(tuple(proxy.metrics.split(":")), proxy.PATIENCE)
    client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    proxy.wait_until(lambda: hanging.calls)
    proxy.servers.close()
    assert client.recv(100) == b""
    client.close()
    writers = [thread for thread in threading.enumerate() if thread.name == "scrape"]
    hanging.let_go.set()
    for thread in writers:
        thread.join(proxy.PATIENCE)
        assert not thread.is_alive()
