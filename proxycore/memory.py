"""Memory of this process."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return free memory that the C library holds on to; takes about a millisecond.

    A full batch needs much for a moment.  Does nothing where the library has no such call (musl).
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(ctypes.c_size_t(0))
