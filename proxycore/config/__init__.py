"""Configuration: kube-proxy's own file, ours beside it, environment variables and flags, resolved into one Config."""

from __future__ import annotations

from .difference import Difference, FieldChange, difference, merged
from .documents import fingerprint
from .dump import dump
from .load import Flag, load
from .model import Config, Conntrack, DetectLocalMode, Loaded, Takeover

__all__ = [
    "Config",
    "Conntrack",
    "DetectLocalMode",
    "Difference",
    "FieldChange",
    "Flag",
    "Loaded",
    "Takeover",
    "difference",
    "dump",
    "fingerprint",
    "load",
    "merged",
]
