"""From what somebody wrote, in a file, an environment variable or a flag, to a field's value.

Values: bool, int, float, str, tuple of str, dict; durations are ints, in nanoseconds.
"""

from __future__ import annotations

import ipaddress
import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence

from .duration import format_duration, parse_duration
from .field import Field

_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})
_INT64 = 1 << 63
_CIDR = re.compile(r"[0-9a-fA-F.:]+/[0-9]{1,3}\Z")


def typed(field: Field, raw: object) -> object:
    """A value from a document, where types count: `"true"` is no boolean.  Limits are check()'s affair.

    Raises ValueError with a sentence for people.
    """
    match field.type:
        case "bool" if isinstance(raw, bool):
            return raw
        case "int" if isinstance(raw, int) and not isinstance(raw, bool):
            if not -_INT64 <= raw < _INT64:
                raise ValueError(f"{raw} is out of range")
            return raw
        case "number" if isinstance(raw, int | float) and not isinstance(raw, bool):
            if not -1e9 <= raw <= 1e9:
                raise ValueError(f"{raw} is out of range")
            return float(raw)
        case "text" if isinstance(raw, str):
            return raw.strip()
        case "duration":
            return _duration(field, raw)
        case "list" if isinstance(raw, list | tuple) and all(isinstance(part, str) for part in raw):
            return tuple(part.strip() for part in raw)
        case "bools" if isinstance(raw, Mapping) and all(isinstance(part, bool) for part in raw.values()):
            return dict(raw)
        case "any":
            return raw
    raise ValueError(f"must be {_WANTED[field.type]}, not {describe(raw)}")


def typed_text(field: Field, raw: object) -> object:
    """A value from a flag or an environment variable: text is understood as kube-proxy's flags understand it.

    Raises ValueError with a sentence for people.
    """
    return typed(field, _from_text(field, raw) if isinstance(raw, str) else raw)


def check(field: Field, value: object) -> None:
    """Limits and choices.  Raises ValueError with a sentence for people."""
    if field.choices and value not in field.choices and value != field.default:
        raise ValueError(f"{value!r} is none of {', '.join(field.choices)}")
    if isinstance(value, bool) or not isinstance(value, int):
        return
    if field.type == "duration" and value < 0:
        raise ValueError(f"{format_duration(value)} is negative")
    low, high = field.minimum, field.maximum
    if low is not None and high is not None and not low <= value <= high:
        raise ValueError(f"{value} is not within {low} to {high}")
    if low is not None and value < low:
        raise ValueError(f"{value} is less than {low}")


def is_zero(value: object) -> bool:
    """Is it what Go leaves in a field that nobody has set?"""
    return value in (None, False, 0, "", (), [], {})


def is_blank(value: object) -> bool:
    """Is there nothing but zero values, however deep?"""
    if isinstance(value, Mapping):
        return all(is_blank(part) for part in value.values())
    return is_zero(value) or value in ("0", "0s")


_WANTED = {
    "bool": "true or false",
    "int": "a whole number",
    "number": "a number",
    "duration": "a duration such as 30s or 1h0m0s",
    "text": "text",
    "list": "a list of texts",
    "bools": "a mapping of names to true or false",
}


def describe(raw: object) -> str:
    """What it is, in a few words."""
    if isinstance(raw, Mapping):
        return "a mapping"
    if isinstance(raw, list):
        return (
            "a list" if all(not isinstance(part, list | dict) for part in raw) else "a list of other things"
        )
    text = json.dumps(raw, default=str)
    kind = "the text " if isinstance(raw, str) else ""
    return f"{kind}{text}" if len(text) <= 60 else f"{kind}{text[:57]}..."


