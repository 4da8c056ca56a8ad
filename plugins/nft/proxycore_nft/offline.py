"""What needs no started backend: probing the host, rendering a state as text, planning the way to it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

from proxycore.api import (
    BackendContext,
    ChangeBatch,
    Family,
    HostState,
    KernelError,
    Operation,
    Probe,
    ServicePortName,
)

from . import adopt, classes, layout, native, rows, skeleton
from .entry import TooMany
from .host import host_elements
from .kernel import Element, Kernel
from .program import HOST_SETS, INTERVAL_SETS, Stage, Table
from .transaction import Transaction


def probe(open_kernel: Callable[[], Kernel], context: BackendContext) -> Probe:
    """Ask nft to check the skeleton against this kernel, and look for other owners of Services; nothing is loaded."""
    facts: dict[str, str] = {}
    problems: list[str] = []
    try:
        version = _run(["nft", "--version"], "")
        facts["nft"] = version.stdout.strip().removeprefix("nftables ")
        text = "".join(
            skeleton.table_text(shape, "proxycore-probe") + skeleton.hook_text(shape, "proxycore-probe")
            for shape in (skeleton.shape_of(context.host, family) for family in context.families)
        )
        checked = _run(["nft", "--check", "-f", "-"], text)
        if checked.returncode:
            problems.append(f"nft cannot load our tables: {' '.join(checked.stderr.split())[:300]}")
        else:
            _census(open_kernel, context, problems)
    except FileNotFoundError:
        problems.append("the program nft is not installed (package nftables)")
    except subprocess.TimeoutExpired:
        problems.append("nft did not answer within 20 s")
    except KernelError as error:
        problems.append(str(error))
    return Probe(problems=tuple(problems), facts=facts)


def _census(open_kernel: Callable[[], Kernel], context: BackendContext, problems: list[str]) -> None:
    """Is an earlier run of ours in force here?  Matters for `refuse`; of kube-proxy the core tells."""
    if context.takeover != "refuse":
        return
    kernel = open_kernel()
    try:
        for nft in ("ip", "ip6"):
            problems.extend(
                f"table {nft} {live.name} of an earlier run is in force (takeover: refuse)"
                for live in adopt.survey(kernel, nft)
                if live.hooked
            )
    finally:
        kernel.close()


def _run(command: list[str], text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=text, text=True, capture_output=True, timeout=20, check=False)


def _stage(table: Table, batch: ChangeBatch, host: HostState) -> Stage:
    stage = Stage(table, Transaction())
    for usual in classes.USUAL:
        if usual not in table.classes:
            stage.make_class(usual)
    for change in batch.changes:
        if change.name.family == table.family and change.after is not None:
            try:
                stage.put(change.name, change.after)
            except TooMany:
                continue
    if not table.classes:
        stage.make_neighbours()
    stage.host(host_elements(host, table.family))
    stage.finish()
    return stage


def render(context: BackendContext, batch: ChangeBatch) -> str:
    """The tables as `nft list ruleset` would show them after a start with this state."""
    host = batch.host.after if batch.host else context.host
    parts: list[str] = []
    for family in context.families:
        shape = skeleton.shape_of(host, family)
        table = Table(family, layout.TABLES[0])
        stage = _stage(table, batch, host)
        stage.commit()
        parts.append(skeleton.table_text(shape, table.name))
        parts.append(skeleton.hook_text(shape, table.name))
        parts.append(f"table {table.nft} {table.name} {{\n")
        helpers: set[str] = set()
        for item in sorted(table.classes):
            parts.extend(f"\t{line}\n" for line in classes.text(table.nft, item, helpers))
        parts.append("}\n")
        for name, elements in _by_set(table, stage).items():
            lines = ",\n".join(f"\t{line}" for line in elements)
            if lines:
                parts.append(f"add element {table.nft} {table.name} {name} {{\n{lines}\n}}\n")
    return "".join(parts)


def _by_set(table: Table, stage: Stage) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    comments = {name: item.comment for name, item in table.entries.items()}
    seen: set[tuple[str, bytes, object]] = set()
    for row in rows.table_rows(table):
        if (row.set, row.key, row.value) in seen:
            continue
        seen.add((row.set, row.key, row.value))
        comment = comments.get(row.owner, "") if row.owner and row.set in ("frontends", "node-ports") else ""
        found.setdefault(row.set, []).append(rows.row_text(table, row, comment))
    for name in HOST_SETS:
        found.setdefault(name, []).extend(_host_texts(table, name))
    return found


def plan(kernel: Kernel, context: BackendContext, batch: ChangeBatch) -> tuple[Operation, ...]:
    """Kernel operations from what is there to the batch."""
    host = batch.host.after if batch.host else context.host
    return tuple(
        operation for family in context.families for operation in _plan_family(kernel, family, host, batch)
    )


def _plan_family(kernel: Kernel, family: Family, host: HostState, batch: ChangeBatch) -> Iterator[Operation]:
    shape = skeleton.shape_of(host, family)
    nft = layout.NFT_FAMILY[family]
    live = next((item for item in adopt.survey(kernel, nft) if item.hooked), None)
    fits = live is not None and live.complete and live.digest == skeleton.digest(shape)
    name = layout.TABLES[0]
    if live is not None:
        name = live.name if fits else next(n for n in layout.TABLES if n != live.name)
    table = Table(family, name)
    if live is not None:
        adopt.recall(kernel, nft, live.name, table)
    present: dict[str, dict[bytes, Element]] = {}
    ranges: dict[str, list[str]] = {}
    if fits:
        adopt.recall_classes(kernel, nft, name, table)
        adopt.recall_slots(kernel, nft, name, table)
        present = {
            s: _present(kernel, nft, name, s) for s in (*rows.SERVICE_SETS, "node-addresses", "classes")
        }
        ranges = {s: native.interval_texts(nft, s, kernel.elements(nft, name, s)) for s in INTERVAL_SETS}
    else:
        yield Operation(verb="add", native=f"table {nft} {name} (skeleton {skeleton.digest(shape)})")
    stage = _stage(table, batch, host)
    stage.commit()
    yield from _plan_elements(table, present)
    yield from _plan_ranges(table, ranges)
    if live is not None and not fits:
        yield Operation(verb="delete", native=f"table {nft} {live.name}")


def _present(kernel: Kernel, nft: str, table: str, name: str) -> dict[bytes, Element]:
    try:
        return {rows.identity_of(name, e): e for e in kernel.elements(nft, table, name)}
    except KernelError:
        return {}


def _plan_elements(table: Table, present: dict[str, dict[bytes, Element]]) -> Iterator[Operation]:
    seen: set[tuple[str, bytes]] = set()
    for row in rows.table_rows(table):
        identity = rows.identity(row.set, row.key, row.value)
        if (row.set, identity) in seen:
            continue
        seen.add((row.set, identity))
        there = present.get(row.set, {}).pop(identity, None)
        if there is not None and rows.value_of(there) == row.value:
            continue
        yield _operation(
            "add" if there is None else "replace", table, row.set, rows.row_text(table, row), row.owner
        )
    for raw in table.host["node-addresses"]:
        item = native.element_from_bytes(raw)
        if present.get("node-addresses", {}).pop(rows.identity_of("node-addresses", item), None) is None:
            text = native.element_text(table.nft, "node-addresses", item)
            yield _operation("add", table, "node-addresses", text, None)
    for name, left in present.items():
        for item in left.values():
            yield _operation("delete", table, name, native.element_text(table.nft, name, item), None)


def _plan_ranges(table: Table, present: dict[str, list[str]]) -> Iterator[Operation]:
    for name in INTERVAL_SETS:
        wanted, there = _host_texts(table, name), present.get(name, [])
        for text in sorted(set(wanted) - set(there)):
            yield _operation("add", table, name, text, None)
        for text in sorted(set(there) - set(wanted)):
            yield _operation("delete", table, name, text, None)


def _host_texts(table: Table, name: str) -> list[str]:
    """The wanted elements of a set about the node."""
    elements = [native.element_from_bytes(raw) for raw in table.host[name]]
    if name in INTERVAL_SETS:
        return native.interval_texts(table.nft, name, elements)
    return [native.element_text(table.nft, name, item) for item in elements]


def _operation(verb: str, table: Table, name: str, text: str, owner: ServicePortName | None) -> Operation:
    return Operation(
        verb=verb,  # type: ignore[arg-type]
        native=f"element {table.nft} {table.name} {name} {{ {text} }}",
        service=str(owner) if owner else None,
    )
