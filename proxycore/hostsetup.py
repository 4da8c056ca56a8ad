"""Setting the host's knobs at a start, and saying what could not be set.

`proxyctl run` does what it may and goes on; `proxyctl run --init-only`, in an init container with all rights, insists.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .config.model import Config
from .hostplan import ROUTE_LOCALNET, Setting, plan
from .kernel import sysctl
from .logs import Log


def prepare(
    config: Config,
    *,
    log: Log,
    strict: bool,
    route_localnet: bool = False,
    root: Path = Path("/"),
    cpus: int | None = None,
) -> bool:
    """Set conntrack's limits and timeouts, and this process's `oom_score_adj`; True when nothing that matters is missing.

    `strict` is for `--init-only`: each knob that should have been set and could not is an error in the log, and the
    result False; those that nobody can set in this network namespace excepted, and this process's own left out.  Without
    it one line names them all, and the result is always True.  `route_localnet` as in `plan`.  Raises nothing.
    """
    settings = plan(config, sysctl.online_cpus() if cpus is None else cpus, route_localnet=route_localnet)
    return _apply(settings, log, strict, root)


def route_loopback(config: Config, *, log: Log, root: Path = Path("/")) -> bool:
    """Let the kernel route packets of loopback addresses, where node ports are served on them.  As prepare(), not strict."""
    settings = [item for item in plan(config, 1, route_localnet=True) if item.path == ROUTE_LOCALNET]
    return _apply(settings, log, False, root) if settings else True


def _apply(settings: Sequence[Setting], log: Log, strict: bool, root: Path) -> bool:
    if strict:
        settings = [setting for setting in settings if not setting.ours]
    outcome = sysctl.apply(settings, root)
    if outcome.written:
        log.info(
            "the host's knobs are set",
            knobs=[f"{w.setting.name} {w.before} -> {w.setting.value}" for w in outcome.written],
        )
    failed = [left for left in outcome.left if strict and left.cause != "namespace"]
    for left in failed:
        log.error(
            "a knob of the host cannot be set",
            knob=left.setting.path,
            value=left.setting.value,
            wanted_by=left.setting.why,
            error=left.why,
            do=_ADVICE.get(left.cause, f"correct {left.setting.why} in the configuration"),
        )
    rest = [left for left in outcome.left if left not in failed]
    if rest:
        log.info(
            "knobs of the host stay as they are",
            knobs=[f"{left.setting.name}={left.setting.value}: {left.why}" for left in rest],
            do="nothing, if they are set by the node's own means; else `proxyctl run --init-only` in a privileged init "
            "container sets those of the host",
        )
    return not failed


_ADVICE = {
    "denied": "run it as root of the host with /proc/sys and /sys writable (a privileged container)",
    "missing": "load the kernel module nf_conntrack, or set the field to 0 to leave the knob alone",
}
