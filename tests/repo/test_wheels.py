"""The four distributions as users get them: wheels, in an environment that knows nothing of this checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {
    "proxycore": ROOT,
    "proxycore_nft": ROOT / "plugins" / "nft",
    "proxycore_ipvs": ROOT / "plugins" / "ipvs",
    "proxycore_iptables": ROOT / "plugins" / "iptables",
}
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "-w", folder, *DISTRIBUTIONS.values()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name: next(folder.glob(f"{name}-*.whl")) for name in DISTRIBUTIONS}


@pytest.fixture(scope="module")
def run(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of an environment that has the wheels, and of this one all but our own distributions."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    others = folder / "others"
    others.mkdir()
    for item in Path(sysconfig.get_path("purelib")).iterdir():
        if "proxycore" not in item.name and item.suffix != ".pth":
            (others / item.name).symlink_to(item)
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (site / "others.pth").write_text(f"{others}\n")
    command = [sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index"]
    done = subprocess.run([*command, *wheels.values()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PROXYCORE"))}

    def inside(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        path = python.with_name(program)
        done = subprocess.run(
            [path, *arguments], cwd=folder, env=clean, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{program} {arguments}: {done.stdout}{done.stderr}"
        return done

    where = inside(
        "python", "-c", "import proxycore, proxycore_nft; print(proxycore.__file__, proxycore_nft.__file__)"
    )
    assert all(Path(part).is_relative_to(site) for part in where.stdout.split())
    return inside


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_wheel_holds_every_file_of_its_package(name: str, wheels: dict[str, Path]) -> None:
    base = DISTRIBUTIONS[name]
    command = ["git", "-c", "safe.directory=*", "-C", base, "ls-files", "-z", name]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    there = {n for n in listed if n and (base / n).is_file()}
    held = set(zipfile.ZipFile(wheels[name]).namelist())
    assert f"{name}/py.typed" in held
    assert there - held == set()


def test_wheels_hold_no_tests_and_no_two_the_same_file(wheels: dict[str, Path]) -> None:
    names = [n for w in wheels.values() for n in zipfile.ZipFile(w).namelist() if ".dist-info/" not in n]
    assert len(names) == len(set(names))
    assert {n.partition("/")[0] for n in names} == set(DISTRIBUTIONS)
    assert [n for n in names if "/tests/" in n] == []


def test_proxyctl_runs(run: Run) -> None:
    assert run("proxyctl", "--version").stdout.split()[-1][0].isdigit()


def test_backends_are_found(run: Run) -> None:
    listed = json.loads(run("proxyctl", "backends", "-o", "json").stdout)
    assert "nft" in json.dumps(listed)


def test_examples_are_rendered_alike_by_file_and_by_folder(run: Run) -> None:
    """No root and no kernel: native text of what would be programmed for the example manifests."""
    arguments = (
        "--backend",
        "nft",
        "--node-name",
        "node-1",
        "--config",
        ROOT / "examples" / "kubeproxy-config.yaml",
    )
    text = run("python", "-m", "proxycore", "render", *arguments, ROOT / "examples").stdout
    for expected in ("10.96.0.80", "10.244.2.13", "203.0.113.10", "fd00:10:96::90", "10.96.0.66"):
        assert expected in text


def test_the_demo_finds_its_manifests(run: Run) -> None:
    script = (
        "from proxycore.demo.manifests import examples; print(sorted(p.name for p in examples().iterdir()))"
    )
    assert "web.yaml" in run("python", "-c", script).stdout
