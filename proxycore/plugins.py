"""Which plugins are installed, and loading the chosen ones.

Plugins are found by the entry points of three groups, without importing any of them:

    [project.entry-points."proxycore.backends"]    programs the kernel; exactly one is active
    [project.entry-points."proxycore.plugins"]     observers
    [project.entry-points."proxycore.sources"]     deliver Kubernetes objects

An entry point names a callable that takes no argument and returns the plugin object.  A backend's top-level
package also ships `backend.toml`, its static facts, which are read without importing the package:

    name = "nft"                        # the entry point's name
    summary = "nf_tables maps, written by netlink"          # one line
    api = ">=0.1,<0.2"         # versions of the contract (proxycore.api.API_VERSION) that it works with
    capabilities = ["ipv4", "tcp"]   # values of proxycore.api.Capability; what is not listed is unsupported
    conntrack = true          # the kernel tracks its connections (default true) needs = ["kernel 5.13"]
    # what the host must have, in words (default none) requires_root = true        # `run` needs root or the
    capabilities in `needs` (default true) state = "available"         # or "planned": there is nothing in it
    yet (default available)

Clauses of `api` are joined by commas and use >=, >, <=, <, == or != with dotted numbers.  What describe()
returns must agree in name, api, capabilities and conntrack.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import operator
import os
import re
import tomllib
from collections.abc import Callable, Collection, Iterable
from typing import Literal, NamedTuple, TypeVar

import msgspec

from .backend import API_VERSION, BackendInfo, Capability
from .cell import BackendCell, Cell, SourceCell, Trace, cause_of
from .errors import ConfigError, PluginError
from .hookspecs import BackendSpec, ObserverSpec, SourceSpec

Group = Literal["proxycore.backends", "proxycore.plugins", "proxycore.sources"]
BACKENDS: Group = "proxycore.backends"
OBSERVERS: Group = "proxycore.plugins"
SOURCES: Group = "proxycore.sources"

_KINDS: dict[Group, str] = {BACKENDS: "backend", OBSERVERS: "observer", SOURCES: "source"}

_ARGUMENTS = {
    "file": "file:DIR, with a folder or a file of manifests",
    "recording": "recording:FILE, with a file that `proxyctl record` wrote",
}
"""Sources of ours that are nothing without an argument, and how they are written."""

_CellType = TypeVar("_CellType", bound=Cell)


class BackendFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `backend.toml` says."""

    name: str
    summary: str
    api: str
    capabilities: tuple[str, ...]
    conntrack: bool = True
    needs: tuple[str, ...] = ()
    adopts: tuple[Literal["nftables", "iptables", "ipvs"], ...] = ()
    requires_root: bool = True
    state: Literal["available", "planned"] = "available"

    @property
    def info(self) -> BackendInfo:
        """The same in the contract's words."""
        return BackendInfo(
            name=self.name,
            summary=self.summary,
            api=self.api,
            capabilities=frozenset(Capability(value) for value in self.capabilities),
            conntrack=self.conntrack,
            needs=self.needs,
            adopts=self.adopts,
        )


class Found(NamedTuple):
    """An entry point: not imported.

    `distribution` is package and version, `target` is `module:attribute`.
    """

    group: Group
    name: str
    distribution: str
    target: str


class Listed(NamedTuple):
    """A plugin as lists show it.

    `facts` for usable backends; `problem` says why the plugin cannot be used, as far as can be told
    unimported.
    """

    found: Found
    facts: BackendFacts | None
    problem: str | None


class Observers(NamedTuple):
    """Observers that were loaded, and those that were not, each with its reason."""

    cells: tuple[Cell, ...]
    problems: tuple[PluginError, ...]


def find(group: Group) -> tuple[Found, ...]:
    """Every entry point of a group, by name and distribution."""
    found = {Found(group, entry.name, _origin(entry), entry.value) for entry in _entry_points(group)}
    return tuple(sorted(found))


def backend_names() -> list[str]:
    """Names of the installed backends; imports none."""
    return sorted({found.name for found in find(BACKENDS)})


def source_names() -> list[str]:
    """Names of the installed sources; imports none."""
    return sorted({found.name for found in find(SOURCES)})


def list_plugins(group: Group = BACKENDS) -> tuple[Listed, ...]:
    """Every plugin of a group with what can be told without importing it."""
    return tuple(_listed(found) for found in find(group))


