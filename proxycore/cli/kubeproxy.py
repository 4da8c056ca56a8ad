"""`proxyctl kube-proxy`: kube-proxy's command line, with its own precedence.

Semantics: cmd/kube-proxy's Options.Complete and Options.Run.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .. import __version__
from ..errors import ConfigError, PluginError, ProxyError
from .exits import Exit, printable, say
from .kubeflags import FLAGS, SHAPES, help_text
from .output import emit
from .pflags import Given, parse

if TYPE_CHECKING:
    from ..config import Loaded
    from ..options import RunOptions

PROGRAM = "kube-proxy"
"""Called by this name, the program takes this command line."""

_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})
_USUAL_ADDRESS = {"healthz": ("0.0.0.0", "::"), "metrics": ("127.0.0.1", "::1")}
_HELP = "; see `proxyctl kube-proxy --help`"


class Line(NamedTuple):
    """What a command line says.

    `flags`: by kube-proxy's name of the flag, or by field path, for config.load().  `warnings`: a sentence each.
    """

    config: str
    write_config_to: str
    cleanup: bool
    init_only: bool
    version: str
    help: bool
    flags: Mapping[str, object]
    warnings: tuple[str, ...]


def read_line(arguments: Sequence[str]) -> Line:
    """Take a command line apart.  Raises ConfigError: it makes no sense; the message is for people."""
    try:
        parsed = parse(arguments, SHAPES)
        if any(parsed.rest):
            raise ValueError(f"{next(filter(None, parsed.rest))!r}: kube-proxy takes flags only")
        given: dict[str, list[Given]] = {}
        for flag in parsed.flags:
            given.setdefault(flag.name, []).append(flag)
        return _line(given)
    except ValueError as error:
        raise ConfigError(f"{error}{_HELP}") from None


def run_kube_proxy(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Do what the command line says; the exit code."""
    line = read_line(arguments)
    if line.help:
        emit(help_text())
        return Exit.OK
    if line.version:
        emit(_version(line.version))
        return Exit.OK
    if line.write_config_to:
        return _write_config(line, environ)
    if line.cleanup:
        return _clean_up(line, environ)
    from .live import run_until_stopped

    options = options_of_line(line, environ)
    _check_backend(options.config, line)
    return run_until_stopped(options)


# -- what the line says ---------------------------------------------------------------------------------------------


def _line(given: Mapping[str, list[Given]]) -> Line:
    config = _last(given, "config")
    flags: dict[str, object] = {}
    warnings: list[str] = []
    for name, uses in given.items():
        flag = FLAGS[name]
        if flag.kind == "bool":
            _boolean(uses[-1])
        if flag.role == "nothing":
            warnings.append(f"--{name}: has no effect: {flag.help}")
        elif flag.role == "setting" and config:
            warnings.append(f"--{name}: has no effect beside --config: write it into the file")
        elif flag.role != "job":
            _take(name, uses, flags)
    written = _last(given, "write-config-to")
    if not config:
        for server in ("healthz", "metrics"):
            if written and f"{server}-port" in given:
                warnings.append(f"--{server}-port: does not go into the file that is written")
            else:
                _take_port(server, given, flags, warnings)
    return Line(
        config=config,
        write_config_to=written,
        cleanup=_is_on(given, "cleanup"),
        init_only=_is_on(given, "init-only"),
        version=_version_wanted(_last(given, "version")),
        help=_is_on(given, "help"),
        flags=flags,
        warnings=tuple(warnings),
    )


def _last(given: Mapping[str, list[Given]], name: str) -> str:
    return given[name][-1].value.strip() if name in given else ""


def _is_on(given: Mapping[str, list[Given]], name: str) -> bool:
    return name in given and _boolean(given[name][-1])


def _boolean(use: Given) -> bool:
    if use.value not in _TRUE | _FALSE:
        raise ValueError(f"{use.written}={use.value}: must be true or false")
    return use.value in _TRUE


def _version_wanted(text: str) -> str:
    if text in _FALSE or not text:
        return ""
    if text not in _TRUE and text != "raw":
        raise ValueError(f"--version={text}: must be true, false or raw")
    return "raw" if text == "raw" else "true"


def _take(name: str, uses: Sequence[Given], flags: dict[str, object]) -> None:
    """Put a flag where config.load() looks for it."""
    from ..config import Flag

    kind, value, where = FLAGS[name].kind, uses[-1].value, uses[-1].written
    if kind in ("list", "pairs"):
        value = ",".join(use.value for use in uses)
    if name in ("healthz-port", "metrics-port"):
        return
    if name in ("hostname-override", "master") and not value:
        return  # not given, to kube-proxy
    if name == "hostname-override" and not value.strip():
        raise ValueError(f"{where}: holds nothing but blanks")
    if name == "vmodule":
        flags["logging.vmodule"] = Flag(_vmodule(value, where), where)
    elif name.startswith(("log-text-", "log-json-")):
        _, form, option = name.split("-", 2)
        words = option.split("-")
        key = words[0] + "".join(word.capitalize() for word in words[1:])
        before = flags.get("logging.options")
        options = before.value if isinstance(before, Flag) and isinstance(before.value, dict) else {}
        options.setdefault(form, {})[key] = _boolean(uses[-1]) if FLAGS[name].kind == "bool" else value
        flags["logging.options"] = Flag(options, where)
    else:
        flags[name] = Flag(value, where)


