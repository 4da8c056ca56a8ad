"""Giving memory back, also where the C library cannot."""

from __future__ import annotations

import ctypes

import pytest

from proxycore.memory import give_back


def test_all_free_memory_goes_back(monkeypatch: pytest.MonkeyPatch):
    kept = []

    class Library:
        def __init__(self, name):
            assert name is None
            self.malloc_trim = lambda pad: kept.append(pad.value)

    monkeypatch.setattr(ctypes, "CDLL", Library)
    give_back()
    assert kept == [0]


def test_a_library_without_the_call_is_no_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    give_back()
