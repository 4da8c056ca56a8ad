"""An object that lives in a network namespace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from proxycore.testing.netns import Namespace


class Inside:
    """What `make` makes; it is made, and its methods run, on the namespace's own thread."""

    def __init__(self, namespace: Namespace, make: Callable[[], Any]) -> None:
        self._namespace = namespace
        self._made = namespace.call(make)

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._made, name)
        return lambda *args, **options: self._namespace.call(lambda: method(*args, **options))
