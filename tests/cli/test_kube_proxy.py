"""`proxyctl kube-proxy`: kube-proxy's command line, word by word."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from proxycore import __version__
from proxycore.cli.kubeflags import FLAGS, SHAPES
from proxycore.cli.kubeproxy import options_of_line, read_line
from proxycore.cli.pflags import Given, parse
from proxycore.config import Loaded
from proxycore.config.fields import FIELDS
from proxycore.errors import ConfigError
from proxycore.options import RunOptions

from .conftest import Installed, Run

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
OURS = "apiVersion: proxycore.io/v1alpha1\nkind: ProxycoreConfiguration\n"
DATA = Path(__file__).parents[1] / "unit" / "config" / "data"


def options(*arguments: str, environ: Mapping[str, str] | None = None) -> RunOptions:
    return options_of_line(read_line(arguments), environ or {})


def loaded(*arguments: str, environ: Mapping[str, str] | None = None) -> Loaded:
    return options(*arguments, environ=environ).config


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(*arguments)
    return str(caught.value).removesuffix("; see `proxyctl kube-proxy --help`")


# -- how flags are written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["--config=a"], [("config", "a")]),
        (["--config", "a"], [("config", "a")]),
        (["--config="], [("config", "")]),
        (["--config", ""], [("config", "")]),
        (["--config", "--v"], [("config", "--v")]),
        (["--config=a=b"], [("config", "a=b")]),
        (["-v=2"], [("v", "2")]),
        (["-v", "2"], [("v", "2")]),
        (["-v2"], [("v", "2")]),
        (["--v=2"], [("v", "2")]),
        (["-hv=2"], [("help", "true"), ("v", "2")]),
        (["-hv", "2"], [("help", "true"), ("v", "2")]),
        (["--masquerade-all"], [("masquerade-all", "true")]),
        (["--masquerade-all=false"], [("masquerade-all", "false")]),
        (["--masquerade-all="], [("masquerade-all", "")]),
        (["--proxy_mode=ipvs"], [("proxy-mode", "ipvs")]),
        (["--version"], [("version", "true")]),
        (["--version=raw"], [("version", "raw")]),
        (["--oom-score-adj", "-5"], [("oom-score-adj", "-5")]),
        (["--v=1", "--v=2"], [("v", "1"), ("v", "2")]),
    ],
)
def test_flags_are_read_as_pflag_reads_them(words: list[str], flags: list[tuple[str, str]]) -> None:
    parsed = parse(words, SHAPES)
    assert [(name, value) for name, value, _ in parsed.flags] == flags
    assert parsed.rest == ()


def test_what_is_no_flag_is_left_over() -> None:
    parsed = parse(["x", "-", "--cleanup", "false", "--", "--v=2"], SHAPES)
    assert parsed.flags == (Given("cleanup", "true", "--cleanup"),)
    assert parsed.rest == ("x", "-", "false", "--v=2")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--iptables-syncperiod=1s"], "--iptables-syncperiod: there is no such flag; did you mean --iptables-sync-period?"),
        (["--zzz"], "--zzz: there is no such flag"),
        (["-config=x"], "-c in -config=x: there is no such flag; did you mean --config?"),
        (["-x"], "-x in -x: there is no such flag"),
        (["--config"], "--config: needs a value"),
        (["-v"], "-v: needs a value"),
        (["--=x"], "--=x: is no flag"),
        (["---v=2"], "---v=2: is no flag"),
        (["--masquerade-all", "false"], "'false': kube-proxy takes flags only"),
        (["--masquerade-all=yes"], "--masquerade-all=yes: must be true or false"),
        (["--log-text-split-stream=2"], "--log-text-split-stream=2: must be true or false"),
        (["--logtostderr=x"], "--logtostderr=x: must be true or false"),
        (["--version=v1.30.0"], "--version=v1.30.0: must be true, false or raw"),
        (["--hostname-override= "], "--hostname-override: holds nothing but blanks"),
        (["--healthz-port=x"], "--healthz-port: 'x' is no port within 0 to 65535"),
        (["--metrics-port=65536"], "--metrics-port: '65536' is no port within 0 to 65535"),
        (["--vmodule=a"], "--vmodule: 'a' is not of the form PATTERN=N"),
        (["-v=x"], '-v: logging.verbosity: must be a whole number, not the text "x"'),
        (["--oom-score-adj=2000"], "--oom-score-adj: oomScoreAdj: 2000 is not within -1000 to 1000"),
        (["--hostname-override=$(NODE_NAME)"], "--hostname-override: hostnameOverride: '$(node_name)' is no node name"),
        (["--healthz-bind-address=x", "--healthz-port=1"], "--healthz-bind-address: healthzBindAddress: 'x' has no port within"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_as_it_was_written(words: list[str], said: str) -> None:
    message = refusal(*words)
    assert message.startswith(said)
    assert "\n" not in message


def test_blank_arguments_are_let_pass() -> None:
    assert loaded("", "--v=2", "").config.log_verbosity == 2


# -- every flag reaches its field -----------------------------------------------------------------------------------

VALUES: dict[str, tuple[str, str, object]] = {
    "feature-gates": ("AllowServiceExternalIPs=false", "featureGates", {"AllowServiceExternalIPs": False}),
    "kubeconfig": ("/k", "clientConnection.kubeconfig", "/k"),
    "kube-api-content-type": ("application/json", "clientConnection.contentType", "application/json"),
    "kube-api-qps": ("7.5", "clientConnection.qps", 7.5),
    "kube-api-burst": ("20", "clientConnection.burst", 20),
    "logging-format": ("json", "logging.format", "json"),
    "log-flush-frequency": ("1s", "logging.flushFrequency", 10**9),
    "v": ("4", "logging.verbosity", 4),
    "vmodule": (
        "a*=1,b=2",
        "logging.vmodule",
        [{"filePattern": "a*", "verbosity": 1}, {"filePattern": "b", "verbosity": 2}],
    ),
    "log-text-split-stream": ("true", "logging.options", {"text": {"splitStream": True}}),
    "log-json-split-stream": ("true", "logging.options", {"json": {"splitStream": True}}),
    "log-text-info-buffer-size": ("1M", "logging.options", {"text": {"infoBufferSize": "1M"}}),
    "log-json-info-buffer-size": ("1M", "logging.options", {"json": {"infoBufferSize": "1M"}}),
    "hostname-override": ("Node-1", "hostnameOverride", "Node-1"),
    "bind-address": ("10.0.0.1", "bindAddress", "10.0.0.1"),
    "healthz-bind-address": ("10.0.0.1:1", "healthzBindAddress", "10.0.0.1:1"),
    "healthz-port": ("1234", "healthzBindAddress", "0.0.0.0:1234"),
    "metrics-bind-address": ("10.0.0.1", "metricsBindAddress", "10.0.0.1:10249"),
    "metrics-port": ("1234", "metricsBindAddress", "127.0.0.1:1234"),
    "bind-address-hard-fail": ("true", "bindAddressHardFail", True),
    "profiling": ("true", "enableProfiling", True),
    "show-hidden-metrics-for-version": ("1.30", "showHiddenMetricsForVersion", "1.30"),
    "proxy-mode": ("ipvs", "mode", "ipvs"),
    "iptables-masquerade-bit": ("3", "iptables.masqueradeBit", 3),
    "masquerade-all": ("true", "nftables.masqueradeAll", True),
    "iptables-localhost-nodeports": ("false", "iptables.localhostNodePorts", False),
    "iptables-sync-period": ("20s", "nftables.syncPeriod", 20 * 10**9),
    "iptables-min-sync-period": ("2s", "iptables.minSyncPeriod", 2 * 10**9),
    "ipvs-sync-period": ("20s", "ipvs.syncPeriod", 20 * 10**9),
    "ipvs-min-sync-period": ("2s", "ipvs.minSyncPeriod", 2 * 10**9),
    "ipvs-scheduler": ("lc", "ipvs.scheduler", "lc"),
    "ipvs-exclude-cidrs": ("10.0.0.0/8,11.0.0.0/8", "ipvs.excludeCIDRs", ("10.0.0.0/8", "11.0.0.0/8")),
    "ipvs-strict-arp": ("true", "ipvs.strictARP", True),
    "ipvs-tcp-timeout": ("1s", "ipvs.tcpTimeout", 10**9),
    "ipvs-tcpfin-timeout": ("1s", "ipvs.tcpFinTimeout", 10**9),
    "ipvs-udp-timeout": ("1s", "ipvs.udpTimeout", 10**9),
    "detect-local-mode": ("NodeCIDR", "detectLocalMode", "NodeCIDR"),
    "pod-bridge-interface": ("br0", "detectLocal.bridgeInterface", "br0"),
    "pod-interface-name-prefix": ("veth", "detectLocal.interfaceNamePrefix", "veth"),
    "cluster-cidr": ("10.0.0.0/8,fd00::/8", "clusterCIDR", "10.0.0.0/8,fd00::/8"),
    "nodeport-addresses": ("10.0.0.0/8,primary", "nodePortAddresses", ("10.0.0.0/8", "primary")),
    "oom-score-adj": ("-5", "oomScoreAdj", -5),
    "conntrack-max-per-core": ("0", "conntrack.maxPerCore", 0),
    "conntrack-min": ("0", "conntrack.min", 0),
    "conntrack-tcp-timeout-established": ("1s", "conntrack.tcpEstablishedTimeout", 10**9),
    "conntrack-tcp-timeout-close-wait": ("1s", "conntrack.tcpCloseWaitTimeout", 10**9),
    "conntrack-tcp-be-liberal": ("true", "conntrack.tcpBeLiberal", True),
    "conntrack-udp-timeout": ("1s", "conntrack.udpTimeout", 10**9),
    "conntrack-udp-timeout-stream": ("1s", "conntrack.udpStreamTimeout", 10**9),
    "config-sync-period": ("1m", "configSyncPeriod", 60 * 10**9),
    "proxy-port-range": ("1-2", "portRange", "1-2"),
    "master": ("https://10.0.0.1:6443", "apiServer.master", "https://10.0.0.1:6443"),
}


def test_every_flag_of_a_field_is_known_and_tried() -> None:
    of_fields = {flag for field in FIELDS for flag in field.flags}
    values = {name for name, flag in FLAGS.items() if flag.role in ("setting", "always")}
    assert of_fields < FLAGS.keys()
    assert set(VALUES) == values


@pytest.mark.parametrize("name", VALUES)
def test_every_flag_reaches_its_field(name: str) -> None:
    text, path, value = VALUES[name]
    found = loaded(f"--{name}={text}")
    assert found.values[path] == value
    assert found.origins[path] == "flag"


@pytest.mark.parametrize("name", VALUES)
def test_beside_a_file_a_flag_counts_or_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "c").write_text(HEAD)
    text, path, value = VALUES[name]
    found = loaded(f"--config={tmp_path}/c", f"--{name}={text}")
    named = f"--{name}: has no effect beside --config: write it into the file"
    if name in {
        "v",
        "vmodule",
        "logging-format",
        "log-flush-frequency",
        "log-text-split-stream",
        "log-json-split-stream",
        "log-text-info-buffer-size",
        "log-json-info-buffer-size",
        "hostname-override",
        "master",
    }:
        assert found.values[path] == value
        assert named not in found.warnings
    else:
        assert found.origins[path] == "default"
        assert found.warnings == (named,)


@pytest.mark.parametrize("name", [name for name, flag in FLAGS.items() if flag.role == "nothing"])
def test_flags_of_old_are_taken_and_named(name: str) -> None:
    words = [f"--{name}"] if FLAGS[name].kind == "bool" else [f"--{name}", "x"]
    for arguments in (words, [words[0].replace("-", "_").replace("__", "--"), *words[1:]]):
        found = loaded(*arguments)
        assert found.config == loaded().config
        assert found.warnings == (f"--{name}: has no effect: {FLAGS[name].help}",)


def test_the_last_one_counts_and_lists_add_up() -> None:
    found = loaded(
        "--v=1", "--v=3", "--feature-gates=AllowServiceExternalIPs=false,A=true", "--feature-gates=A=false",
        "--nodeport-addresses=10.0.0.0/8", "--nodeport-addresses=11.0.0.0/8,primary", "--masquerade-all=false",
        "--masquerade-all", "--log-text-split-stream", "--log-json-info-buffer-size=2",
    )  # fmt: skip
    assert found.config.log_verbosity == 3
    assert found.config.feature_gates == {"AllowServiceExternalIPs": False, "A": False}
    assert found.config.node_port_addresses == ("10.0.0.0/8", "11.0.0.0/8", "primary")
    assert found.config.masquerade_all is True
    assert found.values["logging.options"] == {"text": {"splitStream": True}, "json": {"infoBufferSize": "2"}}


@pytest.mark.parametrize(
    ("words", "healthz", "metrics"),
    [
        ([], "0.0.0.0:10256", "127.0.0.1:10249"),
        (["--bind-address=::"], "[::]:10256", "[::1]:10249"),
        (["--healthz-port=0", "--metrics-port=0"], None, None),
        (["--healthz-port=0", "--healthz-bind-address=1.2.3.4:5"], None, "127.0.0.1:10249"),
        (["--healthz-bind-address=", "--metrics-bind-address="], None, None),
        (["--healthz-bind-address=", "--healthz-port=1"], None, "127.0.0.1:10249"),
        (["--healthz-bind-address=1.2.3.4", "--healthz-port=1"], "1.2.3.4:1", "127.0.0.1:10249"),
        (["--healthz-bind-address=1.2.3.4:5", "--healthz-port=1"], "1.2.3.4:5", "127.0.0.1:10249"),
        (["--healthz-bind-address=fd00::5", "--metrics-port=7"], "[fd00::5]:10256", "127.0.0.1:7"),
        (["--bind-address=::", "--healthz-port=1", "--metrics-port=2"], "[::]:1", "[::1]:2"),
    ],
)
def test_ports(words: list[str], healthz: str | None, metrics: str | None) -> None:
    config = loaded(*words).config
    assert (config.healthz_bind_address, config.metrics_bind_address) == (healthz, metrics)


def test_deprecated_flags_say_what_to_use() -> None:
    assert loaded("--metrics-port=0").warnings == (
        "--metrics-port: is deprecated: use --metrics-bind-address",
    )


# -- precedence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.29", "1.35"])
def test_the_command_line_of_kubeadms_daemon_set(version: str) -> None:
    file = DATA / f"kubeadm-{version}.yaml"
    found = options(f"--config={file}", "--hostname-override=Node-7")
    assert (found.node_name, found.source, found.backend) == ("node-7", "kubernetes", "iptables")
    assert found.api_server.kubeconfig == "/var/lib/kube-proxy/kubeconfig.conf"
    assert found.config.config.cluster_cidr == ("10.244.0.0/16",)
    assert found.config.warnings == ()
    assert found.files == (file,)


def test_beside_a_file_only_some_flags_count(tmp_path: Path) -> None:
    (tmp_path / "c").write_text(f"{HEAD}hostnameOverride: file\noomScoreAdj: 1\nlogging: {{verbosity: 1}}\n")
    found = loaded(
        f"--config={tmp_path}/c", "-v=5", "--hostname-override=flag", "--oom-score-adj=2", "--healthz-port=0"
    )
    config = found.config
    assert (config.hostname_override, config.oom_score_adj, config.log_verbosity) == ("flag", 1, 5)
    assert config.healthz_bind_address == "0.0.0.0:10256"
    assert found.warnings == tuple(
        f"--{name}: has no effect beside --config: write it into the file"
        for name in ("oom-score-adj", "healthz-port")
    )
    assert loaded(f"--config={tmp_path}/c", "--hostname-override=").config.hostname_override == "file"


def test_variables_count_for_our_own_fields_only(tmp_path: Path) -> None:
    (tmp_path / "c").write_text(f"{HEAD}mode: iptables\noomScoreAdj: 1\n")
    environ = {"PROXYCORE_BACKEND": "nft", "PROXYCORE_OOM_SCORE_ADJ": "5", "PROXYCORE_TAKEOVER": "leave"}
    found = loaded(f"--config={tmp_path}/c", environ=environ)
    assert (found.config.backend, found.config.takeover, found.config.oom_score_adj) == ("nft", "leave", 1)
    named = (
        "PROXYCORE_OOM_SCORE_ADJ: has no effect on kube-proxy's command line: write oomScoreAdj into the file"
    )
    assert found.warnings[0] == named


def test_a_second_document_or_file_says_what_is_ours(tmp_path: Path) -> None:
    both, ours = tmp_path / "both", tmp_path / "ours"
    both.write_text(f"{HEAD}mode: nftables\n---\n{OURS}takeover: refuse\n")
    assert loaded(f"--config={both}").config.takeover == "refuse"
    both.write_text(HEAD)
    ours.write_text(f"{OURS}backend: nft\n")
    found = options(f"--config={both}", environ={"PROXYCORE_CONFIG": str(ours)})
    assert (found.backend, found.files) == ("nft", (both, ours))
    assert found.config.warnings == ()
    assert loaded("--v=2", environ={"PROXYCORE_CONFIG": f" {ours} ,"}).config.backend == "nft"


def test_it_can_be_read_again_with_the_same_flags(tmp_path: Path) -> None:
    (tmp_path / "c").write_text(f"{HEAD}oomScoreAdj: 1\n")
    found = options(
        f"--config={tmp_path}/c", "-v=5", "--masquerade-all", environ={"PROXYCORE_BACKEND": "nft"}
    )
    (tmp_path / "c").write_text(f"{HEAD}oomScoreAdj: 2\n")
    assert found.reload is not None
    again = found.reload()
    assert (again.config.oom_score_adj, again.config.log_verbosity, again.config.backend) == (2, 5, "nft")
    assert again.warnings == found.config.warnings
    assert len(again.warnings) == 1


def test_init_only_reaches_the_run() -> None:
    assert options("--init-only").init_only is True
    assert options("--init-only=false").init_only is False


# -- jobs -----------------------------------------------------------------------------------------------------------


def test_version(proxyctl: Run) -> None:
    assert proxyctl("kube-proxy", "--version") == (0, f"Kubernetes-compatible: proxycore {__version__}\n", "")
    assert proxyctl("kube-proxy", "--version=raw").out.startswith(f"proxycore={__version__} ")


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_has_every_flag(word: str, proxyctl: Run) -> None:
    code, out, err = proxyctl("kube-proxy", "--nodeport-addresses=x", word)
    assert (code, err) == (0, "")
    for flag in FLAGS.values():
        assert f"  {flag.written}" in out
    assert max(map(len, out.splitlines())) <= 100


def test_an_unknown_flag_is_wrong_usage(proxyctl: Run) -> None:
    code, out, err = proxyctl("kube-proxy", "--proxy-mod=ipvs")
    assert (code, out) == (2, "")
    assert err == (
        "proxyctl: error: --proxy-mod: there is no such flag; did you mean --proxy-mode?; "
        "see `proxyctl kube-proxy --help`\n"
    )


def test_the_configuration_is_written_and_reads_back_the_same(proxyctl: Run, tmp_path: Path) -> None:
    file = tmp_path / "written"
    words = ["--proxy-mode=nftables", "--cluster-cidr=10.0.0.0/8", "--metrics-port=0", "--masquerade-all"]
    code, out, err = proxyctl("kube-proxy", "--cleanup", f"--write-config-to={file}", *words)
    assert (code, out) == (0, "")
    assert err.splitlines() == [
        "proxyctl: warning: --metrics-port: does not go into the file that is written",
        f"proxyctl: configuration written to {file}",
    ]
    assert file.read_text().startswith(HEAD)
    assert "ProxycoreConfiguration" not in file.read_text()
    assert loaded(f"--config={file}").config == loaded(*words[:2], words[3]).config


def test_what_is_ours_is_written_too(proxyctl: Run, tmp_path: Path) -> None:
    file = tmp_path / "written"
    assert proxyctl("kube-proxy", "--master=https://x", f"--write-config-to={file}").code == 0
    assert loaded(f"--config={file}").config.master == "https://x"


@pytest.fixture
def only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backends that are really installed are left out of a cleanup."""
    monkeypatch.setattr("proxycore.cli.lists._available", lambda: {"mem"})


