"""Giving memory back does no harm, also where the C library cannot."""

from __future__ import annotations

import ctypes

import pytest

from proxycore.memory import give_back


def test_free_memory_goes_back_to_the_system():
    give_back()


def test_a_library_without_the_call_is_no_error(monkeypatch: pytest.MonkeyPatch):
    class Musl:
        def __init__(self, name):
            assert name is None

    monkeypatch.setattr(ctypes, "CDLL", Musl)
    give_back()
