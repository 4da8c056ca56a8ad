"""The backend's own settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from proxycore.api import ConfigError

VariantChoice = Literal["auto", "legacy", "nft"]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What `backendOptions.ipvs` and kube-proxy's `ipvs` section say.

    `exclude_cidrs` and `strict_arp` have nothing to do here: no virtual server of others is touched, and no address is put on
    an interface.  Timeouts in seconds; 0 leaves the kernel's alone.  `drain_seconds`: so long a TCP endpoint that has gone
    may keep its connections.  `variant`: of iptables; `auto` is legacy where it is installed.
    """

    scheduler: str = "rr"
    exclude_cidrs: tuple[str, ...] = ()
    strict_arp: bool = False
    tcp_timeout_seconds: int = 0
    tcp_fin_timeout_seconds: int = 0
    udp_timeout_seconds: int = 0
    drain_seconds: int = 900
    variant: VariantChoice = "auto"
    lock_seconds: int = 5


_Reading = Callable[[Any], Any]


def _seconds(least: int, most: int) -> _Reading:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ValueError(f"is not a number of seconds from {least} to {most}")
        # What lasts less than a second would be taken for 0, which means something else.
        return int(value) if value in (0, int(value)) else max(round(value), 1)

    return read


def _scheduler(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 15:
        raise ValueError("is not the name of a scheduler such as rr")
    return value or "rr"


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("is not true or false")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError("is not a list of texts")
    return tuple(value)


def _variant(value: Any) -> str:
    if value not in ("auto", "legacy", "nft"):
        raise ValueError("is not one of auto, legacy, nft")
    return str(value)


_IPVS_SECONDS = _seconds(0, 0x7FFFFFFF // 1000)
_FIELDS: Mapping[str, tuple[str, _Reading]] = {
    "scheduler": ("scheduler", _scheduler),
    "excludeCIDRs": ("exclude_cidrs", _texts),
    "strictARP": ("strict_arp", _flag),
    "tcpTimeoutSeconds": ("tcp_timeout_seconds", _IPVS_SECONDS),
    "tcpFinTimeoutSeconds": ("tcp_fin_timeout_seconds", _IPVS_SECONDS),
    "udpTimeoutSeconds": ("udp_timeout_seconds", _IPVS_SECONDS),
    "drainSeconds": ("drain_seconds", _seconds(0, 604800)),
    "variant": ("variant", _variant),
    "lockSeconds": ("lock_seconds", _seconds(1, 20)),
}
"""Name in the configuration: field, and how it is read."""


def parse_options(given: Mapping[str, Any]) -> Options:
    """Options by their names in the configuration.  Raises ConfigError naming the field."""
    values: dict[str, Any] = {}
    for name, value in given.items():
        field = f"backendOptions.ipvs.{name}"
        if name not in _FIELDS:
            raise ConfigError(f"no such setting; there are {', '.join(_FIELDS)}", field=field)
        attribute, read = _FIELDS[name]
        try:
            values[attribute] = read(value)
        except ValueError as error:
            raise ConfigError(f"{value!r} {error}", field=field) from None
    return Options(**values)
