"""The core is pure: it decides, and does nothing.  A module is pure unless it is named here."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "proxycore"

EDGES = frozenset(
    {
        "proxycore.__main__",
        "proxycore.apiclient",
        "proxycore.cli",
        "proxycore.demo",
        "proxycore.dispatch",
        "proxycore.engine",
        "proxycore.hostsetup",
        "proxycore.httpserver",
        "proxycore.inbox",
        "proxycore.kernel",
        "proxycore.memory",
        "proxycore.metrics",
        "proxycore.observers",
        "proxycore.offline",
        "proxycore.nodefacts",
        "proxycore.options",
        "proxycore.record",
        "proxycore.reload",
        "proxycore.runtime",
        "proxycore.saver",
        "proxycore.statefile",
        "proxycore.servers",
        "proxycore.signals",
        "proxycore.sources",
        "proxycore.takeover",
        "proxycore.testing",
    }
)
"""Modules, and packages with all they hold, that touch threads, files, sockets, processes or the kernel."""

PURE_AMONG_EDGES = frozenset(
    {
        "proxycore.kernel.flow",
        "proxycore.metrics.families",
        "proxycore.metrics.recorder",
        "proxycore.metrics.snapshot",
        "proxycore.metrics.values",
        "proxycore.observers.staleflows",
    }
)
EFFECTS = frozenset(
    {
        "asyncio",
        "ctypes",
        "multiprocessing",
        "select",
        "selectors",
        "signal",
        "socket",
        "subprocess",
        "threading",
    }
)
HEAVY = frozenset({"aiohttp", "iptc", "kubernetes", "pyroute2", "rich", "typer"})
ALLOWED = {("proxycore.canonical", "socket")}
"""inet_pton() is the kernel's own idea of an address."""


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_edge(module: str) -> bool:
    return module not in PURE_AMONG_EDGES and any(module == e or module.startswith(f"{e}.") for e in EDGES)


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
PURE = sorted(name for name in MODULES if not is_edge(name))


def imports(file: Path) -> Iterator[str]:
    """Absolute names of all modules that the file imports, inside functions too, but not for type checkers alone."""
    module = name_of(file)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    pending: list[ast.AST] = [ast.parse(file.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            )
            whole = ".".join(part for part in (base, node.module) if part)
            yield whole
            yield from (f"{whole}.{alias.name}" for alias in node.names if f"{whole}.{alias.name}" in MODULES)
        pending.extend(ast.iter_child_nodes(node))


def test_edges_exist() -> None:
    assert {e for e in EDGES | PURE_AMONG_EDGES if e not in MODULES} == set()


@pytest.mark.parametrize("module", PURE)
def test_pure_module_imports_no_effect_and_no_edge(module: str) -> None:
    found = set(imports(MODULES[module]))
    effects = {name for name in found if name.partition(".")[0] in EFFECTS | HEAVY}
    assert effects - {name for owner, name in ALLOWED if owner == module} == set()
    assert {name for name in found if name.startswith("proxycore") and is_edge(name)} == set()


def test_importing_all_pure_modules_loads_nothing_heavy_and_starts_nothing() -> None:
    script = (
        "import importlib, json, sys, threading\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(json.dumps([sorted({n.partition('.')[0] for n in sys.modules}), threading.active_count()]))"
    )
    done = subprocess.run([sys.executable, "-c", script, *PURE], capture_output=True, text=True, check=True)
    loaded, threads = json.loads(done.stdout)
    assert HEAVY & set(loaded) == set()
    assert threads == 1


def test_help_loads_no_client_library() -> None:
    script = (
        "import sys\nfrom proxycore.cli import main\nsys.argv = ['proxyctl', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(*sorted({n.partition('.')[0] for n in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "run" in done.stdout
    assert {"aiohttp", "iptc", "kubernetes", "pyroute2"} & set(done.stderr.split()) == set()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_core_imports_no_plugin(module: str) -> None:
    assert {name for name in imports(MODULES[module]) if name.startswith("proxycore_")} == set()
