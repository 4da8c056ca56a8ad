"""Bodies of the commands that last: run, record, demo."""

from __future__ import annotations

from .. import logs
from ..options import RunOptions
from .exits import say


def run_until_stopped(options: RunOptions) -> int:
    """`proxyctl run`."""
    from ..plugins import check_backend, check_source

    # What can be told without loading anything comes first: one message, and nothing was touched.
    check_backend(options.backend)
    check_source(options.source)
    from ..runtime import run_proxy

    logs.configure(options.log_format, options.verbosity)
    log = logs.get("config")
    for warning in options.config.warnings:
        log.warning("configuration", warning=warning)
    return run_proxy(options)


def record_events(options: RunOptions, file: str, seconds: float | None) -> None:
    """`proxyctl record`."""
    import threading

    from ..plugins import check_source, load_source
    from ..record import STDOUT, record
    from ..signals import stopping
    from ..source import SourceContext

    check_source(options.source)
    source = load_source(options.source_name).open(
        SourceContext(
            argument=options.source_argument,
            node_name=options.node_name,
            api_server=options.api_server,
            pace=options.pace,
        )
    )
    stop = threading.Event()
    timer = threading.Timer(seconds, stop.set) if seconds is not None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    with stopping(stop.set):
        count = record(source, file, stop, name=options.source)
    if timer is not None:
        timer.cancel()
    say(f"{count} events recorded to {'standard output' if file == STDOUT else file}")


def show_demo(backend: str, seconds: float | None, plain: bool) -> int:
    """`proxyctl demo`."""
    from ..plugins import check_backend

    # Before a lab is built for it.
    check_backend(backend)
    from ..demo import DEFAULT_SECONDS, demo

    return demo(
        backend=backend,
        seconds=DEFAULT_SECONDS if seconds is None else seconds,
        plain=True if plain else None,
    )
