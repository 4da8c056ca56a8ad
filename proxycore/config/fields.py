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
        "where Services come from: `kubernetes`, `kubernetes:CONTEXT`, `file:DIR` or `recording:FILE`",
    ),
    _ours("apiServer.context", "text", "", "context of the kubeconfig; empty: its current one"),
    _ours(
        "apiServer.master",
        "text",
        "",
        "URL of the API server, which overrules the kubeconfig's; kube-proxy's flag `master`",
        flags=("master",),
    ),
    _ours(
        "apiServer.staleAfter",
        "duration",
        60 * SECOND,
        "so long the source may be out of reach before `/readyz` says so; 0s: at once",
        zero_is_default=False,
        reload="live",
    ),
    _ours(
        "lastKnownGood.file",
        "text",
        "",
        "where the last known good state is saved; empty: `/var/lib/proxycore/state` for the source `kubernetes`, "
        "nowhere for others; `none`: nowhere",
    ),
    _ours(
        "lastKnownGood.wait",
        "duration",
        SECOND,
        "how long a start waits for the source before it serves what was saved",
        zero_is_default=False,
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
        reload="live",
    ),
    _ours("ipFamilies", "list", (), "`IPv4`, `IPv6`; empty: what the host can do"),
    _ours("observers.enabled", "list", (), "only these observers run; empty: all that are installed"),
    _ours("observers.disabled", "list", (), "these observers do not run"),
    _ours("observers.options", "any", {}, "an observer's own settings, under the observer's name"),
)

FIELDS: tuple[Field, ...] = KUBE_PROXY_FIELDS + PROXYCORE_FIELDS
BY_PATH: dict[str, Field] = {field.path: field for field in FIELDS}
ENVIRONMENT: dict[str, Field] = {field.environment: field for field in FIELDS}