def read_facts(found: Found) -> BackendFacts:
    """A backend's `backend.toml`, checked.

    Raises PluginError: it is missing, wrong, or made for another version of the contract; nothing was
    imported.
    """
    data = _read_toml(found)
    api = data.get("api")
    # First, as the other fields of a file that was made for another version may mean something else.
    if isinstance(api, str):
        _check_api(found, api)
    try:
        facts = msgspec.convert(data, BackendFacts)
    except msgspec.ValidationError as error:
        raise _error(found, f"backend.toml: {error}") from error
    if facts.name != found.name:
        raise _error(
            found, f"backend.toml: its name is {facts.name!r}, but the entry point's is {found.name!r}"
        )
    known = [capability.value for capability in Capability]
    for value in facts.capabilities:
        if value not in known:
            raise _error(
                found,
                f"backend.toml: there is no capability {value!r}{_nearest(value, known) or _among(known)}",
            )
    return facts


def check_backend(name: str) -> tuple[Found, BackendFacts]:
    """A backend that can be loaded as far as can be told without importing it.

    Raises PluginError: it is missing, claimed twice, planned or incompatible; the message says what to do.
    """
    found = choose(BACKENDS, name)
    facts = read_facts(found)
    if facts.state == "planned":
        raise _error(found, f"the {name} backend is not written yet; {_available()}")
    return found, facts


def check_source(source: str) -> Found:
    """The source of `NAME` or `NAME:ARGUMENT`, as far as can be told without importing it.

    Raises ConfigError: one of ours stands there without the argument that it needs.
    Raises PluginError: it is missing or claimed twice.
    """
    name, _, argument = source.partition(":")
    if not argument and name in _ARGUMENTS:
        raise ConfigError(f"{source!r} is not complete: write {_ARGUMENTS[name]}", field="source")
    return choose(SOURCES, name)


def load_backend(name: str, trace: Trace | None = None) -> BackendCell:
    """Import one backend, and no other.

    Raises PluginError as check_backend() does, or because it is broken.
    """
    found, facts = check_backend(name)
    cell = _load(found, BackendSpec, BackendCell, trace)
    cell.info = cell.describe()
    for field in ("name", "api", "capabilities", "conntrack", "adopts"):
        described, written = getattr(cell.info, field), getattr(facts.info, field)
        if described != written:
            raise cell.error(
                f"describe() and backend.toml disagree on {field}: {_shown(described)} and {_shown(written)}"
            )
    return cell


def load_observers(
    enabled: Iterable[str] | None = None,
    disabled: Collection[str] = (),
    trace: Trace | None = None,
) -> Observers:
    """Import the observers named, or all that are installed, except the disabled ones.

    `safe`: only those that come with proxycore itself.  A broken one is left out and told; it keeps none of
    the others from being loaded.
    """
    names = sorted({found.name for found in find(OBSERVERS)} if enabled is None else set(enabled))
    cells: list[Cell] = []
    problems: list[PluginError] = []
    for name in names:
        if name in disabled:
            continue
        try:
            cells.append(_load(choose(OBSERVERS, name), ObserverSpec, Cell, trace))
        except PluginError as error:
            problems.append(error)
    return Observers(tuple(cells), tuple(problems))


def load_source(name: str, trace: Trace | None = None) -> SourceCell:
    """Import one source.  Raises PluginError: it is missing, claimed twice or broken."""
    return _load(choose(SOURCES, name), SourceSpec, SourceCell, trace)


def _load(found: Found, spec: type, cell: type[_CellType], trace: Trace | None) -> _CellType:
    """Import a plugin and put what its factory makes into a cell.

    A plugin that ends the process, or raises anything at all, while it is imported is only a broken plugin.
    """
    entry = importlib.metadata.EntryPoint(found.name, found.target, found.group)
    try:
        factory = entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _error(found, f"cannot be imported: {cause_of(error)}") from error
    if not callable(factory):
        raise _error(
            found, f"its entry point {found.target} is not callable; it must name a factory of the plugin"
        )
    try:
        plugin = factory()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _error(found, f"its factory {found.target} failed: {cause_of(error)}") from error
    return cell(plugin, spec, name=found.name, distribution=found.distribution, trace=trace)


