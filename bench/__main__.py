"""`python -m bench quick|full [SECTION...]`: each section in a process and a network namespace of its own."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from proxycore.testing.netns import Namespace, problem

from .report import Row, machine, table

SECTIONS = {
    "engine": "from bytes to a batch, no kernel",
    "nft": "nf_tables: full load, one change, many changes, restart",
    "iptables": "iptables, both variants: full load, one change, what is written, connections",
    "ipvs": "IPVS and ipset: batches beside pyroute2 and the tools",
    "memory": "resident memory",
    "startup": "from exec to programmed; the command line",
    "api": "an API server at the other end: start, one change, start without it",
    "compare": "against kube-proxy's rules written by `nft -f`",
    "packets": "what a connection's first packet costs (full only)",
}
FULL_ONLY = frozenset({"packets"})


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, epilog=_epilog(), formatter_class=_Help
    )
    parser.add_argument("size", choices=("quick", "full"), help="two minutes, or a quarter of an hour")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="only these; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    full = arguments.size == "full"
    unknown = set(arguments.sections) - SECTIONS.keys()
    if unknown:
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if arguments.child:
        _run_child(arguments.sections[0], full)
        return 0
    reason = problem()
    if reason is not None:
        print(f"bench: {reason}; root is needed", file=sys.stderr)
        return 2
    names = arguments.sections or [name for name in SECTIONS if full or name not in FULL_ONLY]
    facts = machine()
    for name, value in facts.items():
        print(f"{name + ':':14}{value}")
    rows, broken = [], []
    for name in names:
        began = time.monotonic()
        print(f"bench: {name} ...", file=sys.stderr, flush=True)
        try:
            rows += list(_section(name, arguments.size))
        except subprocess.CalledProcessError as error:
            broken.append(name)
            print(f"bench: {name} ended with status {error.returncode}", file=sys.stderr)
        print(f"bench: {name} took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    facts["load average at the end"] = " ".join(f"{load:.2f}" for load in os.getloadavg())
    print("\n" + table(rows))
    missed = [row for row in rows if row.met is False]
    judged = sum(row.met is not None for row in rows)
    print(f"\nload average at the end: {facts['load average at the end']}")
    print(
        f"{judged - len(missed)} of {judged} bars met"
        + "".join(f"\n  missed: {r.section}: {r.what}" for r in missed)
    )
    if arguments.json:
        found = {
            "machine": facts,
            "size": arguments.size,
            "rows": [msgspec.to_builtins(row) | {"met": row.met} for row in rows],
        }
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    return 1 if broken else 0


def _section(name: str, size: str) -> Iterator[Row]:
    """Run one section; its rows.  Raises CalledProcessError."""
    argv = [sys.executable, "-m", "bench", size, name, "--child"]
    with Namespace(f"bench-{name}") as namespace:
        child = namespace.popen(
            argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, cwd=Path(__file__).parents[1]
        )
        with child:
            for line in child.stdout:
                row = msgspec.json.decode(line, type=Row)
                print("  " + "  ".join(text for text in row.cells() if text), file=sys.stderr, flush=True)
                yield msgspec.structs.replace(row, section=f"{name}: {SECTIONS[name]}")
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, argv)


def _run_child(name: str, full: bool) -> None:
    """Rows go out as they are found, one JSON text a line; all else that prints goes to standard error."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    for row in importlib.import_module(f"bench.{name}").run(full=full):
        out.write(msgspec.json.encode(row) + b"\n")


def _epilog() -> str:
    return "sections:\n" + "\n".join(f"  {name:9} {what}" for name, what in SECTIONS.items())


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the list of sections as it is."""


if __name__ == "__main__":
    sys.exit(main())