def _vmodule(text: str, where: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        pattern, _, level = part.partition("=")
        if not pattern or not (level.isascii() and level.isdigit() and len(level) < 10):
            raise ValueError(f"{where}: {part!r} is not of the form PATTERN=N")
        found.append({"filePattern": pattern, "verbosity": int(level)})
    return found


def _take_port(
    server: str, given: Mapping[str, list[Given]], flags: dict[str, object], warnings: list[str]
) -> None:
    """The deprecated flags `healthz-port` and `metrics-port`: a port for an address without one; 0: off."""
    from ..config import Flag

    uses = given.get(f"{server}-port")
    if not uses:
        return
    text, where = uses[-1].value, uses[-1].written
    if not (text.isascii() and text.isdigit() and int(text[:6]) <= 65535):
        raise ValueError(f"{where}: {text!r} is no port within 0 to 65535")
    warnings.append(f"{where}: is deprecated: use --{server}-bind-address")
    name = f"{server}-bind-address"
    address = _last(given, name)
    if int(text) == 0:
        flags[name] = Flag("", where)
    elif address or name not in given:
        from ..config.values import parse_endpoint

        usual = _USUAL_ADDRESS[server][":" in _last(given, "bind-address")]
        # A wrong address is the affair of its own flag.
        with contextlib.suppress(ValueError):
            flags[name] = Flag(parse_endpoint(address or usual, int(text)), f"--{name}" if address else where)


# -- what it makes --------------------------------------------------------------------------------------------------


def options_of_line(line: Line, environ: Mapping[str, str]) -> RunOptions:
    """Options of `run`, with kube-proxy's precedence.  Raises ConfigError: one message with file, field and reason."""
    import msgspec

    from ..config import load
    from ..config.field import KUBE_PROXY
    from ..config.fields import ENVIRONMENT
    from ..options import config_files, options_of

    theirs = {name for name, field in ENVIRONMENT.items() if field.document == KUBE_PROXY}
    passed_over = sorted(name for name in theirs if environ.get(name, "").strip())
    ours = {name: value for name, value in environ.items() if name not in theirs}
    warnings = line.warnings + tuple(
        f"{name}: has no effect on kube-proxy's command line: write {ENVIRONMENT[name].path} into the file"
        for name in passed_over
    )
    files = config_files([line.config] if line.config else [], environ)

    def reload() -> Loaded:
        loaded = load(files, line.flags, ours)
        return msgspec.structs.replace(loaded, warnings=warnings + loaded.warnings)

    return options_of(reload, files, init_only=line.init_only)


def _check_backend(loaded: Loaded, line: Line) -> None:
    """The backend can be loaded, as far as can be told.  Raises PluginError that says how to choose another one."""
    from ..config.kubeproxy import MODES
    from ..plugins import check_backend

    try:
        check_backend(loaded.config.backend)
    except PluginError as error:
        config, there = loaded.config, _available()
        modes = [mode for mode, backend in MODES.items() if backend in there]
        if config.backend != MODES[config.mode] or not there:
            raise
        if line.config:
            ways = [f"write `mode: {mode}` into {printable(line.config)}" for mode in modes]
        else:
            ways = [f"give --proxy-mode={mode}" for mode in modes]
        ways.append(f"set PROXYCORE_BACKEND to {' or '.join(there)} in the environment")
        reason = (
            f"{error.reason}; the mode {config.mode} stands for it ({loaded.origin_and_place('mode')}): "
            f"{', or '.join(ways)}"
        )
        raise PluginError(error.plugin, reason, distribution=error.distribution) from error


def _available() -> list[str]:
    """Backends that can be chosen, as far as can be told."""
    from ..plugins import list_plugins

    listed = [entry for entry in list_plugins() if entry.facts and entry.facts.state == "available"]
    return [entry.found.name for entry in listed if not entry.problem]


def _version(form: str) -> str:
    if form == "true":
        return f"Kubernetes-compatible: proxycore {__version__}\n"
    from ..backend import API_VERSION

    return f"proxycore={__version__} plugin-contract={API_VERSION} python={platform.python_version()}\n"


def _write_config(line: Line, environ: Mapping[str, str]) -> int:
    """Our own document is written only if there is something in it."""
    from ..config import dump
    from ..config.field import KUBE_PROXY, PROXYCORE
    from ..config.fields import BY_PATH

    loaded = options_of_line(line, environ).config
    for warning in loaded.warnings:
        say(f"warning: {warning}")
    ours = any(
        origin != "default" and BY_PATH[path].document == PROXYCORE and not _follows_mode(path, loaded)
        for path, origin in loaded.origins.items()
    )
    text = dump(loaded, documents=(KUBE_PROXY, PROXYCORE) if ours else (KUBE_PROXY,))
    Path(line.write_config_to).write_text(text)
    say(f"configuration written to {line.write_config_to}")
    return Exit.OK


def _follows_mode(path: str, loaded: Loaded) -> bool:
    """Is it the backend that the mode stands for?"""
    from ..config.kubeproxy import MODES

    return path == "backend" and loaded.config.backend == MODES[loaded.config.mode]


def _clean_up(line: Line, environ: Mapping[str, str]) -> int:
    """As kube-proxy: 1 if anything could not be removed."""
    from .lists import clean_up
    from .output import Format

    options = options_of_line(line, environ)
    try:
        clean_up(options, None, Format.TABLE)
    except ProxyError as error:
        say(f"error: {error}")
        return Exit.FAILED
    return Exit.OK
