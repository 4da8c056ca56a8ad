"""What is done about memory after a full batch, also where the C library cannot help."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Iterator

import pytest

from proxycore.memory import settle


class Link:
    """May refer to itself."""

    other: Link | None = None


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_all_free_memory_goes_back(monkeypatch: pytest.MonkeyPatch):
    kept = []

    class Library:
        def __init__(self, name):
            assert name is None
            self.malloc_trim = lambda pad: kept.append(pad.value)

    monkeypatch.setattr(ctypes, "CDLL", Library)
    settle()
    assert kept == [0]


def test_a_library_without_the_call_is_no_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    settle()


def test_garbage_goes_before_the_rest_is_left_alone():
    link = Link()
    link.other = link
    gone = weakref.ref(link)
    del link
    settle()
    assert gone() is None


def test_what_stayed_still_goes_when_nothing_refers_to_it():
    link = Link()
    settle()
    assert gc.get_freeze_count() > 0
    gone = weakref.ref(link)
    del link
    assert gone() is None
