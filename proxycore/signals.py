"""Ending on SIGTERM and SIGINT, cleanly the first time, at once the second; and SIGHUP."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stopping(stop: Callable[[], None], reload: Callable[[], None] | None = None) -> Iterator[None]:
    """While inside, the first signal calls `stop`, which must not block; a second one ends the process with 128 + N.

    `reload`, which must not block either, is called at each SIGHUP; without it, SIGHUP does what it did before.
    For the main thread only.  The previous handlers come back at the end.
    """
    received = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if received:
            # Whatever hangs, a plugin's thread included, must not hold the process.
            os._exit(128 + number)
        received = True
        stop()

    def hang_up(number: int, frame: FrameType | None) -> None:
        if reload is not None and not received:
            reload()

    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    if reload is not None:
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
