"""What is refused, with file, field and reason."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxycore.config import Config, Flag, load
from proxycore.config.fields import BY_PATH, ENVIRONMENT, FIELDS
from proxycore.errors import ConfigError

KUBE_PROXY = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
PROXYCORE = "apiVersion: proxycore.io/v1alpha1\nkind: ProxycoreConfiguration\n"

Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mode: kernelspace", "c.yaml:3: mode: 'kernelspace' is none of iptables, ipvs, nftables"),
        ("mode: 5", "c.yaml:3: mode: must be text, not 5"),
        ("mode: [ipvs]", "c.yaml:3: mode: must be text, not a list"),
        ("\niptables:\n  masqueradeBit: 32", "c.yaml:5: iptables.masqueradeBit: 32 is not within 0 to 31"),
        ("nftables: {masqueradeBit: -1}", "c.yaml:3: nftables.masqueradeBit: -1 is not within 0 to 31"),
        (
            "nftables: {masqueradeBit: true}",
            "c.yaml:3: nftables.masqueradeBit: must be a whole number, not true",
        ),
        (
            "iptables: {masqueradeAll: 'true'}",
            'c.yaml:3: iptables.masqueradeAll: must be true or false, not the text "true"',
        ),
        ("iptables: [x]", "c.yaml:3: iptables: must be a mapping"),
        (
            "iptables: {syncPeriod: 30}",
            "c.yaml:3: iptables.syncPeriod: 30 has no unit: write 30s for seconds",
        ),
        ("iptables: {syncPeriod: -1s}", "c.yaml:3: iptables.syncPeriod: -1s is negative"),
        (
            "ipvs: {syncPeriod: 1s, minSyncPeriod: 2s}",
            "c.yaml:3: ipvs.minSyncPeriod: 2s is longer than syncPeriod, 1s",
        ),
        ("ipvs: {udpTimeout: -1s}", "c.yaml:3: ipvs.udpTimeout: -1s is negative"),
        (
            "ipvs: {excludeCIDRs: [10.0.0.1]}",
            "c.yaml:3: ipvs.excludeCIDRs: '10.0.0.1' is no CIDR such as 10.0.0.0/8 or fd00::/8",
        ),
        (
            "ipvs: {scheduler: 'r r'}",
            "c.yaml:3: ipvs.scheduler: 'r r' is not the name of a scheduler such as rr",
        ),
        (
            "clusterCIDR: 10.0.0.0/8,11.0.0.0/8",
            "c.yaml:3: clusterCIDR: 10.0.0.0/8, 11.0.0.0/8: at most one CIDR of each family",
        ),
        (
            "clusterCIDR: 10.0.0.0/33",
            "c.yaml:3: clusterCIDR: '10.0.0.0/33' is no CIDR such as 10.0.0.0/8 or fd00::/8",
        ),
        (
            "clusterCIDR: 10.0.0.0/255.0.0.0",
            "c.yaml:3: clusterCIDR: '10.0.0.0/255.0.0.0' is no CIDR such as 10.0.0.0/8 or fd00::/8",
        ),
        (
            "nodePortAddresses: [Primary]",
            "c.yaml:3: nodePortAddresses: 'Primary' is neither a CIDR nor one of primary, localhost, all",
        ),
        (
            "nodePortAddresses: 10.0.0.0/8",
            'c.yaml:3: nodePortAddresses: must be a list of texts, not the text "10.0.0.0/8"',
        ),
        (
            "detectLocalMode: Magic",
            "c.yaml:3: detectLocalMode: 'Magic' is none of ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix",
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
            "c.yaml:4: detectLocal.bridgeInterface: 'a\"; drop' is no interface name: it must not hold /, : or blanks",
        ),
        (
            "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: sixteen-bytes-xx}",
            "c.yaml:4: detectLocal.bridgeInterface: 'sixteen-bytes-xx' is no interface name: at most 15 bytes",
        ),
        ("oomScoreAdj: -1001", "c.yaml:3: oomScoreAdj: -1001 is not within -1000 to 1000"),
        ("conntrack: {maxPerCore: -1}", "c.yaml:3: conntrack.maxPerCore: -1 is not within 0 to 2147483647"),
        ("conntrack: {udpTimeout: -1s}", "c.yaml:3: conntrack.udpTimeout: -1s is negative"),
        ("bindAddress: node-1", "c.yaml:3: bindAddress: 'node-1' is no IP address"),
        ("healthzBindAddress: localhost:80", "c.yaml:3: healthzBindAddress: 'localhost' is no IP address"),
        (
            "healthzBindAddress: '0.0.0.0:0'",
            "c.yaml:3: healthzBindAddress: '0.0.0.0:0' has no port within 1 to 65535",
        ),
        ("metricsBindAddress: ':80'", "c.yaml:3: metricsBindAddress: '' is no IP address"),
        ("hostnameOverride: a b", "c.yaml:3: hostnameOverride: 'a b' is no node name"),
        ("logging: {format: xml}", "c.yaml:3: logging.format: 'xml' is none of text, json"),
        ("clientConnection: {burst: -1}", "c.yaml:3: clientConnection.burst: -1 is less than 0"),
        (
            "featureGates: {X: 1}",
            "c.yaml:3: featureGates.X: must be true or false, not 1",
        ),
        ("---\ntakeover: now", "c.yaml:7: takeover: 'now' is none of auto, refuse, leave"),
        ("---\nbackend: ../x", "c.yaml:7: backend: '../x' is not the name of a plugin"),
        ("---\nsource: ':x'", "c.yaml:7: source: ':x' is not of the form NAME or NAME:ARGUMENT"),
        (
            "---\nbackendOptions: [x]",
            "c.yaml:7: backendOptions: must be a mapping of plugin names to their settings",
        ),
        (
            "---\nbackendOptions: {nft: 1}",
            "c.yaml:7: backendOptions: what stands under 'nft' must be a mapping of settings",
        ),
        ("---\nipFamilies: [IPv5]", "c.yaml:7: ipFamilies: 'IPv5' is neither IPv4 nor IPv6"),
        ("---\nverifyInterval: -1s", "c.yaml:7: verifyInterval: -1s is negative"),
        (
            "---\nlastKnownGood: {file: state}",
            "c.yaml:7: lastKnownGood.file: 'state' is neither an absolute path nor none",
        ),
        ("---\napiServer: {staleAfter: -1s}", "c.yaml:7: apiServer.staleAfter: -1s is negative"),
        (
            "---\napiServer: {master: 'ftp://x'}",
            "c.yaml:7: apiServer.master: 'ftp://x' is no URL such as https://10.0.0.1:6443",
        ),
        (
            "---\napiServer: {master: 'https://x:0'}",
            "c.yaml:7: apiServer.master: 'https://x:0' is no URL such as https://10.0.0.1:6443",
        ),
        (
            "---\napiServer: {master: 'https://me:secret@x'}",
            "c.yaml:7: apiServer.master: a URL must hold no user, query or fragment here, but scheme, host, port and "
            "path only",
        ),
        (
            "---\nobservers: {enabled: [a], disabled: [a]}",
            "c.yaml:7: observers.disabled: a: also in observers.enabled",
        ),
    ],
)
def test_bad_values_are_refused_with_file_field_and_reason(
    refuse: Callable[[str], str], text: str, message: str
) -> None:
    assert refuse(text) == message


def test_everything_wrong_is_said_at_once_in_the_order_of_the_lines(write: Write, tmp_path: Path) -> None:
    path = write(
        f"{KUBE_PROXY}future: 1\nclusterCIDR: y\nmode: x\n"
        "iptables: {masqueradeBit: 99, syncPeriod: 1, minSyncPeriod: 5m}\n"
        "featureGates:\n  New: true\n  Old: 'yes'\n"
    )
    other = write("a: [\n", "d.yaml")
    flags = {"oom-score-adj": "low", "takeover": Flag("later", "--set takeover"), "mdoe": "x"}
    with pytest.raises(ConfigError) as caught:
        load([path, other], flags, {"PROXYCORE_IP_FAMILIES": "IPv5"})
    error = caught.value
    assert (error.field, error.file) == ("clusterCIDR", str(path))
    assert [line.replace(f"{tmp_path}/", "") for line in error.lines] == [
        "c.yaml:4: clusterCIDR: 'y' is no CIDR such as 10.0.0.0/8 or fd00::/8",
        "c.yaml:5: mode: 'x' is none of iptables, ipvs, nftables",
        "c.yaml:6: iptables.masqueradeBit: 99 is not within 0 to 31",
        "c.yaml:6: iptables.syncPeriod: 1 has no unit: write 1s for seconds",
        'c.yaml:9: featureGates.Old: must be true or false, not the text "yes"',
        "d.yaml:2: is not YAML: while parsing a flow node, did not find expected node content",
        '--oom-score-adj: oomScoreAdj: must be a whole number, not the text "low"',
        "--set takeover: 'later' is none of auto, refuse, leave",
        "--mdoe: is no field and no flag; did you mean mode?",
        "PROXYCORE_IP_FAMILIES: ipFamilies: 'IPv5' is neither IPv4 nor IPv6",
    ]
    assert str(error) == "; ".join(error.lines)
    assert [line.replace(f"{tmp_path}/", "") for line in error.warnings] == [
        "c.yaml:3: future: is unknown and ignored",
        "c.yaml:7: featureGates.New: true has no effect: it is unknown here",
    ]


@pytest.mark.parametrize("wrong", ["mode: x", "---\nbackend: 5", "---\nbackend: ../x"])
def test_what_depends_on_a_value_that_cannot_be_read_is_not_said(
    read: Callable[[str], object], wrong: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(f"nftables: {{masqueradeBit: 3}}\nipvs: {{strictARP: true}}\n{wrong}")
    assert (len(caught.value.lines), caught.value.warnings) == (1, ())


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
            "is not YAML: while parsing a flow node, did not find expected node content",
        ),
    ],
)
def test_bad_files_are_refused(write: Write, content: str, message: str) -> None:
    path = write(content)
    with pytest.raises(ConfigError) as caught:
        load([path])
    assert re.match(rf"{re.escape(str(path))}(:[0-9]+)?: {re.escape(message)}", str(caught.value))
    assert caught.value.file == str(path)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    latin, large = tmp_path / "latin", tmp_path / "large"
    latin.write_bytes(b"a: 1\nb: \xe9\n")
    large.write_bytes(b"#" * ((1 << 20) + 1))
    for path, reason in (
        (tmp_path / "gone", "cannot be read: No such file or directory"),
        (tmp_path, "cannot be read: Is a directory"),
        (latin, "is not UTF-8 text"),
        (large, "is longer than the 1048576 bytes that are read"),
    ):
        with pytest.raises(ConfigError) as caught:
            load([path])
        line = ":2" if path is latin else ""
        assert str(caught.value) == f"{path}{line}: {reason}"


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
