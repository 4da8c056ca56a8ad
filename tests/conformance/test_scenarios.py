"""Every conformance scenario against every backend that is installed and can run on this host."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from importlib.metadata import entry_points

import pytest

from proxycore.testing import netns
from proxycore.testing.conformance import run_scenario, unheld
from proxycore.testing.scenario import load

BACKENDS = sorted(entry.name for entry in entry_points(group="proxycore.backends"))
PAIRS = [
    pytest.param(scenario, backend, id=f"{backend}-{scenario.id}")
    for backend in BACKENDS
    for scenario in load()
    if unheld(scenario, backend) is None
]

pytestmark = pytest.mark.root


@cache
def problems(backend: str) -> str:
    """Why this host cannot carry a backend, by the backend's own word; empty if it can."""
    with netns.Namespace("probe") as namespace:
        argv = [sys.executable, "-m", "proxycore", "backends", "--probe", "-o", "json"]
        done = namespace.run(argv, check=False)
    found = {entry["name"]: entry for entry in json.loads(done.stdout)}
    return "; ".join(found[backend].get("problems") or ()) if backend in found else "not listed"


@pytest.mark.parametrize(("scenario", "backend"), PAIRS)
def test_scenario(scenario, backend):
    if reason := problems(backend):
        pytest.skip(f"{backend}: {reason}")
    report = run_scenario(scenario, backend)
    assert report.passed, str(report)


def test_scenarios_are_distinct():
    ids = [scenario.id for scenario in load()]
    assert len(ids) == len(set(ids)) > 100
    assert all(scenario.source for scenario in load())
