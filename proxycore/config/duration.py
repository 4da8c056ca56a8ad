"""Durations in Go's notation: `1h0m0s`, `500ms`, `1.5s`; whole nanoseconds inside, as in Go.

Semantics: Go's time.ParseDuration and Duration.String.
"""

from __future__ import annotations

import re

SECOND = 1_000_000_000
MAX = (1 << 63) - 1

_UNITS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "μs": 1_000,
    "ms": 1_000_000,
    "s": SECOND,
    "m": 60 * SECOND,
    "h": 3600 * SECOND,
}
_PART = re.compile(r"([0-9]*)(?:(\.)([0-9]*))?(ns|us|µs|μs|ms|s|m|h)")


def parse_duration(text: str) -> int:
    """Nanoseconds that the text stands for.

    Raises ValueError with a sentence for people.
    """
    sign = -1 if text.startswith("-") else 1
    body = text[1:] if text[:1] in ("+", "-") else text
    if body == "0":
        return 0
    total = 0
    position = 0
    while position < len(body):
        part = _PART.match(body, position)
        if part is None or not (part[1] or part[3]):
            break
        unit = _UNITS[part[4]]
        total += int(part[1][:_MAX_DIGITS] or 0) * unit if len(part[1]) <= _MAX_DIGITS else MAX + 1
        fraction = (part[3] or "")[:_MAX_DIGITS]
        total += int(fraction or 0) * unit // 10 ** len(fraction)
        position = part.end()
    if not body or position < len(body):
        raise ValueError(_complaint(text, body))
    if total > MAX and not (sign < 0 and total == MAX + 1):
        raise ValueError(f"{text!r} is longer than the 292 years that a duration can hold")
    return sign * total


_MAX_DIGITS = 40


def _complaint(text: str, body: str) -> str:
    if body.replace(".", "", 1).isdigit():
        return f"{text!r} has no unit: write {text}s for seconds"
    return f"{text!r} is no duration: write numbers with units such as 30s, 500ms or 1h0m0s"


def format_duration(nanoseconds: int) -> str:
    """The text that Go prints for it; parse_duration() gives the number back."""
    if nanoseconds == 0:
        return "0s"
    sign = "-" if nanoseconds < 0 else ""
    rest = abs(nanoseconds)
    if rest < SECOND:
        for unit in ("ms", "µs", "ns"):
            if rest >= _UNITS[unit]:
                return f"{sign}{_decimal(rest, _UNITS[unit])}{unit}"
    hours, rest = divmod(rest, _UNITS["h"])
    minutes, rest = divmod(rest, _UNITS["m"])
    text = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{sign}{text}{_decimal(rest, SECOND)}s"


def _decimal(value: int, unit: int) -> str:
    whole, rest = divmod(value, unit)
    if not rest:
        return str(whole)
    return f"{whole}.{str(rest).rjust(len(str(unit)) - 1, '0').rstrip('0')}"
