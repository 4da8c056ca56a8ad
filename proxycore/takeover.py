"""Taking a node over from kube-proxy, and from other backends of proxycore.

Our state is in force and verified before anything of theirs goes, so that a client meets one or both, and never neither.
Other backends are asked to clean up in a process of their own, for only the chosen one is loaded here.

    Takeover.refuse_if_needed()      before anything is touched
    Takeover.after_first_sync()      on a thread of its own, once the first full batch is verified
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import msgspec

from .backend import BackendContext
from .config.model import Takeover as Mode
from .errors import InternalError, KernelError, ProxyError
from .kernel import kubeproxy, presence
from .kernel.kubeproxy import Census, Part
from .kubechains import KEPT_MARKERS, TableRules
from .logs import Log
from .model import HostState
from .plugins import list_plugins, load_backend
from .status import Status

LOOK_AGAIN_SECONDS = (2.0, 8.0, 20.0, 40.0, 60.0)
"""Pauses between looks at what may have come back; kube-proxy notices within half a minute that its rules are gone."""
RETURNS = 2
"""So often kube-proxy's rules may come back before it counts as running: once may be the last thing that it did."""
CHILD_SECONDS = 60.0
DRAIN_SECONDS = 300.0
"""So long TCP connections through kube-proxy's IPVS virtual servers have to end by themselves."""
_DRAIN_LOOK_SECONDS = 1.0
_HOLD_LOOK_SECONDS = 2.0
_STRANGERS_LOOK_SECONDS = 0.5
_STRANGERS_SHARE = 0.1
"""At most this share of the time goes into looking whether the backend's rules are another's."""
_SHOWN = 6
_STOP_IT = (
    "stop kube-proxy on this node (its DaemonSet: `kubectl -n kube-system delete daemonset kube-proxy`, or keep it off this "
    "node by a nodeSelector), then start this proxy again"
)

