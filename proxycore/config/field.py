"""What is known about one field of a configuration document."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

KUBE_PROXY = "KubeProxyConfiguration"
PROXYCORE = "ProxycoreConfiguration"
API_VERSIONS = {KUBE_PROXY: "kubeproxy.config.k8s.io/v1alpha1", PROXYCORE: "proxycore.io/v1alpha1"}

Type = Literal["bool", "int", "number", "duration", "text", "list", "bools", "any"]
"""`list`: texts.  `bools`: names with a boolean each.  `any`: whatever a mapping or list may hold."""

Treatment = Literal["obeyed", "differently", "ignored"]

Reload = Literal["live", "restart"]
"""When a change to the field takes effect in a proxy that runs: at once, or once it is started again."""


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """One value of a document, by its dotted path.

    `default` holds where nothing is written, null is written, or, if `zero_is_default`, the type's zero.
    `flags` are kube-proxy's names of it.  `note` says more about the treatment, in the documentation and, for
    an ignored field, in the warning.  `harmless`: values of an ignored field that change nothing anyway.
    `reload` means nothing for an ignored field.
    """

    path: str
    type: Type
    default: object
    document: str = KUBE_PROXY
    treatment: Treatment = "obeyed"
    note: str = ""
    flags: tuple[str, ...] = ()
    zero_is_default: bool = True
    harmless: tuple[object, ...] = ()
    reload: Reload = "restart"
    choices: tuple[str, ...] = ()
    minimum: int | None = None
    maximum: int | None = None

    @property
    def environment(self) -> str:
        """Name of the environment variable: `iptables.masqueradeBit` is PROXYCORE_IPTABLES_MASQUERADE_BIT."""
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", self.path.replace(".", "_"))
        return f"PROXYCORE_{words.upper()}"
