"""Every conformance scenario against every backend that is installed and can run on this host."""

from __future__ import annotations

from functools import cache

import pytest

from proxycore.plugins import list_plugins
from proxycore.testing.conformance import VARIANTS, problems, run_scenario, unheld
from proxycore.testing.scenario import load

BACKENDS = [
    listed.found.name
    for listed in list_plugins()
    if listed.facts is None or listed.facts.state == "available"
]
RUNS = [(backend, variant) for backend in BACKENDS for variant in VARIANTS.get(backend, [""])]
PAIRS = [
    pytest.param(scenario, backend, variant, id="-".join(filter(None, (backend, variant, scenario.id))))
    for backend, variant in RUNS
    for scenario in load()
    if unheld(scenario, backend) is None
]

pytestmark = pytest.mark.root


@cache
def unfit(backend: str, variant: str) -> str:
    return problems(backend, VARIANTS.get(backend, {}).get(variant))


@pytest.mark.parametrize(("scenario", "backend", "variant"), PAIRS)
def test_scenario(scenario, backend, variant):
    if reason := unfit(backend, variant):
        pytest.skip(f"{backend}: {reason}")
    report = run_scenario(scenario, backend, options=VARIANTS.get(backend, {}).get(variant))
    assert report.passed, str(report)


def test_scenarios_are_distinct():
    ids = [scenario.id for scenario in load()]
    assert len(ids) == len(set(ids)) > 100
    assert all(scenario.source for scenario in load())
