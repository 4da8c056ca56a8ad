"""Help, usage errors and completion: quick, complete, one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from proxycore import __version__
from proxycore.cli.app import app
from proxycore.cli.exits import TABLE

from .conftest import Installed, Run

COMMANDS = [
    ("run",),
    ("kube-proxy",),
    ("backends",),
    ("render",),
    ("plan",),
    ("record",),
    ("cleanup",),
    ("demo",),
    ("config", "show"),
    ("config", "validate"),
]
HEAVY = {"kubernetes", "pyroute2", "msgspec", "pluggy", "yaml", "rich", "aiohttp", "http.client", "asyncio"}


def test_help_lists_every_command_and_exit_code(proxyctl: Run) -> None:
    code, out, err = proxyctl("--help")
    assert (code, err) == (0, "")
    for command in COMMANDS:
        assert f"\n  {command[0]} " in out
    for exit_code, meaning in TABLE.items():
        assert f"    {exit_code:<4}{meaning}\n" in out


@pytest.mark.parametrize("command", [(), ("config",), *COMMANDS], ids=" ".join)
def test_every_command_has_examples_that_parse(command: tuple[str, ...], proxyctl: Run) -> None:
    code, out, _ = proxyctl(*command, "--help")
    assert code == 0
    block = out.partition("Examples:\n")[2].partition("Exit codes:\n")[0]
    examples = [line for line in block.splitlines() if line.strip()]
    assert all("proxyctl " in line for line in examples)
    assert any(" ".join(("proxyctl", *command)) in line for line in examples)


def test_the_example_of_plan_speaks_only_when_there_are_differences(proxyctl: Run) -> None:
    _, out, _ = proxyctl("plan", "--help")
    (line,) = [line for line in out.splitlines() if "echo the kernel differs" in line]
    said = {}
    for code in (0, 1, 3, 4):
        script = f"proxyctl() {{ return {code}; }}; {line}"
        said[code] = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False).stdout
    assert said == {0: "", 1: "", 3: "the kernel differs\n", 4: ""}


def test_every_command_is_tested_here() -> None:
    names = {
        command.callback.__name__.replace("_", "-") for command in app.registered_commands if command.callback
    }
    assert names == {command[0] for command in COMMANDS} - {"config"}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from proxycore.cli import main; main(['run', '--help']);"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_version_and_the_module_are_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "proxycore", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"proxyctl {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nonsense"], "No such option: --nonsense"),
        (["rnu"], "Did you mean 'run'?"),
        (["run", "extra"], "extra"),
        (["run", "--takeover", "seize"], "'auto', 'refuse', 'leave'"),
        (["run", "--pace", "0"], "--pace"),
        (["run", "-v", "-1"], "-v"),
        (["run", "--backend"], "--backend"),
        (["render", "dir", "--source", "file:dir"], "either MANIFESTS or --source"),
        (["record"], "FILE"),
        (["record", "--for", "-1", "x.rec"], "--for"),
        (["demo", "--for", "-3"], "--for"),
        (["backends", "-o", "xml"], "xml"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], said: str, proxyctl: Run) -> None:
    code, out, err = proxyctl(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("proxyctl: ")
    assert err.count("\n") == 1
    assert said in err
    assert " --help`" in err


@pytest.mark.parametrize("arguments", [[], ["config"]])
def test_no_command_prints_the_help_on_standard_error(arguments: list[str], proxyctl: Run) -> None:
    code, out, err = proxyctl(*arguments)
    assert (code, out) == (2, "")
    assert "Commands:" in err


def complete(line: str, environ: dict[str, str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "proxycore"],
        env={
            **environ,
            "_PROXYCTL_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_completion_knows_backends_and_sources_without_importing_them(installed: Installed) -> None:
    (installed.site / "made_up_mem" / "__init__.py").write_text("raise SystemExit(9)")
    assert complete("proxyctl run --backend me", installed.environ) == ["mem"]
    assert complete("proxyctl run --source fi", installed.environ) == ["file:"]
    assert complete("proxyctl run --set clusterC", installed.environ) == ["clusterCIDR="]
    assert complete("proxyctl rend", installed.environ) == ["render"]
    assert complete("proxyctl kube-proxy --iptables-masq", installed.environ) == ["--iptables-masquerade-bit"]


def test_the_documentation_has_every_exit_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for exit_code, meaning in TABLE.items():
        assert f"| {exit_code:d} | {meaning} |" in page
    for command in COMMANDS:
        assert f"`proxyctl {' '.join(command)}`" in page
