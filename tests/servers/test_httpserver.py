"""What responders of the HTTP server are given, and what becomes of their answers."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from http import HTTPStatus

import pytest

from proxycore import httpserver
from proxycore.httpserver import Address, Answer, HTTPServer, Request, plain


class Echo:
    """A listener that remembers what it was asked and answers as a test says."""

    def __init__(self, host: str) -> None:
        self.address = Address(host, 10256)
        self.asked: list[Request] = []
        self.answer = lambda request: plain(HTTPStatus.OK, "fine")
        self.server = HTTPServer("test-server")
        assert self.server.serve({self.address: self.respond}) == {}

    def respond(self, request: Request) -> Answer:
        self.asked.append(request)
        return self.answer(request)

    def send(self, target: str, method: str = "GET") -> bytes:
        with socket.create_connection(self.address, 20) as client:
            client.sendall(f"{method} {target} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
            found = b""
            while part := client.recv(65536):
                found += part
        return found


@pytest.fixture
def echo(proxy) -> Iterator[Echo]:
    made = Echo(proxy.free_address())
    yield made
    made.server.close()


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/", "/", ""),
        ("/livez", "/livez", ""),
        ("/livez?", "/livez", ""),
        ("/livez?verbose&x=1?2", "/livez", "verbose&x=1?2"),
        ("/a%2Fb%3F?c", "/a%2Fb%3F", "c"),
        ("//host/path", "//host/path", ""),
        ("http://host:1/path?query", "/path", "query"),
        ("http://host", "/", ""),
        ("*", "*", ""),
    ],
)
def test_a_responder_gets_path_and_query_as_they_were_sent(echo: Echo, target: str, path: str, query: str):
    assert echo.send(target).startswith(b"HTTP/1.1 200 ")
    assert [(r.method, r.path, r.query) for r in echo.asked] == [("GET", path, query)]


def test_a_responder_gets_the_method(echo: Echo):
    assert echo.send("/x", "DELETE").endswith(b"fine\n")
    assert echo.send("/x", "HEAD").endswith(b"\r\n\r\n")
    assert [r.method for r in echo.asked] == ["DELETE", "HEAD"]


@pytest.mark.parametrize("target", ["http://[broken/", "http://[::1"])
def test_a_target_that_cannot_be_read_is_refused(echo: Echo, target: str):
    assert echo.send(target).startswith(b"HTTP/1.1 400 ")
    assert echo.asked == []


def test_an_answer_may_be_waited_for(echo: Echo):
    async def later() -> Answer:
        await asyncio.sleep(0)
        return plain(HTTPStatus.OK, "later")

    echo.answer = lambda request: later()
    assert echo.send("/").endswith(b"later\n")


def test_nobody_waits_for_ever(echo: Echo, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(httpserver, "ANSWER_SECONDS", 0.01)

    async def never() -> Answer:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    echo.answer = lambda request: never()
    answered = echo.send("/")
    assert answered.startswith(b"HTTP/1.1 503 ")
    assert answered.endswith(b"no answer within 0.01 s\n")


def test_a_responder_that_fails_costs_its_answer_and_one_log_line(
    echo: Echo, caplog: pytest.LogCaptureFixture
):
    def fails(request: Request) -> Answer:
        raise KeyError(request.path)

    async def fails_later() -> Answer:
        raise KeyError("later")

    echo.answer = fails
    assert echo.send("/x").startswith(b"HTTP/1.1 500 ")
    assert echo.send("/x").startswith(b"HTTP/1.1 500 ")
    echo.answer = lambda request: fails_later()
    assert echo.send("/x").startswith(b"HTTP/1.1 500 ")
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 2
    echo.answer = lambda request: plain(HTTPStatus.OK)
    assert echo.send("/x").startswith(b"HTTP/1.1 200 ")


def test_a_listener_that_stays_answers_by_its_new_responder(echo: Echo):
    assert echo.server.serve({echo.address: lambda request: plain(HTTPStatus.OK, "new")}) == {}
    assert echo.send("/").endswith(b"new\n")
    assert echo.server.listening() == {echo.address}
