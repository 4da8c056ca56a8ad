"""Configuration: kube-proxy's own file, ours beside it, environment variables and flags, resolved into one Config."""

from __future__ import annotations

from .dump import dump
from .load import load
from .model import Config, Conntrack, DetectLocalMode, Loaded, Takeover

__all__ = ["Config", "Conntrack", "DetectLocalMode", "Loaded", "Takeover", "dump", "load"]
