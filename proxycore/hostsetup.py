"""Setting the host's knobs at a start, and saying what could not be set.

`proxyctl run` does what it may and goes on; `proxyctl run --init-only`, in an init container with all rights, insists.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from .config.model import Config
from .errors import KernelError
from .hostplan import ROUTE_LOCALNET, Setting, plan
from .kernel import loopback, sysctl
from .logs import Log


def prepare(
    config: Config,
    *,
    log: Log,
    strict: bool,
    guard: str = "",
    root: Path = Path("/"),
    cpus: int | None = None,
) -> bool:
    """Set conntrack's limits and timeouts, and this process's `oom_score_adj`; True when nothing that matters is missing.

    `strict` is for `--init-only`: each knob that should have been set and could not is an error in the log, and the
    result False; those that nobody can set in this network namespace excepted, and this process's own left out.  Without
    it one line names them all, and the result is always True.  `guard`: name of the tools in whose rules loopback addresses
    are guarded: packets of these are routed then, and their nat table says so, as in route_loopback().  Raises nothing.
    """
    settings = plan(config, sysctl.online_cpus() if cpus is None else cpus, route_localnet=bool(guard))
    if guard:
        _remember([item for item in settings if item.path == ROUTE_LOCALNET], (guard,), log, root)
    return _apply(settings, log, strict, root)


def loopback_guard(*, log: Log) -> str:
    """Behind whose guard, by name of tools, may an init container have packets of loopback addresses routed?

    Empty: behind none; one line says that the run will.
    """
    try:
        guarded = loopback.guarded()
    except KernelError as error:
        log.info(_LATER, reason=f"cannot see whether loopback addresses are guarded: {error}")
        return ""
    if not guarded:
        log.info(_LATER, reason="nothing guards loopback addresses against other hosts yet")
    return guarded


_LATER = "route_localnet stays as it is: the run sets it once its guard is in force"


def route_loopback(
    config: Config, tools: Collection[str], *, guarded: bool, log: Log, root: Path = Path("/")
) -> bool:
    """Let the kernel route packets of loopback addresses, where node ports are served on them.  As prepare(), not strict.

    `guarded`: the backend serves them, and its guard is in force; without it nothing is set.  `tools`: whose rules it has, by
    names such as `iptables-nft`; a chain in their nat table remembers, before the setting is made, that it was a run of
    ours that did it.  So it does if that stood in other rules: these may be about to go.
    """
    settings = [item for item in plan(config, 1, route_localnet=guarded) if item.path == ROUTE_LOCALNET]
    _remember(settings, tools, log, root)
    return _apply(settings, log, False, root) if settings else True


def _remember(settings: Sequence[Setting], tools: Collection[str], log: Log, root: Path) -> None:
    try:
        known = loopback.remembered()
        if known or any(sysctl.differs(setting, root) for setting in settings):
            loopback.remember(frozenset(tools) - known)
    except KernelError as error:
        log.warning(
            "cannot remember that route_localnet was set here: `proxyctl cleanup` will leave it and its guard",
            error=error,
        )


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
