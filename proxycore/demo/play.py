"""The demo from beginning to end: builds the lab, runs the proxy in it, plays the acts, and gives the verdict."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import ProxyError
from .answer import Answerers
from .lab import Lab
from .manifests import CONFIG, Folder, examples
from .probe import GRACE_SECONDS, Dialler, Expected, HeldConnection, Probe, dial
from .proxy import PROXYCTL, Proxy
from .script import ACTS, CHECKOUT_1, NODE_PORT, POOLS, PROBES, WEB_4, Act
from .view import View

READY_SECONDS = 15.0
PATIENCE_SECONDS = 10.0
"""How much longer than planned an act may take until everyone who should has answered."""
PAUSE_SECONDS = 0.04
FRAME_SECONDS = 0.125


@dataclass(frozen=True, slots=True)
class Verdict:
    """`faults`: everything that was not as it should be, a sentence each; empty: the proof holds."""

    connections: int
    held: int
    faults: tuple[str, ...]


def play(*, backend: str, seconds: float, view: View, command: Sequence[str] = PROXYCTL) -> Verdict:
    """Play all acts in about so many seconds.

    `command` stands in for `proxyctl`.  Raises ProxyError when the proxy does not start, ends too early or does not stop;
    KernelError or OSError when there can be no lab.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="proxycore-demo-")))
        manifests = scratch / "manifests"
        manifests.mkdir()
        origin = examples()
        folder = Folder(manifests, origin)
        pods = (*folder.pods(), WEB_4, CHECKOUT_1)
        view.note(f"building a node with {len(pods)} pods, a second node and the world outside")
        lab = stack.enter_context(Lab(pods))
        stack.enter_context(Answerers(lab, pods))
        proxy = Proxy(
            lab,
            command,
            backend=backend,
            folder=manifests,
            config=origin / CONFIG,
            log=scratch / "proxyctl.log",
        )
        stack.enter_context(proxy)
        view.note(f"on the node: proxyctl {' '.join(proxy.arguments)}")
        if not lab.ipv6:
            view.note("this kernel has no IPv6: the demo goes without")
        chosen = tuple(probe for probe in PROBES if lab.ipv6 or ":" not in probe.address)
        _await_ready(lab, proxy, chosen[0])
        return _Stage(stack, lab, folder, proxy, chosen, view).perform(seconds)


def _await_ready(lab: Lab, proxy: Proxy, probe: Probe) -> None:
    """Wait for the first answer.  Raises ProxyError when there is none in time."""
    end = time.monotonic() + READY_SECONDS
    while dial(lab, probe, 0.2).who not in POOLS[probe.pool]:
        proxy.check()
        if time.monotonic() > end:
            raise ProxyError(f"nothing answers at {probe.dials} after {READY_SECONDS:g} s:\n{proxy.tail()}")
        time.sleep(0.02)


class _Stage:
    """The diallers and what they are to expect, act after act."""

    def __init__(
        self, stack: ExitStack, lab: Lab, folder: Folder, proxy: Proxy, chosen: tuple[Probe, ...], view: View
    ) -> None:
        self._folder = folder
        self._proxy = proxy
        self._view = view
        self._expected = Expected(POOLS)
        self._diallers = [Dialler(lab, probe, self._expected, PAUSE_SECONDS) for probe in chosen]
        self._held = HeldConnection(lab, NODE_PORT, PAUSE_SECONDS * 2)
        self._faults: list[str] = []
        self._runners: tuple[Dialler | HeldConnection, ...] = (*self._diallers, self._held)
        for runner in self._runners:
            runner.start()
            stack.callback(runner.stop)

    def perform(self, seconds: float) -> Verdict:
        self._view.begin(self._diallers)
        for number, act in enumerate(ACTS, 1):
            self._view.act(f"{number}/{len(ACTS)}  {act.title}")
            self._act(act, seconds * act.share)
        for runner in self._runners:
            runner.stop()
        for dialler in self._diallers:
            wrong = dialler.tally.wrong
            if wrong:
                more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
                self._fault(dialler.probe, f"{wrong[0]}{more}")
        if self._held.fault:
            self._faults.append(self._held.fault)
        connections = sum(d.tally.answers.total() for d in self._diallers)
        return Verdict(connections, self._held.asked, tuple(self._faults))

    def _fault(self, probe: Probe, what: str) -> None:
        self._faults.append(f"{probe.service} at {probe.dials} from {probe.client}: {what}")

    def _act(self, act: Act, seconds: float) -> None:
        if act.stops:
            self._proxy.stop()
        for dialler in self._diallers:
            dialler.tally.mark()
        begun = time.monotonic()
        if act.edit is not None:
            # Expected first: the answers of before stay right for a while, those of after may come at once.
            self._expected.change(act.pool, act.answers)
            act.edit(self._folder)
            seconds = max(seconds, GRACE_SECONDS + 0.5)
        edited = time.monotonic()
        self._wait(act, begun + seconds)
        self._report(act, edited)
        self._view.act_done()

    def _wait(self, act: Act, until: float) -> None:
        """Until the act is over and everyone who should has answered every client."""
        patience = until + PATIENCE_SECONDS
        while True:
            now = time.monotonic()
            silent = [d for d in self._diallers if not self._complete(d)]
            if now > until and not silent:
                return
            if now > patience:
                for dialler in silent:
                    missing = self._expected.due(dialler.probe.pool) - set(dialler.tally.recent)
                    self._fault(
                        dialler.probe, f"no answer from {', '.join(sorted(missing))} while {act.title}"
                    )
                return
            if not act.stops:
                self._proxy.check()
            self._view.draw()
            time.sleep(FRAME_SECONDS)

    def _complete(self, dialler: Dialler) -> bool:
        if dialler.tally.wrong:
            return True  # told anyway; waiting would show nothing new
        seen, due = set(dialler.tally.recent), self._expected.due(dialler.probe.pool)
        return bool(seen & due) if dialler.probe.sticky else due <= seen

    def _report(self, act: Act, edited: float) -> None:
        """Say when the change was first felt, or last not."""
        tallies = [d.tally for d in self._diallers if d.probe.pool == act.pool]
        if act.comes:
            times = [t.first[act.comes] for t in tallies if act.comes in t.first]
            if times:
                self._view.note(
                    f"{act.comes}: first answer {_ms(min(times) - edited)} after the file was renamed into place"
                )
        if act.goes:
            last = max((t.latest[act.goes] for t in tallies if act.goes in t.latest), default=edited)
            when = f"last answer {_ms(last - edited)}" if last > edited else "no answer any more"
            self._view.note(f"{act.goes}: {when} after the file was renamed into place")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
