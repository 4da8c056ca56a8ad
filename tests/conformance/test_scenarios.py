"""Every conformance scenario against every backend that is installed and can run on this host."""

from __future__ import annotations

import json
import sys
from functools import cache

import pytest

from proxycore.plugins import list_plugins
from proxycore.testing import netns
from proxycore.testing.conformance import VARIANTS, run_scenario, unheld
from proxycore.testing.scenario import load

BACKENDS = [
    listed.found.name
    for listed in list_plugins()
    if listed.facts is None or listed.facts.state == "available"
]
RUNS = [
    (backend, options, f"{backend}-{variant}" if variant else backend)
    for backend in BACKENDS
    for variant, options in VARIANTS.get(backend, {"": None}).items()
]
PAIRS = [
    pytest.param(scenario, backend, options, id=f"{name}-{scenario.id}")
    for backend, options, name in RUNS
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
    (found,) = (entry for entry in json.loads(done.stdout) if entry["name"] == backend)
    return "" if found["state"] == "fit" else "; ".join(found["problems"]) or found["summary"]


@pytest.mark.parametrize(("scenario", "backend", "options"), PAIRS)
def test_scenario(scenario, backend, options):
    if reason := problems(backend):
        pytest.skip(f"{backend}: {reason}")
    report = run_scenario(scenario, backend, options=options)
    assert report.passed, str(report)


def test_scenarios_are_distinct():
    ids = [scenario.id for scenario in load()]
    assert len(ids) == len(set(ids)) > 100
    assert all(scenario.source for scenario in load())