_COME_BACK = "its rules come back when they are removed"
_CHANGES_OURS = "it changes the rules that this proxy goes on with"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the process that cleans up another backend says."""

    removed: tuple[str, ...] = ()
    error: str = ""


class Takeover:
    """One run's way of dealing with other owners of Services in its network namespace.

    `mode`: what is to be done about them; `backend`: the one in force.  `without`: parts of kube-proxy's that the backend in
    force uses as its own; `holds`: what of the part `iptables` it does, by names of tools, asked once it has started
    (Started.holds; empty: all of it).  `exclude_cidrs`: kube-proxy's `ipvs.excludeCIDRs`.  `pauses`: seconds between looks;
    `drain_seconds`: how long open connections may keep IPVS virtual servers.  `hold`: why nothing of theirs may go yet,
    asked again until it says None; see `reason_to_wait`.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        backend: str,
        log: Log,
        node_name: str = "localhost",
        without: Collection[Part] = (),
        holds: Callable[[], Collection[str]] = tuple,
        exclude_cidrs: Collection[str] = (),
        pauses: Sequence[float] = LOOK_AGAIN_SECONDS,
        child_seconds: float = CHILD_SECONDS,
        drain_seconds: float = DRAIN_SECONDS,
        hold: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._mode = mode
        self._backend = backend
        self._log = log
        self._node_name = node_name
        self._adopts = "iptables" in without
        self._without = frozenset(without)
        self._holds = holds
        self._exclude_cidrs = tuple(exclude_cidrs)
        self._pauses = tuple(pauses)
        self._child_seconds = child_seconds
        self._drain_seconds = drain_seconds
        self._hold = hold
        self._stopping = threading.Event()
        self._expected = False
        self._said: set[str] = set()
        self.problem: str | None = None
        """Why the node is not ours alone, in a sentence; None: it is, or it is not known yet.  Any thread may read it."""

    def refuse_if_needed(self) -> None:
        """Look for kube-proxy's rules before anything is touched; says what will become of them.

        Raises KernelError: there are some, and the mode is `refuse`.
        """
        try:
            found = self._look(started=False)
        except Exception as error:
            if self._mode == "refuse":
                raise KernelError(
                    f"cannot tell whether kube-proxy's rules are here (takeover: refuse): {error}"
                ) from error
            # A node whose Services work is worth more than a tidy one.
            if isinstance(error, KernelError):
                self._log.warning("cannot look for kube-proxy's rules", error=error)
            else:
                self._log.exception("cannot look for kube-proxy's rules", error)
            return
        self._expected = found.found
        if not found.found:
            return
        if self._mode == "refuse":
            raise KernelError(
                f"kube-proxy's rules are here (takeover: refuse): {_short(found.summary())}; stop kube-proxy and run "
                "`kube-proxy --cleanup`, or start with --takeover auto"
            )
        if self._mode == "auto":
            self._log.info(
                "kube-proxy's rules are here; they go once ours are in force"
                + (", those that the backend does not go on with" if self._adopts else ""),
                found=list(found.summary()),
            )

    def after_first_sync(self) -> bool:
        """Deal with what others left, and return once it has not come back for a while; blocks for minutes.

        True: the node is ours alone, or it is not to be.  Raises nothing; all is in the log, and in `problem`.
        """
        try:
            if self._mode == "auto":
                return self._wait_while_held() and self._take_over()
            if self._mode == "leave":
                return self._warn()
        except KernelError as error:
            self._fail("cannot look for kube-proxy's rules", str(error))
            return False
        except Exception as error:  # noqa: BLE001  a bug here must not end the thread unseen
            self._log.exception("taking over failed; what others left stays", error)
            self.problem = f"taking over failed: {error}"
            return False
        return True

    def stop(self) -> None:
        """Let after_first_sync() return soon; any thread may call it."""
        self._stopping.set()

    # -- kube-proxy --

    def _look(self, *, started: bool = True) -> Census:
        found = self._census() if started else self._census_before()
        for reason in found.unread:
            self._once("kube-proxy's rules may be here unseen", reason)
        rules = tuple((tools, table) for tools, table in found.rules if not _only_remembers(table))
        return msgspec.structs.replace(found, rules=rules)

    def _census(self) -> Census:
        """What is not the backend's."""
        held = self._held()
        return kubeproxy.census(
            without=self._without - {"iptables"} if held else self._without,
            held=held,
            exclude_cidrs=self._exclude_cidrs,
        )

    def _census_before(self) -> Census:
        """What the backend goes on with is not known yet: all counts, but for what bears its mark."""
        if not self._adopts:
            return self._census()
        return kubeproxy.census(
            without=self._without - {"iptables"}, held=kubeproxy.marked(), exclude_cidrs=self._exclude_cidrs
        )

    def _held(self) -> Collection[str]:
        """Names of tools whose rules the backend in force goes on with."""
        return self._holds() if self._adopts else ()

    def _once(self, message: str, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            self._log.warning(message, reason=reason)

    def _warn(self) -> bool:
        found = self._look()
        if not found.found:
            return True
        self.problem = f"kube-proxy's rules are in force beside ours: {_short(found.summary())}"
        self._log.warning(
            "kube-proxy's rules are in force beside ours (takeover: leave)",
            found=list(found.summary()),
            do="stop kube-proxy and run `kube-proxy --cleanup`, or start with --takeover auto",
        )
        return False

    def _wait_while_held(self) -> bool:
        """Leave everything in force while ours serves less than it should; False: we are to stop."""
        looked = False
        while (reason := self._hold()) is not None:
            if not looked and (self._expected or self._look().found):
                self._log.warning(
                    "kube-proxy's rules stay until ours serve all that they should", reason=reason
                )
                self.problem = f"kube-proxy's rules are still in force: {reason}"
            looked = True
            if self._stopping.wait(_HOLD_LOOK_SECONDS):
                return False
        self.problem = None
        return True

    def _take_over(self) -> bool:
        self._clean_up_others()
        returns = 0
        seen, clean = self._expected, False
        strangers: frozenset[str] = frozenset()
        failure: str | None = None
        for pause in (0.0, *self._pauses):
            for now in self._strangers_for(pause):
                # What stays away has not been taken away once more.
                returns += bool(now - strangers)
                strangers = now
                if returns >= RETURNS:
                    return self._fight_no_more(sorted(strangers), _CHANGES_OURS)
            if self._stopping.is_set():
                return self.problem is None
            try:
                found = self._look()
                failure = None
                if found.removable:
                    # What is here before all was gone once has not come back.
                    returns += clean and found.at_work
                    if returns >= RETURNS:
                        return self._fight_no_more(found.summary(), _COME_BACK, ", and stay now beside ours")
                    seen, clean = True, False
                    self._remove(found)
                elif not (seen or strangers or found.found):
                    return True
                clean = True
            except KernelError as error:
                failure = str(error)
                self._once("some of kube-proxy's rules cannot be removed yet", failure)
        if strangers:
            return self._fight_no_more(sorted(strangers), _CHANGES_OURS)
        if failure is None and found.out_of_reach:
            failure = "; ".join(found.out_of_reach)
        if failure is not None:
            self._fail("kube-proxy's rules cannot all be removed", failure)
            return False
        self._log.info("the node is taken over: nothing of kube-proxy's has come back")
        return True

    def _strangers_for(self, seconds: float) -> Iterator[frozenset[str]]:
        """For so long, again and again: which of the backend's rules are another's, by tools.

        The backend makes its marker anew within seconds, so that it is seen to be gone only by looking often; but what is
        looked at may be large.  Ends early when we are to stop.
        """
        end = time.monotonic() + seconds
        held = self._held()
        while True:
            began = time.monotonic()
            if held:
                try:
                    yield kubeproxy.strangers(held)
                except KernelError as error:
                    self._once("cannot see whether kube-proxy is at work in our rules", str(error))
            took = time.monotonic() - began
            left = end - time.monotonic()
            if left <= 0:
                return
            pause = max(_STRANGERS_LOOK_SECONDS, took / _STRANGERS_SHARE) if held else left
            if self._stopping.wait(min(pause, left)):
                return

    def _remove(self, found: Census) -> None:
        for reason in found.warnings():
            self._once("taking over", reason)
        kubeproxy.remove_rules(found, self._tell)
        if self._drain(found):
            kubeproxy.remove_ipvs(found, self._tell)

    def _tell(self, line: str) -> None:
        self._log.info("removed", of="kube-proxy", what=line)

    def _drain(self, found: Census) -> bool:
        """Let open connections through virtual servers end, once, and not for ever; False: we are to stop.

        New ones go by our rules already: these translate a packet before it can come to IPVS.
        """
        end = time.monotonic() + self._drain_seconds
        self._drain_seconds = 0.0
        told = False
        while found.servers and time.monotonic() < end:
            active = kubeproxy.open_connections(found)
            if not active:
                break
            if not told:
                self._log.info(
                    "connections through IPVS virtual servers have time to end by themselves",
                    open=active,
                    seconds=end - time.monotonic(),
                )
                told = True
            if self._stopping.wait(_DRAIN_LOOK_SECONDS):
                return False
        return True

    def _fight_no_more(self, found: Sequence[str], what: str, then: str = "") -> bool:
        self.problem = f"kube-proxy is still running: {what}"
        self._log.error(f"{self.problem}{then}", found=list(found), do=_STOP_IT)
        return False

    def _fail(self, message: str, reason: str) -> None:
        self.problem = f"{message}: {reason}"
        self._log.error(
            message,
            error=reason,
            do="remove them by `kube-proxy --cleanup`, or start this proxy again to have another try",
        )

    # -- other backends of ours --

    def _clean_up_others(self) -> None:
        for name in other_backends(self._backend):
            if self._stopping.is_set():
                return
            answer = clean_up_apart(name, self._node_name, self._child_seconds)
            for line in answer.removed:
                self._log.info("removed", of=f"the {name} backend", what=line)
            if answer.error:
                self._log.error(
                    "what another backend left cannot be removed",
                    backend=name,
                    error=answer.error,
                    do=f"stop this proxy, run `proxyctl cleanup --backend {name}`, start it again",
                )


def _only_remembers(rules: TableRules) -> bool:
    """Is there nothing but what an init container of ours left, for cleaning up?"""
    return not rules.jumps and KEPT_MARKERS.issuperset(rules.chains)


def reason_to_wait(status: Status) -> str | None:
    """What is not in force yet and may be in kube-proxy's rules, in a phrase; None: ours are all that is needed.

    Services that the backend cannot serve at all are no reason: waiting would not change that.
    """
    if status.held or status.refused:
        return status.held or status.refused
    if not status.service_changes_total:
        return "the source has no Service"
    if status.source.state == "stale":
        return f"the source is stale: {status.source.reason}"
    if status.quarantined:
        name, why = next(iter(status.quarantined.items()))
        return f"{len(status.quarantined)} Services are set aside, such as {name}: {why}"
    if status.lacking:
        what = min(status.lacking)
        return f"{len(status.lacking)} objects or files cannot be read, such as {what}: {status.troubles.get(what, '')}"
    return None


def _short(found: Sequence[str]) -> str:
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def other_backends(chosen: str) -> tuple[str, ...]:
    """Names of the other backends that are installed and can be loaded, as far as can be told without loading them."""
    return tuple(
        sorted(
            {
                listed.found.name
                for listed in list_plugins()
                if listed.facts is not None
                and listed.facts.state == "available"
                and listed.problem is None
                and listed.found.name != chosen
            }
        )
    )


def clean_up_apart(name: str, node_name: str, seconds: float) -> Answer:
    """Let a backend remove what it left, in a child process; it is killed after `seconds`.  Raises nothing."""
    # The child must find the very plugins that this process found.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "proxycore.takeover", name, node_name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        return Answer(error=f"no process could be started for it: {error.strerror}")
    try:
        output, complaints = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # One that left the group may hold the pipes for as long as it lives; nobody waits for that.
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        process.wait()
        return Answer(error=f"its clean-up did not end within {seconds:g} s and was killed")
    try:
        return msgspec.json.decode(output.strip().rpartition(b"\n")[2], type=Answer)
    except msgspec.DecodeError:
        said = complaints.decode("utf-8", "replace").strip().splitlines()
        return Answer(
            error=f"its clean-up ended with status {process.returncode}{': ' + said[-1][:300] if said else ''}"
        )


# -- in the child --

_PR_SET_PDEATHSIG = 1


def _check_parent() -> None:
    """Only the run at work here may have others' state removed beside it, and only as long as it lives.

    `proxyctl cleanup` refuses beside a run for that run's sake; this is that run's own wish.  Raises KernelError.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    found = presence.holder()
    if found is None or found.uid != os.geteuid() or found.pid != os.getppid():
        raise KernelError("this is called by `proxyctl run` alone; use `proxyctl cleanup`")


def _clean_up(name: str, node_name: str) -> Answer:
    try:
        _check_parent()
        host = HostState(node_name=node_name)
        context = BackendContext(host=host, families=host.families)
        return Answer(removed=load_backend(name).cleanup(context).removed)
    except ProxyError as error:
        return Answer(error=str(error))


def main(arguments: Sequence[str]) -> int:
    """`python -m proxycore.takeover NAME NODE`, by clean_up_apart() alone: prints an Answer as JSON, in its last line."""
    if len(arguments) != 2:
        raise InternalError("clean_up_apart() gives the name of a backend and that of the node")
    # Whatever the backend prints must not stand before or in the answer.
    answer_to = os.dup(1)
    os.dup2(2, 1)
    answer = _clean_up(*arguments)
    with os.fdopen(answer_to, "wb") as stream:
        stream.write(b"\n" + msgspec.json.encode(answer) + b"\n")
    return 1 if answer.error else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
