"""Every field that the two configuration documents know.

The one table from which decoding, environment variables, warnings, `config show` and documentation follow.
"""

from __future__ import annotations

from .duration import SECOND
from .field import PROXYCORE, Field, Type
from .kubeproxy import KUBE_PROXY_FIELDS


def _ours(path: str, type_: Type, default: object, note: str, **more: object) -> Field:
    return Field(path=path, type=type_, default=default, note=note, document=PROXYCORE, **more)  # type: ignore[arg-type]


PROXYCORE_FIELDS: tuple[Field, ...] = (
    _ours(
        "backend", "text", "", "name of the backend plugin, any that is installed; empty: what `mode` says"
    ),
    _ours("backendOptions", "any", {}, "a backend's own settings, under the backend's name"),
    _ours(
        "source",
        "text",
        "kubernetes",
        "where Services come from: `file:DIR` or `recording:FILE`; `kubernetes` is planned",
    ),
    _ours(
        "takeover",
        "text",
        "auto",
        "another proxy's rules: replace them once ours are in force, refuse to start, leave them",
        choices=("auto", "refuse", "leave"),
    ),
    _ours(
        "verifyInterval",
        "duration",
        SECOND,
        "how often the backend looks whether its rules are still there; 0s: never",
        zero_is_default=False,
    ),
    _ours("ipFamilies", "list", (), "`IPv4`, `IPv6`; empty: what the host can do"),
    _ours("observers.enabled", "list", (), "only these observers run; empty: all that are installed"),
    _ours("observers.disabled", "list", (), "these observers do not run"),
    _ours("observers.options", "any", {}, "an observer's own settings, under the observer's name"),
)

FIELDS: tuple[Field, ...] = KUBE_PROXY_FIELDS + PROXYCORE_FIELDS
BY_PATH: dict[str, Field] = {field.path: field for field in FIELDS}
ENVIRONMENT: dict[str, Field] = {field.environment: field for field in FIELDS}
