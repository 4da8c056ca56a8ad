"""The configuration in force as /configz shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .duration import format_duration
from .field import API_VERSIONS, KUBE_PROXY
from .fields import FIELDS
from .model import Loaded

KEYS = {KUBE_PROXY: "kubeproxy.config.k8s.io"}
OWN_KEY = "proxycore.io"


def configz(loaded: Loaded) -> Mapping[str, Any]:
    """Both documents, nested as in a file and ready for JSON, defaults included; by kube-proxy's key and by ours."""
    found: dict[str, Any] = {}
    for document, version in API_VERSIONS.items():
        found[KEYS.get(document, OWN_KEY)] = {"apiVersion": version, "kind": document}
    for field in FIELDS:
        place = found[KEYS.get(field.document, OWN_KEY)]
        *sections, name = field.path.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        value = loaded.values.get(field.path, field.default)
        if field.type == "duration" and isinstance(value, int):
            value = format_duration(value)
        place[name] = list(value) if isinstance(value, tuple) else value
    return found
