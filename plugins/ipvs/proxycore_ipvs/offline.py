"""What needs no started backend: probing the host, rendering a state as text, planning the way to it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from proxycore.api import BackendContext, ChangeBatch, ConfigError, KernelError, Operation, Probe
from proxycore.kernel import ipvs, xtables
from proxycore.kernel.xtables import Tools

from . import netrules
from .family import FamilyPlane
from .marks import KUBELET_DROP, Marks
from .options import parse_options
from .rehearsal import Rehearsal, Step
from .servers import ByMark
from .shape import shape_of
from .system import System
from .tables import choose

_EXTENSIONS = (
    ("-m", "ipvs", "--ipvs"),
    ("-m", "set", "--match-set"),
    ("-j", "SET", "--map-set"),
    ("-m", "connmark", "--mark"),
    ("-j", "CONNMARK", "--save-mark"),
)
_SET_MARK = re.compile(r"^-A (\S+) .*-j (?:MARK|CONNMARK) --set-x?mark 0x([0-9a-f]+)/0x([0-9a-f]+)$")


def probe(context: BackendContext) -> Probe:
    """What stands against the backend here; nothing is changed, but the kernel may load extensions of iptables."""
    try:
        options = parse_options(context.options)
        tools = choose(context.families, options)
        marks = [shape_of(context.host, family).marks for family in context.families]
    except (ConfigError, KernelError) as error:
        return Probe(problems=(str(error),))
    problems: list[str] = []
    warnings: list[str] = []
    if not ipvs.there() and not _has_module("ip_vs"):
        problems.append("this kernel has no IPVS: neither is it there nor a module ip_vs for it")
    for one in tools.values():
        lacking = xtables.missing_rights(one.variant)
        if lacking:
            problems.append(f"{one} needs {' and '.join(lacking)}, which this process lacks")
            continue
        for kind, name, option in _EXTENSIONS:
            why = xtables.lacks(one, kind, name, option)  # type: ignore[arg-type]
            if why:
                problems.append(f"{one} cannot use {name}: {why}")
        warnings += _overlaps(one, marks[0])
    facts = {"iptables": next(iter(tools.values())).variant, "scheduler": options.scheduler}
    if not ipvs.there():
        facts["ip_vs"] = "will be loaded"
    if options.strict_arp:
        facts["strictARP"] = "nothing to do: no address of a Service is put on an interface"
    return Probe(problems=tuple(problems), warnings=tuple(dict.fromkeys(warnings)), facts=facts)


def _has_module(name: str) -> bool:
    """Is there one to be loaded, or is it part of the kernel?"""
    folder = Path("/lib/modules", os.uname().release)
    for file in ("modules.dep", "modules.builtin"):
        try:
            if f"/{name}.ko" in (folder / file).read_text():
                return True
        except OSError:
            continue
    return False


def _overlaps(tools: Tools, marks: Marks) -> tuple[str, ...]:
    """Rules of others that set bits of the mark which are ours."""
    try:
        found = xtables.save(tools, lambda lines: _masks(lines, marks), tables=netrules.TABLES)
    except KernelError as error:
        return (f"{tools}: marks of others are unknown: {error}",)
    return marks.overlaps(found)


def _masks(lines: Iterable[str], marks: Marks) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in lines:
        match = _SET_MARK.match(line.rstrip())
        if match is None or match[1].startswith("PX-"):
            continue
        mask = (int(match[2], 16) | int(match[3], 16)) & 0xFFFFFFFF
        # kube-proxy's and the kubelet's, which mean the same as ours or are left alone.
        if mask not in (marks.masquerade, KUBELET_DROP):
            found[f"chain {match[1]}"] = mask
    return found


def render(context: BackendContext, batch: ChangeBatch) -> str:
    """Native text of a full batch on an empty host, in the order in which it would be brought into force."""
    lines: list[str] = []
    tool = ""
    for step, _ in _rehearsed(context, batch, None):
        if step.tool != tool:
            tool = step.tool
            lines.append(f"# {tool}")
        lines.append(step.native)
    return "".join(f"{line}\n" for line in lines)


def plan(system: System, context: BackendContext, batch: ChangeBatch) -> tuple[Operation, ...]:
    """From what is there to the batch."""
    return tuple(
        Operation(verb=step.verb, native=f"{step.tool}: {step.native}", service=service)
        for step, service in _rehearsed(context, batch, system)
    )


def _rehearsed(
    context: BackendContext, batch: ChangeBatch, under: System | None
) -> Iterator[tuple[Step, str | None]]:
    options = parse_options(context.options)
    host = batch.host.after if batch.host else context.host
    for family in context.families:
        stage = Rehearsal((family,), under)
        plane = FamilyPlane(family, stage, options)
        changes = {c.name: c.after for c in batch.changes if c.name.family == family}
        plane.bring(changes, host, 0.0, full=True, host_changed=True)
        for step in stage.steps:
            owner = plane.owner_of(step.key) if isinstance(step.key, ByMark) else None
            yield step, str(owner) if owner else None