@pytest.mark.usefixtures("only_ours")
def test_cleanup_removes_what_was_programmed(installed: Installed, proxyctl: Run) -> None:
    installed.kernel.write_text("shop/web:http\n")
    code, out, _ = proxyctl("kube-proxy", "--cleanup", f"--config={DATA}/kubeadm-1.35.yaml")
    assert (code, installed.kernel.exists()) == (0, False)
    assert "shop/web:http" in out


@pytest.mark.usefixtures("only_ours")
def test_cleanup_that_fails_exits_as_kube_proxy_does(installed: Installed, proxyctl: Run) -> None:
    (installed.site / "made_up_mem" / "__init__.py").write_text("raise ValueError('broken')")
    code, _, err = proxyctl("kube-proxy", "--cleanup")
    assert code == 1
    assert "broken" in err


def test_a_mode_without_a_backend_says_how_to_get_on(
    installed: Installed, proxyctl: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "c").write_text(f"{HEAD}mode: ipvs\n")
    code, out, err = proxyctl("kube-proxy", f"--config={tmp_path}/c")
    assert (code, out) == (4, "")
    assert f"the mode ipvs stands for it (file ({tmp_path}/c:3)): " in err
    [names] = re.findall(r"set PROXYCORE_BACKEND to (.*) in the environment", err)
    assert "mem" in names.split(" or ")
    assert "ipvs" not in names
    assert err.count("\n") == 1


def test_a_backend_that_was_chosen_by_name_needs_no_word_about_modes(
    proxyctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROXYCORE_BACKEND", "nobody")
    code, _, err = proxyctl("kube-proxy")
    assert code == 4
    assert "there is no such backend" in err
    assert "the mode" not in err


@pytest.mark.parametrize("called", ["kube-proxy", "proxyctl"])
def test_a_link_called_kube_proxy_takes_kube_proxys_flags(called: str, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom proxycore.cli import main\nsys.exit(main())\n")
    program.chmod(0o755)
    (tmp_path / called).symlink_to(program)
    done = subprocess.run(
        [tmp_path / called, "--version"], capture_output=True, text=True, check=True, env={**os.environ}
    )
    said = {"kube-proxy": "Kubernetes-compatible: proxycore", "proxyctl": "proxyctl"}[called]
    assert done.stdout == f"{said} {__version__}\n"