def _duration(field: Field, raw: object) -> int:
    if isinstance(raw, str):
        return parse_duration(raw.strip())
    if isinstance(raw, int) and not isinstance(raw, bool):
        # LoggingConfiguration.flushFrequency alone may be a bare number, of nanoseconds; kubeadm writes 0.
        if field.path == "logging.flushFrequency" and 0 <= raw < _INT64:
            return raw
        raise ValueError(f"{raw} has no unit: write {raw}s for seconds")
    raise ValueError(f"must be {_WANTED['duration']}, not {describe(raw)}")


def _from_text(field: Field, text: str) -> object:
    stripped = text.strip()
    match field.type:
        case "bool":
            if stripped in _TRUE:
                return True
            return False if stripped in _FALSE else text
        case "int" | "number":
            try:
                return int(stripped) if field.type == "int" else float(stripped)
            except ValueError:
                return text
        case "list":
            return [part.strip() for part in stripped.split(",") if part.strip()]
        case "bools":
            return _pairs(stripped)
        case "any":
            return _json(stripped)
    return text


def _pairs(text: str) -> object:
    """`A=true,B=false`, as --feature-gates takes it."""
    found: dict[str, object] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, sign, value = part.partition("=")
        if not sign or value.strip() not in _TRUE | _FALSE:
            raise ValueError(f"{part!r} is not of the form Name=true or Name=false")
        found[name.strip()] = value.strip() in _TRUE
    return found


def _json(text: str) -> object:
    try:
        return json.loads(text) if text else {}
    except (ValueError, RecursionError):
        raise ValueError('must be JSON, such as {"name": {"setting": 1}}') from None


def parse_cidr(text: str) -> str:
    """The canonical text of a CIDR, without host bits.  Raises ValueError with a sentence for people."""
    if not _CIDR.match(text):
        raise ValueError(f"{text!r} is no CIDR such as 10.0.0.0/8 or fd00::/8")
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError:
        raise ValueError(f"{text!r} is no CIDR such as 10.0.0.0/8 or fd00::/8") from None


def parse_address(text: str) -> str:
    """The canonical text of an address.  Raises ValueError with a sentence for people."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{text!r} is no IP address") from None
    if "%" in text:
        raise ValueError(f"{text!r} must not have a zone")
    return str(address)


def parse_endpoint(text: str, default_port: int) -> str:
    """`address:port` in canonical form; a bare address gets `default_port`.  Raises ValueError."""
    try:
        return join_host_port(parse_address(text.strip("[]")), default_port)
    except ValueError:
        host, _, port = text.rpartition(":")
    if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
        raise ValueError(f"{text!r} is not of the form address:port, or [address]:port for IPv6")
    if not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65535):
        raise ValueError(f"{text!r} has no port within 1 to 65535")
    return join_host_port(parse_address(host.strip("[]")), int(port))


def parse_url(text: str) -> str:
    """An http or https URL as it stands; a bare `host` or `host:port` gets https.  Raises ValueError."""
    url = text if "://" in text else f"https://{text}"
    try:
        parts = urllib.parse.urlsplit(url)
        held = parts.username is not None or bool(parts.query or parts.fragment)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        held = sound = False
    if held:  # which may be a secret: it is not repeated
        raise ValueError(
            "a URL must hold no user, query or fragment here, but scheme, host, port and path only"
        )
    if not sound or not text.isprintable() or any(char.isspace() for char in text):
        raise ValueError(f"{text!r} is no URL such as https://10.0.0.1:6443")
    return url


def join_host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def check_interface(name: str) -> None:
    """Refuse what the kernel refuses as an interface's name.  Raises ValueError."""
    if not 1 <= len(name.encode("utf-8", "replace")) <= 15:
        raise ValueError(f"{name!r} is no interface name: at most 15 bytes")
    if name in (".", "..") or any(char in "/:" or char.isspace() or not char.isprintable() for char in name):
        raise ValueError(f"{name!r} is no interface name: it must not hold /, : or blanks")


def families(cidrs: Sequence[str]) -> list[str]:
    """The family of each CIDR."""
    return ["IPv6" if ":" in cidr else "IPv4" for cidr in cidrs]
