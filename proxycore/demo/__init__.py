"""`proxyctl demo`: a cluster in network namespaces, the real proxy in it, real connections, and a verdict."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from ..errors import ProxyError

MINIMUM_SECONDS = 10.0
DEFAULT_SECONDS = 25.0


def demo(
    *,
    backend: str = "nft",
    seconds: float = DEFAULT_SECONDS,
    plain: bool | None = None,
    command: Sequence[str] | None = None,
) -> int:
    """Run the demo and print what happens; returns the process's exit status, 0 if everything was as it should be.

    `plain`: lines instead of a live picture; None: where standard output is no terminal.  `command` stands in for
    `proxyctl`, for a proxy of another make that takes the same arguments.
    Call it before any thread is started: without root it moves this process into a user namespace.
    """
    from ..testing.netns import become_root

    # ip and nft are where an ordinary user's PATH does not lead.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    try:
        become_root()
    except ProxyError as error:
        print(f"proxyctl demo: {error}", file=sys.stderr)
        return 1

    from rich.console import Console

    from .play import play
    from .proxy import PROXYCTL
    from .view import LiveView, PlainView

    console = Console(highlight=False)
    view = PlainView(console) if (plain or (plain is None and not console.is_terminal)) else LiveView(console)
    # As with Ctrl-C: leave through every `with`.
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        verdict = play(
            backend=backend, seconds=max(seconds, MINIMUM_SECONDS), view=view, command=command or PROXYCTL
        )
    except (ProxyError, OSError) as error:
        view.close()
        print(f"proxyctl demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        view.close()
        print("proxyctl demo: interrupted; everything is removed again", file=sys.stderr)
        return 130
    finally:
        view.close()
        signal.signal(signal.SIGTERM, previous)
    print()
    for fault in verdict.faults:
        print(f"WRONG: {fault}")
    print(
        f"{verdict.connections} connections and {verdict.held} exchanges over one connection held open all the time: "
        + (f"{len(verdict.faults)} kinds of fault" if verdict.faults else "every one as it should be")
    )
    return 1 if verdict.faults else 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
