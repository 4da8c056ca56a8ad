"""What has no effect is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from proxycore.config import Config, Loaded, load
from proxycore.config.field import Field
from proxycore.config.fields import FIELDS

Read = Callable[[str], Loaded]
Warnings = Callable[[str], list[str]]
Changed = Callable[[Config], dict[str, object]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "iptables: {masquradeBit: 1}",
            ["c.yaml:3: iptables.masquradeBit: is unknown and ignored; did you mean iptables.masqueradeBit?"],
        ),
        ("future: {a: 1}", ["c.yaml:3: future: is unknown and ignored"]),
        (
            "takeover: auto",
            ["c.yaml:3: takeover: is unknown and ignored; it belongs into a ProxycoreConfiguration"],
        ),
        (
            "iptables.masqueradeBit: 1",
            [
                "c.yaml:3: iptables.masqueradeBit: is unknown and ignored; did you mean iptables.masqueradeBit?"
            ],
        ),
        (
            "hostnameOverride: a\nhostnameOverride: b",
            ["c.yaml:4: key 'hostnameOverride' stands twice in one mapping; the last one counts"],
        ),
        (
            "enableProfiling: true",
            ["c.yaml:3: enableProfiling: has no effect: there are no Go profiles to serve"],
        ),
        (
            "logging: {flushFrequency: 1000000000}",
            ["c.yaml:3: logging.flushFrequency: has no effect: each line is written at once"],
        ),
        (
            "logging: {flushFrequency: 5s}\nconfigSyncPeriod: 15m\nclientConnection: {contentType: application/json}",
            [],
        ),
        (
            "featureGates: {NFTablesNetlink: true, KubeProxyIPVS: false, New: true, ServiceTrafficDistribution: false}",
            [
                "c.yaml:3: featureGates.KubeProxyIPVS: false has no effect: no gate holds a backend back",
                "c.yaml:3: featureGates.New: true has no effect: it is unknown here",
                "c.yaml:3: featureGates.ServiceTrafficDistribution: false has no effect: settled",
            ],
        ),
        (
            "clusterCIDR: 10.0.0.0/8\ndetectLocalMode: BridgeInterface\n"
            "detectLocal: {bridgeInterface: b, interfaceNamePrefix: c}",
            [
                "c.yaml:5: detectLocal.interfaceNamePrefix: has no effect: detectLocalMode is BridgeInterface",
                "c.yaml:3: clusterCIDR: has no effect: detectLocalMode is BridgeInterface",
            ],
        ),
        (
            "clientConnection: {kubeconfig: /k, qps: 1, acceptContentTypes: 'application/vnd.kubernetes.protobuf,"
            "application/json'}\noomScoreAdj: -999\nhealthzBindAddress: ''\nconntrack: {min: 0}",
            [],
        ),
        (
            "clientConnection: {contentType: application/cbor}",
            ["c.yaml:3: clientConnection.contentType: has no effect: JSON is always used"],
        ),
    ],
)
def test_what_has_no_effect_is_named(warnings: Warnings, text: str, expected: list[str]) -> None:
    assert warnings(text) == expected


def some_value(field: Field) -> object:
    """A valid value that is not the default."""
    special: dict[str, object] = {
        "bindAddress": "10.0.0.1",
        "healthzBindAddress": "10.0.0.1:1",
        "metricsBindAddress": "10.0.0.1:1",
        "clusterCIDR": "10.0.0.0/8",
        "nodePortAddresses": ["10.0.0.0/8"],
        "ipvs.excludeCIDRs": ["10.0.0.0/8"],
        "ipFamilies": ["IPv4"],
        "iptables.syncPeriod": "40s",
        "backendOptions": {"iptables": {"x": 1}},
        "lastKnownGood.file": "/x",
    }
    if field.path in special:
        return special[field.path]
    if field.choices:
        return next(
            choice for choice in field.choices if choice not in (field.default, "iptables", "BridgeInterface")
        )
    by_type: dict[str, object] = {
        "bool": not field.default,
        "int": 7,
        "number": 7.5,
        "duration": "20s",
        "text": "x",
        "list": ["x"],
        "bools": {"NFTablesNetlink": False},
        "any": {"x": {"y": 1}},
    }
    return by_type[field.type]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.path)
def test_every_field_changes_something_or_is_named_in_a_warning(
    changed: Changed, read: Read, field: Field
) -> None:
    value: object = some_value(field)
    for part in reversed(field.path.split(".")):
        value = {part: value}
    text = yaml.safe_dump(value)
    loaded = read(text if field.document == "KubeProxyConfiguration" else f"---\n{text}")
    named = any(field.path in warning for warning in loaded.warnings)
    # Most gates are settled, whatever they say.
    ignored = field.treatment == "ignored" or field.path == "featureGates"
    assert named == (ignored or not changed(loaded.config))


def test_the_example_of_kubeadms_file_is_read_without_a_word() -> None:
    assert load([Path(__file__).parents[3] / "examples" / "kubeproxy-config.yaml"]).warnings == ()
