"""Rules for the files themselves."""

from __future__ import annotations

import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
OURS = ("proxycore", "proxycore-nft", "proxycore-ipvs", "proxycore-iptables")
LONGEST_MODULE = 600
# Written in pieces, so that this file does not find itself.
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me/(?!USER)[a-z]\w*)/[\w.]")
CONFLICT = re.compile(r"^(?:<{7} |>{7} )", re.MULTILINE)


def tracked() -> list[Path]:
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def texts() -> list[tuple[str, str]]:
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data:
            found.append((str(path.relative_to(ROOT)), data.decode()))
    return found


def test_no_module_is_too_long() -> None:
    long = {
        name: count
        for name, text in texts()
        if name.endswith(".py") and (count := text.count("\n")) > LONGEST_MODULE
    }
    assert long == {}, "split these by noun"


def test_no_path_of_one_machine() -> None:
    found = [
        f"{name}: {line}"
        for name, text in texts()
        for line in text.splitlines()
        if MACHINE_PATHS.search(line)
    ]
    assert found == []


def test_no_conflict_marker() -> None:
    assert [name for name, text in texts() if CONFLICT.search(text)] == []


def test_no_generated_or_large_file_is_tracked() -> None:
    names = [
        path for path in tracked() if path.stat().st_size > 500_000 or path.suffix in {".pyc", ".whl", ".so"}
    ]
    assert names == []


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def installed(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def test_everything_that_we_need_is_pinned() -> None:
    """All that the four distributions and the extra `dev` require, and what that requires in turn."""
    needed: set[str] = set()
    pending = [(name, frozenset({"dev"} if name == "proxycore" else ())) for name in OURS]
    while pending:
        name, extras = pending.pop()
        found = installed(name)
        if name in needed or found is None:
            continue
        needed.add(name)
        for text in found.requires or ():
            requirement = Requirement(text)
            wanted = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            if requirement.marker is None or any(requirement.marker.evaluate(w) for w in wanted):
                pending.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    assert "pluggy" in needed
    assert needed - set(OURS) - set(pins()) == set(), "./dev update"


@pytest.mark.parametrize("script", ["dev", ".ci/run"])
def test_script_is_posix_and_names_no_index(script: str) -> None:
    text = (ROOT / script).read_text()
    assert text.startswith("#!/bin/sh\n")
    assert (ROOT / script).stat().st_mode & 0o111
    assert not re.search(r"https?://|index-url|\bmake\b", text)
    subprocess.run(["sh", "-n", ROOT / script], check=True)


def test_dev_help_names_every_command() -> None:
    text = (ROOT / "dev").read_text()
    commands = re.findall(r"^    ([a-z][a-z-]*)(?: \|[^)]*)?\)$", text, re.MULTILINE)
    done = subprocess.run([ROOT / "dev", "help"], capture_output=True, text=True, check=True)
    assert len(commands) > 7
    assert [c for c in commands if not re.search(rf"^  {c} ", done.stdout, re.MULTILINE)] == []