def choose(group: Group, name: str) -> Found:
    """The one entry point of that name; imports nothing.

    Raises PluginError: there is none, with those that are there, or more than one, with where they come from.
    """
    kind = _KINDS[group]
    everything = find(group)
    found = [entry for entry in everything if entry.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise PluginError(name, f"{_claimants(found)}; uninstall one of them")
    names = sorted({entry.name for entry in everything})
    there = f"installed: {', '.join(names)}" if names else "none is installed"
    raise PluginError(
        name,
        f"there is no such {kind} ({there}){_nearest(name, names)}; choose one of these, or pip install the package "
        "that brings it where proxyctl is",
    )


def _listed(found: Found) -> Listed:
    rivals = [entry for entry in find(found.group) if entry.name == found.name]
    problem = _claimants(rivals) if len(rivals) > 1 else None
    if found.group != BACKENDS:
        return Listed(found, None, problem)
    try:
        facts = read_facts(found)
    except PluginError as error:
        return Listed(found, None, problem or error.reason)
    return Listed(found, facts, problem)


def _available() -> str:
    names = [entry.found.name for entry in list_plugins() if entry.facts and entry.facts.state == "available"]
    return f"available: {', '.join(names)}" if names else "no other one is installed"


def _claimants(found: list[Found]) -> str:
    return f"the name is claimed by {' and '.join(entry.distribution for entry in found)}"


def _entry_points(group: Group) -> list[importlib.metadata.EntryPoint]:
    """Entry points of a group; a distribution whose metadata cannot be read brings none."""
    try:
        return list(importlib.metadata.entry_points(group=group))
    except Exception:  # noqa: BLE001  one broken distribution must not hide the others
        entries: list[importlib.metadata.EntryPoint] = []
        for distribution in importlib.metadata.distributions():
            try:
                entries += [entry for entry in distribution.entry_points if entry.group == group]
            except Exception:  # noqa: BLE001
                continue
        return entries


def _origin(entry: importlib.metadata.EntryPoint) -> str:
    dist = entry.dist
    return f"{dist.name} {dist.version}" if dist is not None else "an unknown distribution"


def _read_toml(found: Found) -> dict[str, object]:
    package = found.target.partition(":")[0].partition(".")[0].strip()
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError) as error:
        raise _error(found, f"its package {package} cannot be found: {cause_of(error)}") from error
    if spec is None:
        raise _error(found, f"its package {package} is not there; install {found.distribution} again")
    for folder in spec.submodule_search_locations or ():
        path = os.path.join(folder, "backend.toml")
        try:
            raw = _read(spec.loader, path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _error(found, f"{path}: {error.strerror or error}") from error
        try:
            return tomllib.loads(raw.decode())
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise _error(found, f"{path}: {error}") from error
    raise _error(found, f"its package {package} ships no backend.toml")


def _read(loader: object, path: str) -> bytes:
    """Through the loader, so that a package in a zip file works."""
    get_data: Callable[[str], bytes] | None = getattr(loader, "get_data", None)
    if get_data is not None:
        return get_data(path)
    with open(path, "rb") as file:
        return file.read()


_CLAUSE = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*(\d+(?:\.\d+)*)\s*")
_Numbers = tuple[int, ...]
_COMPARE: dict[str, Callable[[_Numbers, _Numbers], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


def api_admits(api: str, version: str = API_VERSION) -> bool:
    """Does the range admit the version?  Raises ValueError: it is no range."""
    admitted = True
    for clause in api.split(","):
        match = _CLAUSE.fullmatch(clause)
        if match is None:
            raise ValueError(f"{clause.strip()!r} is not a clause such as '>=0.1'")
        admitted &= _COMPARE[match[1]](_numbers(version), _numbers(match[2]))
    return admitted


def _numbers(version: str) -> _Numbers:
    """Trailing zeros do not count: 0.1 is 0.1.0."""
    numbers = [int(part) for part in version.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _check_api(found: Found, api: str) -> None:
    try:
        admitted = api_admits(api)
    except ValueError as error:
        raise _error(found, f"backend.toml: api: {error}") from error
    if not admitted:
        raise _error(
            found,
            f"is made for version {api} of the plugin contract, and this proxycore has {API_VERSION}; "
            "install versions of the two that fit",
        )


def _error(found: Found, reason: str) -> PluginError:
    return PluginError(found.name, reason, distribution=found.distribution)


def _nearest(value: str, known: list[str]) -> str:
    close = difflib.get_close_matches(value, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _among(known: list[str]) -> str:
    return f"; there are {', '.join(known)}"


def _shown(value: object) -> str:
    if isinstance(value, frozenset):
        return ", ".join(sorted(item.value if isinstance(item, Capability) else str(item) for item in value))
    return repr(value)
