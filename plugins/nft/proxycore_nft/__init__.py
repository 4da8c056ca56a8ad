"""The nft backend of proxycore: Services as elements of nf_tables maps."""

from __future__ import annotations

__version__ = "0.1.0"


def plugin() -> object:
    """Entry point: the backend's plugin object."""
    from .backend import NftBackend

    return NftBackend()
