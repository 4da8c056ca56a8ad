"""Where configuration comes from on `proxyctl`'s own command lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from proxycore.cli.live import run_until_stopped
from proxycore.options import RunOptions, config_files, resolve
from proxycore.source import APIServer

from .conftest import Installed, Run

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
OURS = "apiVersion: proxycore.io/v1alpha1\nkind: ProxycoreConfiguration\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(f"{HEAD}mode: nftables\noomScoreAdj: 5\n")
    return path


def test_origin_names_the_place_in_tables(proxyctl: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROXYCORE_TAKEOVER", "leave")
    code, out, err = proxyctl(
        "config", "show", "--origin", "--config", file, "--set", "clusterCIDR=10.0.0.0/8"
    )
    rows = {line.split()[0]: line.split()[2:] for line in out.splitlines()}
    assert code == 0
    assert rows["FIELD"] == ["ORIGIN", "PLACE"]
    assert rows["mode"] == [str(file), f"{file}:3"]
    assert rows["backend"] == [str(file), f"{file}:3"]
    assert rows["takeover"] == ["environment", "PROXYCORE_TAKEOVER"]
    assert rows["clusterCIDR"] == ["flag", "--set", "clusterCIDR"]
    assert rows["source"] == ["default", "-"]
    assert err == "proxyctl: what goes before what: flag > environment > file > default\n"


def test_origin_names_the_place_in_yaml_which_reads_back(proxyctl: Run, file: Path, tmp_path: Path) -> None:
    _, out, _ = proxyctl("config", "show", "--origin", "-o", "yaml", "--config", file)
    lines = out.splitlines()
    assert lines[0] == "# flag > environment > file > default"
    assert {
        f"oomScoreAdj: 5  # file ({file}:4)",
        f"backend: nft  # file ({file}:3)",
        "takeover: auto  # default",
    } < set(lines)
    again = tmp_path / "again"
    again.write_text(out)
    assert [d["kind"] for d in yaml.safe_load_all(out)] == [
        "KubeProxyConfiguration",
        "ProxycoreConfiguration",
    ]
    assert resolve([str(again)], {}, {}).config.config == resolve([str(file)], {}, {}).config.config


def test_origin_names_the_place_in_json(proxyctl: Run, file: Path) -> None:
    _, out, err = proxyctl("config", "show", "--origin", "-o", "json", "--config", file)
    rows = {row["field"]: row for row in json.loads(out)}
    assert rows["oomScoreAdj"] == {
        "field": "oomScoreAdj",
        "value": 5,
        "origin": str(file),
        "place": f"{file}:4",
    }
    assert rows["takeover"]["place"] is None
    assert err == ""


def test_a_variable_names_more_files(
    proxyctl: Run, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    more = tmp_path / "more"
    more.write_text(f"{OURS}takeover: refuse\n")
    monkeypatch.setenv("PROXYCORE_CONFIG", str(more))
    _, out, err = proxyctl("config", "show", "--config", file, "-o", "json")
    rows = {row["field"]: row["value"] for row in json.loads(out)}
    assert (rows["takeover"], rows["oomScoreAdj"], err) == ("refuse", 5, "")
    assert config_files(["a"], {"PROXYCORE_CONFIG": "b, a,,c"}) == (Path("a"), Path("b"), Path("c"))


def test_flags_of_run_arrive(installed: Installed, proxyctl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RunOptions] = []

    def run(options: RunOptions) -> int:
        seen.append(options)
        return 0

    assert run_until_stopped.__module__ == "proxycore.cli.live"
    monkeypatch.setattr("proxycore.cli.live.run_until_stopped", run)
    words = ["--kubeconfig", "/k", "--context", "blue", "--master", "https://x", "--init-only"]
    assert proxyctl("run", "--backend", "mem", *words).code == 0
    assert proxyctl("run", "--backend", "mem").code == 0
    assert seen[0].api_server == APIServer(kubeconfig="/k", context="blue", master="https://x")
    assert (seen[0].init_only, seen[1].init_only) == (True, False)
    assert seen[1].api_server == APIServer()


def test_a_wrong_master_is_blamed_on_its_flag(proxyctl: Run) -> None:
    code, _, err = proxyctl("run", "--backend", "mem", "--master", "ftp://x")
    assert code == 2
    assert err.startswith("proxyctl: error: --master: ")
    assert "'ftp://x' is no URL such as https://10.0.0.1:6443" in err


def test_options_can_be_read_again_with_the_same_flags_and_environment(file: Path) -> None:
    flags: dict[str, object] = {"clusterCIDR": "10.0.0.0/8"}
    environ = {"PROXYCORE_TAKEOVER": "leave"}
    options = resolve([str(file)], flags, environ)
    flags.clear()
    environ.clear()
    file.write_text(f"{HEAD}oomScoreAdj: 6\n")
    assert options.reload is not None
    config = options.reload().config
    assert (config.oom_score_adj, config.cluster_cidr, config.takeover) == (6, ("10.0.0.0/8",), "leave")
    assert options.files == (file,)
    assert resolve([str(file)], {}, {}).fingerprint != options.fingerprint
