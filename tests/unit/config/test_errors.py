"""What is refused, with file, field and reason."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxycore.config import Config, load
from proxycore.config.fields import BY_PATH, ENVIRONMENT, FIELDS
from proxycore.errors import ConfigError

KUBE_PROXY = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
PROXYCORE = "apiVersion: proxycore.io/v1alpha1\nkind: ProxycoreConfiguration\n"

Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mode: kernelspace", "mode: 'kernelspace' is none of iptables, ipvs, nftables (line 3)"),
        ("mode: 5", "mode: must be text, not 5 (line 3)"),
        ("mode: [ipvs]", "mode: must be text, not a list (line 3)"),
        ("\niptables:\n  masqueradeBit: 32", "iptables.masqueradeBit: 32 is not within 0 to 31 (line 5)"),
        ("nftables: {masqueradeBit: -1}", "nftables.masqueradeBit: -1 is not within 0 to 31 (line 3)"),
        (
            "nftables: {masqueradeBit: true}",
            "nftables.masqueradeBit: must be a whole number, not true (line 3)",
        ),
        (
            "iptables: {masqueradeAll: 'true'}",
            'iptables.masqueradeAll: must be true or false, not the text "true" (line 3)',
        ),
        ("iptables: [x]", "iptables: must be a mapping (line 3)"),
        ("iptables: {syncPeriod: 30}", "iptables.syncPeriod: 30 has no unit: write 30s for seconds (line 3)"),
        ("iptables: {syncPeriod: -1s}", "iptables.syncPeriod: -1s is negative (line 3)"),
        (
            "ipvs: {syncPeriod: 1s, minSyncPeriod: 2s}",
            "ipvs.minSyncPeriod: 2s is longer than syncPeriod, 1s (line 3)",
        ),
        ("ipvs: {udpTimeout: -1s}", "ipvs.udpTimeout: -1s is negative (line 3)"),
        (
            "ipvs: {excludeCIDRs: [10.0.0.1]}",
            "ipvs.excludeCIDRs: '10.0.0.1' is no CIDR such as 10.0.0.0/8 or fd00::/8 (line 3)",
        ),
        (
            "ipvs: {scheduler: 'r r'}",
            "ipvs.scheduler: 'r r' is not the name of a scheduler such as rr (line 3)",
        ),
        (
            "clusterCIDR: 10.0.0.0/8,11.0.0.0/8",
            "clusterCIDR: 10.0.0.0/8, 11.0.0.0/8: at most one CIDR of each family (line 3)",
        ),
        (
            "clusterCIDR: 10.0.0.0/33",
            "clusterCIDR: '10.0.0.0/33' is no CIDR such as 10.0.0.0/8 or fd00::/8 (line 3)",
        ),
        (
            "clusterCIDR: 10.0.0.0/255.0.0.0",
            "clusterCIDR: '10.0.0.0/255.0.0.0' is no CIDR such as 10.0.0.0/8 or fd00::/8 (line 3)",
        ),
        (
            "nodePortAddresses: [Primary]",
            "nodePortAddresses: 'Primary' is neither a CIDR nor one of primary, localhost, all (line 3)",
        ),
        (
            "nodePortAddresses: 10.0.0.0/8",
            'nodePortAddresses: must be a list of texts, not the text "10.0.0.0/8" (line 3)',
        ),
        (
            "detectLocalMode: Magic",
            "detectLocalMode: 'Magic' is none of ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix (line 3)",
        ),
        (
            "detectLocalMode: BridgeInterface",
            "detectLocal.bridgeInterface: is required by detectLocalMode BridgeInterface",
        ),
        (
            "detectLocalMode: InterfaceNamePrefix",
            "detectLocal.interfaceNamePrefix: is required by detectLocalMode InterfaceNamePrefix",
        ),
        (
            "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: 'a\"; drop'}",
            "detectLocal.bridgeInterface: 'a\"; drop' is no interface name: it must not hold /, : or blanks (line 4)",
        ),
        (
            "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: sixteen-bytes-xx}",
            "detectLocal.bridgeInterface: 'sixteen-bytes-xx' is no interface name: at most 15 bytes (line 4)",
        ),
        ("oomScoreAdj: -1001", "oomScoreAdj: -1001 is not within -1000 to 1000 (line 3)"),
        ("conntrack: {maxPerCore: -1}", "conntrack.maxPerCore: -1 is not within 0 to 2147483647 (line 3)"),
        ("conntrack: {udpTimeout: -1s}", "conntrack.udpTimeout: -1s is negative (line 3)"),
        ("bindAddress: node-1", "bindAddress: 'node-1' is no IP address (line 3)"),
        ("healthzBindAddress: localhost:80", "healthzBindAddress: 'localhost' is no IP address (line 3)"),
        (
            "healthzBindAddress: '0.0.0.0:0'",
            "healthzBindAddress: '0.0.0.0:0' has no port within 1 to 65535 (line 3)",
        ),
        ("metricsBindAddress: ':80'", "metricsBindAddress: '' is no IP address (line 3)"),
        ("hostnameOverride: a b", "hostnameOverride: 'a b' is no node name (line 3)"),
        ("logging: {format: xml}", "logging.format: 'xml' is none of text, json (line 3)"),
        ("clientConnection: {burst: -1}", "clientConnection.burst: -1 is less than 0 (line 3)"),
        (
            "featureGates: {X: 1}",
            "featureGates: must be a mapping of names to true or false, not a mapping (line 3)",
        ),
        ("---\ntakeover: now", "takeover: 'now' is none of auto, refuse, leave (line 7)"),
        ("---\nbackend: ../x", "backend: '../x' is not the name of a plugin (line 7)"),
        ("---\nsource: ':x'", "source: ':x' is not of the form NAME or NAME:ARGUMENT (line 7)"),
        (
            "---\nbackendOptions: [x]",
            "backendOptions: must be a mapping of plugin names to their settings (line 7)",
        ),
        (
            "---\nbackendOptions: {nft: 1}",
            "backendOptions: what stands under 'nft' must be a mapping of settings (line 7)",
        ),
        ("---\nipFamilies: [IPv5]", "ipFamilies: 'IPv5' is neither IPv4 nor IPv6 (line 7)"),
        ("---\nverifyInterval: -1s", "verifyInterval: -1s is negative (line 7)"),
        (
            "---\nobservers: {enabled: [a], disabled: [a]}",
            "observers.disabled: a: also in observers.enabled (line 7)",
        ),
    ],
)
def test_bad_values_are_refused_with_file_field_and_reason(
    refuse: Callable[[str], str], text: str, message: str
) -> None:
    where = "" if message.split(": ")[1].startswith("is required") else "c.yaml: "
    assert refuse(text) == f"{where}{message}"


def test_everything_wrong_is_said_at_once(write: Write, tmp_path: Path) -> None:
    path = write(
        f"{KUBE_PROXY}mode: x\nclusterCIDR: y\niptables: {{masqueradeBit: 99, syncPeriod: 1, minSyncPeriod: 5m}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load([path], {"oom-score-adj": "low"}, {"PROXYCORE_TAKEOVER": "now"})
    assert (caught.value.field, caught.value.file) == ("mode", str(path))
    assert str(caught.value).replace(f"{tmp_path}/", "") == (
        "c.yaml: mode: 'x' is none of iptables, ipvs, nftables (line 3); "
        "c.yaml: iptables.masqueradeBit: 99 is not within 0 to 31 (line 5); "
        "c.yaml: iptables.syncPeriod: 1 has no unit: write 1s for seconds (line 5); "
        "takeover: 'now' is none of auto, refuse, leave (PROXYCORE_TAKEOVER); "
        'oomScoreAdj: must be a whole number, not the text "low" (--oom-score-adj); '
        "c.yaml: clusterCIDR: 'y' is no CIDR such as 10.0.0.0/8 or fd00::/8 (line 4)"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no configuration"),
        ("- a\n", "is not a mapping with apiVersion and kind"),
        (
            "kind: ConfigMap\napiVersion: v1\n",
            "kind: is apiVersion 'v1', kind 'ConfigMap'; wanted is kubeproxy",
        ),
        (
            "apiVersion: kubeproxy.config.k8s.io/v1alpha2\nkind: KubeProxyConfiguration\n",
            "apiVersion: is apiVersion 'kubeproxy.config.k8s.io/v1alpha2'",
        ),
        (f"{PROXYCORE}---\n{PROXYCORE}", "kind: a second ProxycoreConfiguration; the first one stands at"),
        (
            f"{PROXYCORE}a: [\n",
            "is not YAML: while parsing a flow node, did not find expected node content (line 4)",
        ),
    ],
)
def test_bad_files_are_refused(write: Write, content: str, message: str) -> None:
    path = write(content)
    with pytest.raises(ConfigError) as caught:
        load([path])
    assert str(caught.value).startswith(f"{path}: {message}")
    assert caught.value.file == str(path)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    latin, large = tmp_path / "latin", tmp_path / "large"
    latin.write_bytes(b"a: 1\nb: \xe9\n")
    large.write_bytes(b"#" * ((1 << 20) + 1))
    for path, reason in (
        (tmp_path / "gone", "cannot be read: No such file or directory"),
        (tmp_path, "cannot be read: Is a directory"),
        (latin, "is not UTF-8 text (line 2)"),
        (large, "is longer than the 1048576 bytes that are read"),
    ):
        with pytest.raises(ConfigError) as caught:
            load([path])
        assert str(caught.value) == f"{path}: {reason}"


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["10.0.0.0/8", "::1", "1.2.3.4:5", "30s", "0s", "nftables", "all", "primary", "BridgeInterface"]
    )
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
SECTION_NAMES = sorted({field.path.partition(".")[0] for field in FIELDS})
LEAF_NAMES = sorted({field.path.rpartition(".")[2] for field in FIELDS})
BODIES = st.dictionaries(
    st.sampled_from(SECTION_NAMES) | st.text(max_size=8),
    ANYTHING | st.dictionaries(st.sampled_from(LEAF_NAMES) | st.text(max_size=8), ANYTHING, max_size=4),
    max_size=6,
)
HEADS = st.sampled_from([KUBE_PROXY, PROXYCORE])


@given(head=HEADS, body=BODIES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_mapping_is_a_configuration_or_a_config_error(
    tmp_path: Path, head: str, body: dict[str, object]
) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(head + yaml.safe_dump(body))
    with contextlib.suppress(ConfigError):
        loaded = load([path])
        assert msgspec.convert(msgspec.to_builtins(loaded.config), Config) is not None


@given(environ=st.dictionaries(st.sampled_from(sorted(ENVIRONMENT)), st.text(max_size=20), max_size=5))
def test_any_environment_is_a_configuration_or_a_config_error(environ: dict[str, str]) -> None:
    with contextlib.suppress(ConfigError):
        load([], {}, environ)


@given(flags=st.dictionaries(st.sampled_from(sorted(BY_PATH)), ANYTHING, max_size=5))
@settings(deadline=None)
def test_any_flags_are_a_configuration_or_a_config_error(flags: dict[str, object]) -> None:
    with contextlib.suppress(ConfigError):
        load([], flags)
