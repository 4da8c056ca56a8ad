"""What `proxyctl run` and its relatives were asked to do."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from .config import Flag, Loaded, fingerprint, load
from .config.load import FILES_VARIABLE
from .config.model import Takeover
from .errors import ConfigError
from .logs import Format as LogFormat
from .source import APIServer

API_SOURCE = "kubernetes"
"""The source whose argument is a context of the kubeconfig."""


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `run` parses, files, environment and defaults already worked in.

    `source` is `NAME` or `NAME:ARGUMENT`.  `pace`: speed of a recording, None at once.  `safe`: only
    observers that come with proxycore itself are loaded.  `init_only`: end once what needs rights has been done.
    `files`: the configuration files, whose content `fingerprint` stands for, as of just before they were read;
    `reload` reads them again, with the same flags and environment, and raises ConfigError as at the start.
    """

    config: Loaded
    backend: str
    source: str
    node_name: str
    takeover: Takeover = "auto"
    pace: float | None = None
    trace_hooks: bool = False
    log_format: LogFormat = "text"
    verbosity: int = 0
    safe: bool = False
    init_only: bool = False
    files: tuple[Path, ...] = ()
    fingerprint: str = ""
    reload: Callable[[], Loaded] | None = None

    @property
    def source_name(self) -> str:
        """The source plugin's name."""
        return self.source.partition(":")[0]

    @property
    def source_argument(self) -> str:
        """What stands behind the colon of the source."""
        return self.source.partition(":")[2]

    @property
    def api_server(self) -> APIServer:
        """How the source reaches the API server."""
        config = self.config.config
        return APIServer(
            kubeconfig=config.kubeconfig,
            context=(self.source_name == API_SOURCE and self.source_argument) or config.kube_context,
            master=config.master,
            qps=config.client_qps,
            burst=config.client_burst,
        )


def config_files(files: Sequence[str], environ: Mapping[str, str]) -> tuple[Path, ...]:
    """The configuration files that were named, and those that the environment names beside them."""
    more = [part.strip() for part in environ.get(FILES_VARIABLE, "").split(",")]
    return tuple(Path(file) for file in dict.fromkeys([*files, *filter(None, more)]))


def resolve(
    files: Sequence[str],
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    *,
    pace: float | None = None,
    trace_hooks: bool = False,
    safe: bool = False,
    init_only: bool = False,
) -> RunOptions:
    """Options from configuration files, flags by field path (`logging.format`) and environment.

    Raises ConfigError: one message with file, field and reason; nothing was touched.
    """
    paths, flags, environ = config_files(files, environ), dict(flags), dict(environ)
    return options_of(
        lambda: load(paths, flags, environ),
        paths,
        pace=pace,
        trace_hooks=trace_hooks,
        safe=safe,
        init_only=init_only,
    )


def options_of(
    reload: Callable[[], Loaded],
    files: Sequence[Path],
    *,
    pace: float | None = None,
    trace_hooks: bool = False,
    safe: bool = False,
    init_only: bool = False,
) -> RunOptions:
    """Options from what `reload` makes of these files.  Raises ConfigError as it does."""
    before = fingerprint(files)
    loaded = reload()
    config = loaded.config
    if not config.source.partition(":")[0]:
        raise ConfigError(f"{config.source!r} is no source: write NAME or NAME:ARGUMENT", field="source")
    return RunOptions(
        config=loaded,
        backend=config.backend,
        source=config.source,
        node_name=config.node_name(socket.gethostname()),
        takeover=config.takeover,
        pace=pace,
        trace_hooks=trace_hooks,
        log_format=config.log_format,
        verbosity=config.log_verbosity,
        safe=safe,
        init_only=init_only,
        files=tuple(files),
        fingerprint=before,
        reload=reload,
    )


def assignments(pairs: Sequence[str]) -> dict[str, Flag]:
    """`FIELD=VALUE` texts of `--set` as a mapping.  Raises ConfigError: one is not of that form."""
    result: dict[str, Flag] = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        if not equals or not field:
            raise ConfigError(f"--set {pair!r}: write FIELD=VALUE, such as clusterCIDR=10.244.0.0/16")
        result[field] = Flag(value, f"--set {field}")
    return result
