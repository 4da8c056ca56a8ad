"""Commands that print something and end, on a backend that keeps all in a file."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import yaml

from proxycore.errors import KernelError

from .conftest import BACKEND, TOML, Installed, Run, add_distribution


def test_backends_are_listed_without_being_loaded(installed: Installed, proxyctl: Run) -> None:
    (installed.site / "made_up_mem" / "__init__.py").write_text("raise SystemExit(9)")
    code, out, err = proxyctl("backends")
    assert (code, err) == (0, "")
    head, *lines = out.splitlines()
    assert head.split() == ["NAME", "STATE", "API", "DISTRIBUTION", "SUMMARY"]
    line = next(line for line in lines if line.startswith("mem "))
    assert line.split()[1] == "available"
    assert "made-up-mem 1.2" in line


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_lists_for_programs_keep_types(form: str, proxyctl: Run) -> None:
    code, out, _ = proxyctl("backends", "-o", form)
    rows = json.loads(out) if form == "json" else yaml.safe_load(out)
    row = next(row for row in rows if row["name"] == "mem")
    assert code == 0
    assert row["requiresRoot"] is False
    assert row["capabilities"] == ["ipv4", "tcp"]
    assert row["problems"] == []


def test_a_broken_backend_is_listed_with_its_problem(installed: Installed, proxyctl: Run) -> None:
    add_distribution(
        installed.site, "odd", BACKEND, TOML.replace('"mem"', '"odd"').replace("0.1,<0.2", "8,<9")
    )
    code, out, _ = proxyctl("backends")
    line = next(line for line in out.splitlines() if line.startswith("odd "))
    assert code == 0
    assert "broken" in line
    assert "is made for version >=8,<9 of the plugin contract" in line


@pytest.mark.parametrize(("problem", "state"), [("", "fit"), ("no such kernel", "unfit")])
def test_probe_asks_the_host(
    problem: str, state: str, proxyctl: Run, monkeypatch: pytest.MonkeyPatch, installed: Installed
) -> None:
    monkeypatch.setenv("MADE_UP_PROBLEM", problem)
    _, out, _ = proxyctl("backends", "--probe", "-o", "json")
    row = next(row for row in json.loads(out) if row["name"] == "mem")
    assert (row["state"], row["problems"]) == (state, [problem] if problem else [])
    assert row["facts"] == ["colour=blue"]


def test_probe_lists_a_backend_that_finds_the_configuration_wrong(
    installed: Installed, proxyctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MADE_UP_WRONG", "mem.colour")
    installed.environ["MADE_UP_WRONG"] = "mem.colour"
    code, out, _ = proxyctl("backends", "--probe", "-o", "json")
    row = next(row for row in json.loads(out) if row["name"] == "mem")
    assert (code, row["state"], row["problems"]) == (0, "unfit", ["mem.colour: is wrong"])
    process = installed.popen("run", "--backend", "mem", "--source", f"file:{installed.manifests}")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.splitlines()[-1] == "proxyctl: error: mem.colour: is wrong"


def test_render_prints_native_text_only(installed: Installed, proxyctl: Run) -> None:
    code, out, err = proxyctl(
        "render", "--backend", "mem", "--set", "clusterCIDR=10.244.0.0/16", installed.manifests
    )
    assert (code, out, err) == (0, "shop/web:http 10.96.0.80:80/tcp 10.244.1.7:8080\n", "")
    assert not installed.kernel.exists()


def test_render_refuses_what_it_cannot_read_whole(installed: Installed, proxyctl: Run) -> None:
    (installed.manifests / "bad.yaml").write_text("kind: Service\nmetadata: [\n")
    code, out, err = proxyctl("render", "--backend", "mem", installed.manifests)
    assert (code, out) == (1, "")
    assert "bad.yaml" in err
    assert "nothing was done" in err


def test_render_names_what_has_no_effect(installed: Installed, proxyctl: Run) -> None:
    file = installed.manifests / "web.yaml"
    file.write_text(file.read_text().replace("10.244.1.7", "127.0.0.1"))
    code, out, err = proxyctl(
        "render", "--backend", "mem", "--set", "mode=nftables", installed.manifests / "none"
    )
    assert (code, out) == (1, "")
    assert "none" in err


def test_trace_prints_calls_on_standard_error(installed: Installed, proxyctl: Run) -> None:
    _, out, err = proxyctl("render", "--backend", "mem", "--trace-hooks", installed.manifests)
    assert "mem: proxycore_backend_describe() -> BackendInfo(" in err
    assert "mem: proxycore_backend_render(" in err
    assert "proxycore_backend" not in out


def test_plan_exits_3_with_differences_and_0_without(installed: Installed, proxyctl: Run) -> None:
    code, out, _ = proxyctl("plan", "--backend", "mem", "-o", "json", installed.manifests)
    assert code == 3
    assert json.loads(out) == [{"verb": "add", "service": "shop/web:http", "operation": "line shop/web:http"}]
    installed.kernel.write_text("shop/web:http\n")
    code, out, err = proxyctl("plan", "--backend", "mem", installed.manifests)
    assert (code, out) == (0, "")
    assert "nothing to do" in err


def test_cleanup_lists_what_it_removed(installed: Installed, proxyctl: Run) -> None:
    installed.kernel.write_text("shop/web:http\n")
    code, out, _ = proxyctl("cleanup", "--backend", "mem")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [["BACKEND", "REMOVED"], ["mem", "shop/web:http"]]
    assert not installed.kernel.exists()
    code, out, err = proxyctl("cleanup", "--backend", "mem")
    assert (code, out) == (0, "")
    assert "nothing of ours was there" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["render", "--backend", "ipvs", "."], "the ipvs backend is not written yet"),
        (["run", "--backend", "ipvs", "--source", "file:."], "the ipvs backend is not written yet"),
        (["run", "--backend", "nobody", "--source", "file:."], "there is no such backend"),
        (["run", "--backend", "mem", "--source", "etcd:x"], "no such source (installed: file, kubernetes, "),
        (["demo", "--backend", "ipvs"], "the ipvs backend is not written yet"),
        (["demo", "--backend", "nobody"], "there is no such backend"),
        (["cleanup", "--backend", "nobody"], "there is no such backend"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_line_and_exit_code_4(
    arguments: list[str], said: str, proxyctl: Run
) -> None:
    code, out, err = proxyctl(*arguments)
    assert (code, out) == (4, "")
    errors = [line for line in err.splitlines() if "warning: " not in line]
    assert len(errors) == 1
    assert errors[0].startswith("proxyctl: error: plugin '")
    assert said in errors[0]


def test_wrong_configuration_is_one_line_and_exit_code_2(
    installed: Installed, proxyctl: Run, tmp_path: Path
) -> None:
    (installed.site / "made_up_mem" / "__init__.py").write_text("raise SystemExit(9)")
    file = tmp_path / "config.conf"
    file.write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nclusterCIDR: here\n"
    )
    for arguments in (
        ["run", "--backend", "mem", "--config"],
        ["config", "validate"],
        ["cleanup", "--config"],
    ):
        code, out, err = proxyctl(*arguments, file)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert str(file) in err
        assert "clusterCIDR" in err


@pytest.mark.parametrize(
    ("pair", "said"),
    [("clusterCIDR", "write FIELD=VALUE"), ("clusterCIRD=x", "clusterCIRD"), ("=x", "--set")],
)
def test_set_is_checked(pair: str, said: str, proxyctl: Run) -> None:
    code, _, err = proxyctl("config", "show", "--set", pair)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_config_show_tells_values_and_origins(proxyctl: Run, tmp_path: Path) -> None:
    file = tmp_path / "config.conf"
    file.write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n"
    )
    arguments = ["config", "show", "--config", file, "--set", "clusterCIDR=10.244.0.0/16"]
    code, out, _ = proxyctl(*arguments, "-o", "json")
    rows = {row["field"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["mode"]["value"] == "nftables"
    assert str(file) in rows["mode"]["origin"]
    assert rows["clusterCIDR"]["origin"] == "flag"
    assert rows["verifyInterval"] == {"field": "verifyInterval", "value": "1s", "origin": "default"}
    _, out, _ = proxyctl(*arguments)
    assert out.splitlines()[0].split() == ["FIELD", "VALUE", "ORIGIN"]


def test_config_show_as_yaml_can_be_used_as_configuration(proxyctl: Run, tmp_path: Path) -> None:
    _, out, _ = proxyctl("config", "show", "--set", "clusterCIDR=10.244.0.0/16", "-o", "yaml")
    file = tmp_path / "shown.yaml"
    file.write_text(out)
    assert proxyctl("config", "validate", file).code == 0
    assert "10.244.0.0/16" in proxyctl("config", "show", "--config", file).out


def test_escape_sequences_never_reach_the_terminal(proxyctl: Run) -> None:
    code, _, err = proxyctl("render", "--backend", "mem", "x\x1b[31m\n")
    assert code == 1
    assert "x" in err
    assert "\x1b" not in err
    assert len([line for line in err.splitlines() if "error: " in line]) == 1


@pytest.mark.parametrize(("user", "hinted"), [(0, False), (1000, True)])
def test_a_kernel_that_says_no_is_told_with_a_way_out(
    user: int, hinted: bool, proxyctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise KernelError("netlink dump refused", errno=errno.EPERM)

    monkeypatch.setattr("proxycore.cli.lists.show_backends", refuse)
    monkeypatch.setattr("os.geteuid", lambda: user)
    code, _, err = proxyctl("backends")
    assert code == 1
    assert err.startswith("proxyctl: error: netlink dump refused")
    assert ("run it as root" in err) is hinted


def test_a_bug_is_told_in_one_line(proxyctl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("odd")

    monkeypatch.setattr("proxycore.cli.lists.show_backends", fail)
    code, _, err = proxyctl("backends")
    assert code == 1
    assert err.startswith("proxyctl: internal error")
    assert "ZeroDivisionError: odd at " in err
    assert err.count("\n") == 1
    monkeypatch.setenv("PROXYCTL_TRACEBACK", "1")
    assert "Traceback" in proxyctl("backends").err


@pytest.mark.parametrize("command", [["run", "--backend", "mem"], ["record", "x.rec"]])
def test_without_a_way_to_the_api_server_one_is_asked_for(
    command: list[str], proxyctl: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, err = proxyctl(*command, "--source", "kubernetes")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith(
        "proxyctl: error: no way to the API server is configured: looked at"
    )


@pytest.mark.parametrize("source", ["file:", "file", "recording:", "recording"])
@pytest.mark.parametrize("command", ["run", "render", "plan", "record"])
def test_a_source_without_its_argument_is_wrong_usage(command: str, source: str, proxyctl: Run) -> None:
    chosen = ["x.rec"] if command == "record" else ["--backend", "mem"]
    code, out, err = proxyctl(command, "--source", source, *chosen)
    assert (code, out) == (2, "")
    assert f"error: source: {source!r} is not complete: write {source.rstrip(':')}:" in err.splitlines()[-1]


HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
OURS = "---\napiVersion: proxycore.io/v1alpha1\nkind: ProxycoreConfiguration\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mode: ipvs\n", ["c.yaml: mode: ipvs: the ipvs backend is not written yet; available: "]),
        (f"mode: nftables\n{OURS}backend: nobody\n", ["c.yaml: backend: nobody: there is no such backend"]),
        (f"{OURS}backend: mem\nsource: kubernetes\n", []),
        (f"{OURS}backend: mem\nsource: etcd\n", ["c.yaml: source: etcd: there is no such source"]),
        (f"{OURS}backend: mem\nsource: file:x\n", []),
    ],
)
def test_validate_names_a_choice_that_is_not_available(
    text: str, said: list[str], proxyctl: Run, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(HEAD + text)
    code, out, err = proxyctl("config", "validate", file)
    lines = [line.replace(f"{tmp_path}/", "") for line in err.splitlines()]
    assert (code, out, lines[-1]) == (0, "", "c.yaml: valid")
    assert len(lines) == len(said) + 1
    for line, words in zip(lines, said, strict=False):
        assert line.startswith(f"proxyctl: warning: {words}")


@pytest.mark.parametrize("given", ["", "mode: iptables\n", "mode: nftables\n"])
def test_validate_has_no_word_about_modes_whose_backend_is_here(
    given: str, proxyctl: Run, tmp_path: Path
) -> None:
    pytest.importorskip("proxycore_iptables")
    file = tmp_path / "c.yaml"
    file.write_text(HEAD + given)
    assert proxyctl("config", "validate", file) == (0, "", f"{file}: valid\n")


def test_validate_says_what_a_mode_that_is_not_written_means(
    proxyctl: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxycore.config.resolve.DEFAULT_MODE", "ipvs")
    file = tmp_path / "c.yaml"
    file.write_text(HEAD)
    code, out, err = proxyctl("config", "validate", file)
    assert (code, out) == (0, "")
    warning, valid = err.splitlines()
    assert warning.startswith(
        "proxyctl: warning: mode: not written, which means ipvs: the ipvs backend is not written yet; available: "
    )
    assert " mem" in warning
    assert valid == f"{file}: valid"


def test_errors_stand_one_a_line_with_what_is_unknown(proxyctl: Run, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"{HEAD}future: 1\nclusterCIDR: x\nmode: y\n")
    code, out, err = proxyctl("config", "validate", file)
    assert (code, out) == (2, "")
    assert [line.partition(f"{tmp_path}/")[::2] for line in err.splitlines()] == [
        ("proxyctl: warning: ", "c.yaml:3: future: is unknown and ignored"),
        ("proxyctl: error: ", "c.yaml:4: clusterCIDR: 'x' is no CIDR such as 10.0.0.0/8 or fd00::/8"),
        ("proxyctl: error: ", "c.yaml:5: mode: 'y' is none of iptables, ipvs, nftables"),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["config", "show", "--set", "mode=xx"], "--set mode: 'xx' is none of iptables, ipvs, nftables"),
        (["config", "show", "--set", "mdoe=xx"], "--set mdoe: is no field and no flag; did you mean mode?"),
        (["run", "--backend", "../x"], "--backend: '../x' is not the name of a plugin"),
        (["run", "--node-name", "a b"], "--node-name: hostnameOverride: 'a b' is no node name"),
    ],
)
def test_a_wrong_flag_is_blamed_as_it_was_written(arguments: list[str], said: str, proxyctl: Run) -> None:
    code, out, err = proxyctl(*arguments)
    assert (code, out, err) == (2, "", f"proxyctl: error: {said}\n")
