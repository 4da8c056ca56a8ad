"""Configuration: kube-proxy's own file, ours beside it, environment variables and flags, resolved into one Config."""

from __future__ import annotations

from .dump import dump
from .load import Flag, load
from .model import Config, Conntrack, DetectLocalMode, Loaded, Takeover

__all__ = ["Config", "Conntrack", "DetectLocalMode", "Flag", "Loaded", "Takeover", "dump", "load"]
